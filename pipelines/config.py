"""What each pipeline can be told: frozen dataclasses with a sentence and a unit under each field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from model.config import DenoiserLossConfig, DiffusionConfig, SamplerName, Spacing, VAELossConfig

Count = Annotated[int, Gt(0)]
Amount = Annotated[int, Ge(0)]
Positive = Annotated[float, Gt(0), Lt(float("inf"))]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Size = tuple[Count, Count]  # (height, width) in pixels


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Where the images are."""

    path: str
    """Folder, local or s3://, with metadata.jsonl (file_name, caption, ...) or a .txt caption beside each image."""
    caption_column: str = "caption"
    """Field of metadata.jsonl that holds the caption."""
    score_column: str = "aesthetic_score"
    """Field of metadata.jsonl that holds the aesthetic score, where there is one."""


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
class CropConfig:
    """How an image is brought to its bucket, after the shorter fit."""

    placement: Literal["random", "center"] = "random"
    """Where the crop lies: uniform (SDXL Algorithm 1), drawn from the seed and the image, or the middle."""
    flip_chance: Share = 0.0
    """Chance that the crop is mirrored left to right."""
    seed: Amount = 0
    """Seed of both draws."""


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


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """The MLflow server."""

    uri: str | None = None
    """Tracking URI; None is a SQLite file, mlflow.db, in the directory the job is started from."""
    run_name: str | None = None
    """Name of the run; None names it after its stage."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """One optimizer step's images."""

    global_size: Count
    """Images per step over all workers."""
    micro_size: Count
    """Images per worker and pass; global_size = micro_size x workers x accumulation."""
    shuffle_rows: Count = 8_192
    """Rows that are shuffled together; files are read in a drawn order, this many rows at a time."""
    seed: Amount = 0
    """Seed of the order, and of every draw in training."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the learning rate's way over the run. The paper publishes none of these."""

    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay."""
    warmup_images: Amount = 0
    """Images over which the learning rate rises from zero."""
    decay_images: Amount = 0
    """Images over which it falls to zero, at the end of the run."""
    clip_norm: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """The averaged weights, which are the ones that are sampled from and exported."""

    halflife_images: Count = 500_000
    """Images over which a weight's share in the average halves. Unpublished; EDM2's value."""
    rampup: Positive = 0.05
    """The half-life is at most this share of the images seen."""


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """The processes that train together."""

    count: Count = 1
    """Workers, one GPU each or one CPU share each."""
    gpu: bool = False
    """Whether each worker has a GPU."""
    cpus: Annotated[float, Ge(0)] = 1.0
    """CPU cores of each worker."""
    zero_stage: Literal[1, 2] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer and the average over workers, 2 the gradients as well."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the forward and backward pass; the optimizer keeps float32."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each block of the U-Net or VAE; the first step takes minutes longer and later ones less time."""
    max_failures: Amount = 3
    """How often a run whose worker dies is resumed from its last checkpoint before it fails."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How long to train and how often to do what, all in images over all workers."""

    images: Count
    """Images to train on."""
    checkpoint_images: Count
    """Images between two checkpoints."""
    sample_images: Amount = 0
    """Images between two grids of samples; 0 for none."""
    log_images: Amount = 0
    """Images between two points of a curve; 0 for every step."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""


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
class DenoiserTaskConfig:
    """Training of the base or of the refiner on latents."""

    unet: WeightsConfig
    """The network; a path fine-tunes it."""
    latents: str
    """The latents dataset."""
    vae: WeightsConfig
    """The VAE that made the latents; it scales them and decodes samples."""
    text: TextWeightsConfig
    """The text encoders that made the latents."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The noise schedule."""
    loss: DenoiserLossConfig = field(default_factory=DenoiserLossConfig)
    """Draws of noise, timesteps and dropout, and the loss's weight."""
    samples: SamplingConfig = field(default_factory=SamplingConfig)
    """How the grids of samples are made."""


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
class VAETaskConfig:
    """Training of the VAE on the images that an index keeps."""

    vae: WeightsConfig
    """The network; a path fine-tunes it."""
    discriminator: str
    """Name of the discriminator's preset."""
    index: str
    """The index dataset."""
    source: SourceConfig
    """The images that the index describes."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Where the training crop lies."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """Weights of the loss terms."""
    lpips: LPIPSWeightsConfig | None = None
    """The network of the perceptual term; None leaves the term out, and with it much of the sharpness of latent
    diffusion's autoencoders."""
    adversarial_lr_scale: Positive = 1.0
    """Learning rate of the discriminator over that of the VAE."""
    scaling_images: Count = 256
    """Images over which the exported scaling factor (one over the latents' deviation) is measured."""


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
    resources: StageResources = field(default_factory=StageResources)
    """One generator process."""


EXPERIMENTS: Mapping[str, str] = {
    stage: f"sdxl-{stage}" for stage in ("index", "latents", "vae", "base", "refiner", "generate")
}
"""MLflow experiment of each stage."""


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
