"""What training can be told: batches, optimizer, workers, schedule, and the two tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from model.config import DenoiserLossConfig, DiffusionConfig, VAELossConfig
from pipelines.config import (
    Amount,
    Count,
    CropConfig,
    Decay,
    LPIPSWeightsConfig,
    Positive,
    SamplingConfig,
    Share,
    SourceConfig,
    TextWeightsConfig,
    WeightsConfig,
)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """One optimizer step's images."""

    global_size: Count
    """Images per step over all workers."""
    micro_size: Count
    """Images per worker and pass, at most; global_size = micro_size x workers x accumulation."""
    shuffle_rows: Count = 8_192
    """Rows that are shuffled together; files are read in a drawn order, this many rows at a time."""
    seed: Amount = 0
    """Seed of the order, and of every draw in training."""
    validation_share: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of the images, picked by their content, that is not trained on: the validation curves measure on them. Give
    each stage the same share: they hold out the same images."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which steps are refused, and what then. A refused step changes no weight; it is counted and its rows recorded."""

    action: Literal["skip", "stop"] = "skip"
    """Go on with the next step, or end the run; with "skip" in its place the same command goes on."""
    spike_factor: Annotated[float, Ge(0)] = 0.0
    """Refuse a loss or gradient norm of more than this many times its mean; 0 refuses only what is not finite."""
    window_steps: Count = 128
    """Steps that the means remember; before as many, nothing counts as a jump."""
    most_in_a_row: Count = 10
    """Steps refused one after another that end the run in any case."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, and the learning rate's way over the run. The paper publishes none of these."""

    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    implementation: Literal["auto", "plain", "fused", "8bit"] = "auto"
    """How it computes: operation by operation ("plain"), in one kernel ("fused"), or with moments of 8 bits, a quarter
    of the memory ("8bit", which needs bitsandbytes); "auto" is fused, which GPUs and CPUs have a kernel for."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Ge(0)] = 0.01
    """Decoupled weight decay."""
    warmup_images: Amount = 0
    """Images over which the learning rate rises from zero, in a line."""
    decay_images: Amount = 0
    """Images over which it falls, at the end of the run; 0 keeps it constant."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    """How it falls: in a line, or along half a cosine (arXiv 1608.03983, eq. 5)."""
    final_lr_share: Share = 0.0
    """Share of lr that it falls to."""
    clip_norm: Annotated[float, Ge(0)] = 1.0
    """Largest norm of the gradient; 0 leaves it as it is."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Which steps are refused."""

    @property
    def moment_bytes(self) -> float:
        """Bytes of both moments of a parameter; of 8 bits, with a scale for each 256."""
        return 2 * (1 + 4 / 256) if self.implementation == "8bit" else 8.0


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
    min_count: Count | None = None
    """The fewest that training goes on with while the cluster lacks some, with the same global batch; None waits for
    all."""
    grow_seconds: Positive = 600.0
    """With min_count, seconds between two looks whether the cluster has room for more workers; if it has, they all
    start again from the last checkpoint."""
    gpu: bool = False
    """Whether each worker has a GPU."""
    cpus: Annotated[float, Ge(0)] = 1.0
    """CPU cores of each worker."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer and the average over workers, 2 the gradients as well, 3 the weights
    too; 0 shards nothing."""
    offload_optimizer: bool = False
    """Keep the optimizer and the average in the memory of the host, and update there; needs stage 2 or 3."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the forward and backward pass; the optimizer keeps float32."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile each block of the U-Net or VAE; the first step takes minutes longer and later ones less time."""
    peak_tflops: Positive | None = None
    """What one GPU could do in dtype, dense, TFLOP/s, which the curve "mfu" is a share of; None takes the data sheet's
    value of a GPU that is known in bfloat16, and leaves the curve out for others."""
    max_failures: Amount = 3
    """How often in a row, with no new checkpoint between, a run whose worker dies is resumed from its last one."""

    @property
    def fewest(self) -> int:
        """Workers that training can go on with."""
        return self.count if self.min_count is None else self.min_count


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
    sample_buckets: Count = 3
    """Buckets that have a grid, those of the most rows first."""
    validation_images: Amount = 0
    """Images between two points of the validation curves, which have one at the end as well; 0 for none. It needs
    batch.validation_share."""
    validation_rows: Count = 2_048
    """Held-out rows that a point is measured on, at most."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""


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
class VAETaskConfig:
    """Training of the VAE on the images that an index keeps."""

    vae: WeightsConfig
    """The network; a path fine-tunes it."""
    discriminator: str
    """Name of the discriminator's preset."""
    index: str
    """The index dataset."""
    source: SourceConfig | None = None
    """The images that the index describes."""
    sources: tuple[SourceConfig, ...] = ()
    """In place of `source`, several."""
    crop: CropConfig = field(default_factory=CropConfig)
    """Where the training crop lies."""
    lost_share: Share = 0.01
    """Share of the images that may be gone or changed since the index was made: another image of the bucket stands for
    each, and it is recorded. Above it the run ends; 0 ends it at the first."""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """Weights of the loss terms."""
    lpips: LPIPSWeightsConfig | None = None
    """The network of the perceptual term; None leaves the term out, and with it much of the sharpness of latent
    diffusion's autoencoders."""
    adversarial_lr_scale: Positive = 1.0
    """Learning rate of the discriminator over that of the VAE."""
    scaling_images: Count = 256
    """Images over which the exported scaling factor (one over the latents' deviation) is measured."""
