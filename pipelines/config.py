"""What several pipelines can be told: frozen dataclasses with a sentence and a unit under each field.

What one alone is told lies beside it: preprocess/config.py, train/config.py, evaluate/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from model.config import SamplerName, Spacing

Count = Annotated[int, Gt(0)]
Amount = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(float("inf"))]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Size = tuple[Count, Count]  # (height, width) in pixels


DEFAULT_SCORE = "aesthetic_score"
SINGLE_FILES = (".tar", ".parquet")  # what a source's path may name, in place of a folder
OVERLAPS_PER_TILE = 4  # neighbouring tiles of the VAE share this part of their side


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Names that a source gives to what is read from it. One that is set and not there is an error."""

    image: str | None = None
    """The image: in a table its bytes, or a file's name; in tars the suffix. None takes the first there is of "image",
    "jpg", "png", "webp" and "file_name" in a table, and a sample's only image in a tar."""
    caption: str | Mapping[str, Positive] = "caption"
    """The captions: a column of texts, or of lists of texts, of which training draws one each time. Several columns are
    named with a weight each, which a list shares among its texts, e.g. {long = 3, short = 1}; "" is for none."""
    caption_weights: str | None = None
    """A column with a list of weights, one for each caption of a column of lists: 0 leaves a caption out. None, or a
    row without weights, draws all alike."""
    caption_per_line: bool = False
    """Whether each line of a .txt is a caption of its own; else the whole file is one."""
    aesthetic_score: str | None = None
    """The score that the refiner is conditioned on; None takes "aesthetic_score" where there is one."""
    scores: Mapping[str, str] = field(default_factory=dict)
    """Further scores by the name that they get in the index, e.g. {watermark = "pwatermark"}; filters.scores has their
    limits."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images are."""

    name: str = "source"
    """What the index calls this source. Together with its path in the source it names an image; another name makes
    other rows."""
    path: str
    """Folder, local or s3://, or one .tar or .parquet file."""
    kind: Literal["auto", "folder", "parquet", "webdataset", "huggingface"] = "auto"
    """"folder": images at any depth, with a .txt caption beside each or metadata.jsonl or metadata.csv in it or below.
    "parquet": tables with an image's bytes in each row, or the name of its file, below the table's folder, absolute or
    s3://. "webdataset": tars, such as img2dataset's. "huggingface": a dataset that save_to_disk wrote. "auto" looks."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    """What the source calls image, caption and scores."""
    weight: Annotated[float, Ge(0), Le(1000)] = 1.0
    """How often training sees each of its images in an epoch, on average: 2 is twice, 0.5 every other time, 0 never. A
    change makes no row anew."""


def all_sources(source: SourceConfig | None, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    """One source, or several."""
    return sources if source is None else (source,)


@dataclass(frozen=True, kw_only=True)
class DriverConfig:
    """What the process that lists, plans and commits takes of its machine. Rows that do not fit go to its disk."""

    memory_mib: Annotated[int, Ge(16)] = 128
    """Memory for rows on their way, MiB: a guide and no limit. Besides it comes what is read at a time, some 150."""
    folder: str | None = None
    """Folder of temporary files on this machine, up to 300 bytes a row; None for the system's. Its files have no names
    and go with the process, however that ends."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How an image is brought to its bucket, after the shorter fit."""

    placement: Literal["random", "center"] = "random"
    """Where the crop lies: uniform (SDXL Algorithm 1), drawn from the seed and the image, or the middle."""
    flip_chance: Share = 0.0
    """Chance that the image is mirrored left to right before it is cropped."""
    seed: Amount = 0
    """Seed of both draws, which follow from it, the image's content and the number of the crop."""


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """One network's weights: a preset's shape, and a file or a seed for the values."""

    preset: str
    """Name of the preset in model/config.py."""
    path: str | None = None
    """A safetensors file (ours or the published single file), a training run's output folder, a checkpoint of a U-Net's
    run, or a diffusers folder (of the network, or of a whole pipeline); local or s3://. None draws random weights."""
    seed: Amount = 0
    """Seed of random weights where there is no path."""
    allow_pickle: bool = False
    """Whether the path may lead to a pickle (.ckpt, .pt, .pth, .bin). Only tensors are taken from one, and no code is
    run."""


@dataclass(frozen=True, kw_only=True)
class TextWeightsConfig:
    """Both text encoders' weights."""

    preset: str = "sdxl"
    """Name of the preset in model/config.py."""
    clip_l: str | None = None
    """CLIP ViT-L: the published single file, a folder of a diffusers pipeline or of transformers, or a hub name."""
    bigg: str | None = None
    """OpenCLIP ViT-bigG: any of these, an open_clip safetensors file, or open_clip's "model:tag"."""
    seed: Amount | None = None
    """Seed of random weights, in place of both names: for models that are trained with no other text encoders."""
    allow_pickle: bool = False
    """Whether either may be a pickle. Only tensors are taken from one, and no code is run."""


