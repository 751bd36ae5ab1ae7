"""What preprocessing can be told: filters, buckets, encoding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Le

from pipelines.config import Amount, Count, Share, Size, StageResources

MOST_DISTINCT = 256  # distinct pixel values are counted up to here


@dataclass(frozen=True, kw_only=True)
class ScoreLimits:
    """Which values of one score are kept, in the source's unit."""

    min: float | None = None
    """Lowest; None for any."""
    max: float | None = None
    """Highest; None for any."""
    required: bool = False
    """Whether an image without this score is rejected; limits alone keep it."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is rejected. Small images are kept by default: size conditioning exists to use them (SDXL 2.2).

    All but max_pixels can be changed later without reading an image again.
    """

    min_side: Count = 1
    """Shortest side an original image may have, pixels."""
    max_aspect: Annotated[float, Ge(1)] = 6.0
    """Longest over shortest side an original image may have."""
    max_pixels: Count = 200_000_000
    """Pixels a header may claim before the file is refused unread. A change measures every image again."""
    min_distinct_pixels: Annotated[int, Ge(1), Le(MOST_DISTINCT)] = 2
    """Fewest distinct pixel values an image may have; 2 rejects what is of one colour, 1 nothing."""
    min_contrast: Annotated[float, Ge(0)] = 0.0
    """Least standard deviation of brightness, of 255, over a thumbnail of 32 x 32."""
    near_duplicate_bits: Annotated[int, Ge(0), Le(16)] | None = None
    """Bits of 64 in which the perceptual hashes of two images may differ and one of them be rejected: the smaller. None
    rejects none."""
    min_caption_characters: Amount = 1
    """Shortest caption, after white space is stripped. Of several, those that fit are kept, and with them the image."""
    max_caption_characters: Count = 1_000_000
    """Longest caption, after white space is stripped. The text encoders see its first 75 tokens."""
    scores: Mapping[str, ScoreLimits] = field(default_factory=dict)
    """Limits by score: "aesthetic_score", "clip_similarity" where it is computed, or a name of the source's
    columns.scores, e.g. {watermark = {max = 0.5}}."""


@dataclass(frozen=True, kw_only=True)
class BucketConfig:
    """The sizes that images are brought to (SDXL 2.3 and Appendix I)."""

    resolution: Count = 1024
    """Side of the square that sets the area, pixels; the paper's table is scaled to it."""
    table: Literal["sdxl", "square"] | tuple[Size, ...] = "sdxl"
    """"sdxl" for the paper's 40 sizes, "square" for one, or a list of [height, width]."""
    multiple: Count = 64
    """What every side is a multiple of: pixels per latent pixel, times the reduction inside the deepest U-Net."""


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How the latents stage encodes."""

    rows_per_file: Count = 64
    """Crops per task, and most per Parquet file."""
    crops: Count = 1
    """Crops of each image, each drawn by itself and a row of its own, which training sees once an epoch. More of them
    encode the new ones only."""
    batch: Count = 16
    """Images in one pass of the VAE; rows_per_file is a multiple of it, so that passes are full."""
    text: Literal["embeddings", "tokens"] = "embeddings"
    """What is stored of captions. "tokens" takes 0.3 KB each in place of 320, and training runs both text encoders on
    each image it sees: a worker holds their weights too."""
    text_batch: Count = 64
    """Captions in one pass of the text encoders."""
    kept_captions: Amount = 1024
    """Captions whose text an encoder keeps in memory, 0.3 MB each, so as not to encode one again that comes again."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the networks compute in; latents and text are stored as float16. The published VAE overflows in float16:
    the images that do so are reported by name and left out."""
    tile: Count | None = None
    """Side of the tiles that crops of a larger area are encoded in, pixels; neighbours share a quarter. None encodes
    whole. It bounds the VAE's memory, in buckets of 2048 x 2048, say; such latents are nearly those of the whole (see
    model/tiling.py). Another side makes all latents anew."""
    resources: StageResources = field(default_factory=StageResources)
    """One encoder process."""


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """Scores that the index stage computes, from weights that a person names. filters.scores has their limits.

    clip_similarity is the cosine of the embeddings of image and caption, -1 to 1, of several captions the best one's
    (LAION-400M kept 0.3 and more).
    aesthetic_score, which the refiner is conditioned on, is computed for the images whose source has none.
    """

    model: str
    """open_clip's name of the CLIP model, as "ViT-L-14", or local-dir:FOLDER with its configuration and weights."""
    weights: str | None = None
    """File of its weights, local or s3://; None where the model is a local-dir."""
    aesthetic_head: str | None = None
    """A .safetensors file, local or s3://, with one linear layer, weight [1, D] and bias [1], on the normalized image
    embedding; None computes no aesthetic score."""
    allow_pickle: bool = False
    """Whether the CLIP weights may be a pickle. Only tensors are taken from one, and no code is run."""
    rows_per_file: Count = 256
    """Images per task and per Parquet file of scores."""
    batch: Count = 32
    """Images in one pass."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the CLIP model computes in."""
    resources: StageResources = field(default_factory=StageResources)
    """One scoring process."""


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """When a run that makes the index asks for a person. New images are those that the committed index lacks."""

    reject_share: tuple[Share, Share] = (0.0, 1.0)
    """Least and greatest share of the new images that is rejected; outside, the job commits and ends with status 3."""
    min_new: Count = 100
    """New images of which a share is taken; of fewer none is."""
    hold_reject_share: Share = 1.0
    """Share of rejected new images above which nothing is committed, and the job ends with status 4. 1 never holds."""
    hold_loss_share: Share = 1.0
    """Share of kept rows that may go at once; above it nothing is committed, and the job ends with status 4."""
