"""What preprocessing can be told: filters, buckets, encoding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from pipelines.config import Amount, Count, Size, StageResources


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What is rejected. Small images are kept by default: size conditioning exists to use them (SDXL 2.2)."""

    min_side: Count = 1
    """Shortest side an original image may have, pixels."""
    max_aspect: Annotated[float, Ge(1)] = 6.0
    """Longest over shortest side an original image may have."""
    max_pixels: Count = 200_000_000
    """Pixels a header may claim before the file is refused unread."""
    min_caption_characters: Amount = 1
    """Shortest caption, after white space is stripped."""


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
    """Images per task and per Parquet file."""
    batch: Count = 16
    """Images in one pass of the VAE."""
    text_batch: Count = 64
    """Captions in one pass of the text encoders."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the networks compute in; latents and text are stored as float16. The published VAE overflows in float16:
    the images that do so are reported by name and left out."""
    resources: StageResources = field(default_factory=StageResources)
    """One encoder process."""