@dataclass(frozen=True, kw_only=True)
class StageResources:
    """What one task or actor of a stage is given, and how many there may be."""

    cpus: Annotated[float, Ge(0)] = 1.0
    """CPU cores of each."""
    gpus: Annotated[float, Ge(0)] = 0.0
    """GPUs of each; a fraction shares one."""
    workers: tuple[Count, Count] = (1, 1)
    """Fewest and most actors of an actor pool."""
    max_retries: Amount = 3
    """How often a task whose process dies is tried again, and how often its actor is started again."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The MLflow server."""

    uri: str | None = None
    """Tracking URI; None is a SQLite file, mlflow.db, in the directory the job is started from."""
    run_name: str | None = None
    """Name of the run; None takes the last part of what it makes: base-512 of s3://bucket/runs/base-512."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How pictures are sampled."""

    sampler: SamplerName = SamplerName.EULER
    """How one step goes."""
    spacing: Spacing = Spacing.TRAILING
    """Where the steps lie on the schedule."""
    steps: Count = 50
    """Sampling steps over the whole schedule."""
    eta: Annotated[float, Ge(0)] | None = None
    """Share of fresh noise in a step of "euler_ancestral" or "ddim", which None sets to 1 and to 0. The other samplers
    add no noise and take no notice."""
    scale: float = 5.0
    """Classifier-free guidance; 1 turns it off."""
    rescale: Share = 0.0
    """How far guidance is brought back to the contrast of the unguided prediction (arXiv 2305.08891, 3.4), which takes
    0.7 for schedules that end without a signal; 0 leaves it as it is."""
    refiner_scale: float = 1.0
    """Guidance of the refiner, away from the encoded empty prompt as the published one expects it. Training drops text
    to zeros, so 1, which turns it off, is right for a refiner that was trained here."""
    refiner: Literal["ensemble", "sdedit"] = "ensemble"
    """"ensemble" hands noisy latents over to the refiner, once and for the rest (experts as in arXiv 2211.01324);
    "sdedit" lets the base finish, and the refiner noise and denoise its latents again (SDXL 2.5)."""
    handover: Amount = 200
    """In an ensemble, the refiner takes the timesteps below this one; 0 leaves the base alone."""
    strength: Annotated[float, Gt(0), Le(1)] = 0.3
    """Share of the steps that "sdedit" goes back over."""
    aesthetic_score: float = 6.0
    """Score that the refiner is asked for."""
    negative_aesthetic_score: float = 2.5
    """Score of the refiner's unconditional branch."""


@dataclass(frozen=True, kw_only=True)
class LPIPSWeightsConfig:
    """The frozen network of the perceptual loss, whose two published files a person has to fetch."""

    preset: str = "vgg16"
    """Name of the preset in model/config.py."""
    trunk: str
    """torchvision's vgg16, a .safetensors file or a pickle, local or s3://; its classifier is not read."""
    heads: str
    """The heads of LPIPS for VGG, version 0.1, likewise: vgg.pth of the Python package lpips."""
    allow_pickle: bool = False
    """Whether pickles are read, as which both are published. Only tensors are taken from one, and no code is run."""


@dataclass(frozen=True, kw_only=True)
class RetentionConfig:
    """What is kept of what nothing needs at once."""

    versions: Count = 3
    """Newest versions of a dataset, the current one among them. A training reads the version that it started from."""
    checkpoints: Count = 2
    """Newest checkpoints of a run."""
    older_than_hours: Annotated[float, Ge(0)] = 24.0
    """Hours since a file was written, or a version replaced, before it may go: a killed run's finished files save the
    next one work."""


EXPERIMENTS: Mapping[str, str] = {
    stage: f"sdxl-{stage}" for stage in ("index", "latents", "vae", "base", "refiner", "generate", "evaluate")
}
"""MLflow experiment of each stage."""
EXPERIMENT_NOTES: Mapping[str, str] = {
    "index": "Every input image, its size, bucket and verdict. A run is one call that found something new; its "
    "artifact report.html shows what became of the images.",
    "latents": "VAE latents and text embeddings of the kept images. A run is one call that made some; its artifact "
    "report.html has counts, times and failures.",
    "vae": "Training of the autoencoder. A run is one output folder, however often it was stopped and went on.",
    "base": "Training of the base. A run is one output folder, however often it was stopped and went on.",
    "refiner": "Training of the refiner. A run is one output folder, however often it was stopped and went on.",
    "generate": "Pictures of prompts. A run is one call.",
    "evaluate": "Figures of networks that belong to no run here; those of a run stand with the run.",
}
"""What a person reads above each."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; tables in a list are named by their number."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            result |= flat({str(number): item for number, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


USER_INFO = re.compile(r"(?<=://)[^/@\s?#]+@")  # user:password@ of an address
QUERY_SECRET = re.compile(
    r"(?i)([?&](?:[\w.-]*(?:password|passwd|token|secret|signature|credential|api_?key))=)[^&#\s'\"]+"
)
HIDDEN = "***"


def without_secrets(value: Any) -> Any:
    """A JSON value, or a text, in which no address tells its user and password any more, nor a secret after its "?"."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str):
        return value
    return QUERY_SECRET.sub(rf"\1{HIDDEN}", USER_INFO.sub(f"{HIDDEN}@", value))
