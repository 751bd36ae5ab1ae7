"""What each network is: frozen dataclasses, and the published and reduced shapes as presets by name.

Every number of the architecture has its home here; dimensions that follow from others are properties.
Imports only the standard library, so that a job can check its settings without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class PredictionType(StrEnum):
    """What the U-Net predicts: the noise, or v = sqrt(a) noise - sqrt(1 - a) x0 (arXiv 2202.00512, eq. 12)."""

    EPSILON = "epsilon"
    V = "v"


class SamplerName(StrEnum):
    """How a step goes from one noise level to the next; model/sampler.py has the equations."""

    EULER = "euler"
    EULER_ANCESTRAL = "euler_ancestral"  # adds fresh noise at every step
    DPMPP_2M = "dpmpp_2m"  # second order: the step before helps
    DDIM = "ddim"  # adds none at eta 0, and all that DDPM adds at eta 1


class Spacing(StrEnum):
    """Where the noise levels of a run lie on the schedule."""

    LEADING = "leading"  # evenly spaced timesteps that leave out the noisiest: the published pipeline's
    TRAILING = "trailing"  # evenly spaced timesteps from the noisiest on (arXiv 2305.08891, 3.3)
    KARRAS = "karras"  # sigmas evenly spaced in their seventh root (arXiv 2206.00364, eq. 5)


class Conditioning(StrEnum):
    """The numbers embedded beside the pooled text, each a pair or one scalar per image (SDXL 2.2, 2.3)."""

    ORIGINAL_SIZE = "original_size"  # (height, width) in pixels, before any resize
    CROP_TOP_LEFT = "crop_top_left"  # (top, left) in pixels of the resized image
    TARGET_SIZE = "target_size"  # (height, width) of the bucket in pixels
    AESTHETIC_SCORE = "aesthetic_score"  # one score, about 1 to 10

    @property
    def scalars(self) -> int:
        """How many numbers this conditioning holds."""
        return 1 if self is Conditioning.AESTHETIC_SCORE else 2


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The denoising U-Net (SDXL Table 1; sgm's openaimodel.UNetModel)."""

    model_channels: int
    """Channels of the first level."""
    channel_mult: tuple[int, ...]
    """Channels of each level, as multiples of model_channels; each level but the last halves the resolution."""
    transformer_depth: tuple[int, ...]
    """Transformer blocks per attention at each level; 0 for a level without attention."""
    middle_depth: int
    """Transformer blocks of the middle block."""
    context_dim: int
    """Width of the text tokens that cross-attention reads."""
    pooled_dim: int
    """Width of the pooled text embedding."""
    conditioning: tuple[Conditioning, ...]
    """What follows the pooled text in the vector, in this order."""
    context_offset: int = 0
    """First channel of the stored context that this network reads (the refiner reads bigG's part only)."""
    latent_channels: int = 4
    """Channels of the latents, in and out."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    head_channels: int = 64
    """Channels of one attention head."""
    conditioning_embed_dim: int = 256
    """Fourier features per conditioning scalar."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        if len(self.transformer_depth) != len(self.channel_mult):
            raise ValueError(
                f"transformer_depth {self.transformer_depth} and channel_mult {self.channel_mult} differ in length"
            )
        _first_is_one(self.channel_mult)
        last = len(self.channel_mult) - 1  # the middle block, which attends, is as wide
        for level, (mult, depth) in enumerate(zip(self.channel_mult, self.transformer_depth, strict=True)):
            if (depth or level == last) and (self.model_channels * mult) % self.head_channels:
                raise ValueError(
                    f"{self.model_channels * mult} channels do not divide into heads of {self.head_channels}"
                )
            if (self.model_channels * mult) % self.norm_groups:
                raise ValueError(f"{self.model_channels * mult} channels do not divide into {self.norm_groups} groups")

    @property
    def vector_dim(self) -> int:
        """Width of the conditioning vector: 2816 for the base, 2560 for the refiner."""
        return self.pooled_dim + self.conditioning_embed_dim * sum(name.scalars for name in self.conditioning)

    @property
    def time_embed_dim(self) -> int:
        """Width of the embedding that every residual block receives."""
        return 4 * self.model_channels

    @property
    def downsample(self) -> int:
        """Latent pixels per pixel of the coarsest level, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """The autoencoder (SDXL 2.4; sgm's AutoencoderKL)."""

    channels: int = 128
    """Channels of the finest level."""
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, as multiples of channels; each level but the last halves the resolution."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latent."""
    scaling_factor: float = 0.13025
    """latents = scaling_factor * (mean + std * noise), so that the U-Net sees about unit variance."""
    norm_groups: int = 32
    """Groups of every GroupNorm."""

    def __post_init__(self) -> None:
        _first_is_one(self.channel_mult)
        for mult in self.channel_mult:
            if (self.channels * mult) % self.norm_groups:
                raise ValueError(f"{self.channels * mult} channels do not divide into {self.norm_groups} groups")

    @property
    def downsample(self) -> int:
        """Pixels per latent pixel, along one side."""
        return 2 ** (len(self.channel_mult) - 1)


def _first_is_one(channel_mult: tuple[int, ...]) -> None:
    """Raise ValueError for a first level of another width than the network's own, which no public layout can say."""
    if channel_mult[:1] != (1,):
        raise ValueError(f"channel_mult {channel_mult} has to begin with 1")


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """The patch discriminator of the VAE's adversarial loss (arXiv 1611.07004)."""

    channels: int = 64
    """Channels of the first layer."""
    layers: int = 3
    """Layers of stride 2; the receptive field is 70 pixels at 3."""
    norm_groups: int = 32
    """Groups of its GroupNorms."""


@dataclass(frozen=True, kw_only=True)
class TextTowerConfig:
    """One CLIP text transformer."""

    width: int
    """Channels of a token."""
    layers: int
    """Transformer layers; the context is the output of the last but one."""
    heads: int
    """Attention heads."""
    activation: str
    """"quick_gelu" (OpenAI's CLIP) or "gelu" (OpenCLIP)."""
    pad_token: int
    """Token id behind the end of text. The two published towers differ in it."""
    projection_dim: int | None = None
    """Width of the projected pooled embedding; None where the tower has none."""


CONTEXT_LENGTH = 77  # tokens, start and end of text included
VOCABULARY = 49_408  # CLIP's byte-pair vocabulary
START_OF_TEXT, END_OF_TEXT = 49_406, 49_407


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Both text encoders (SDXL 2.1): the context is their tokens side by side, the pooled text is bigG's."""

    clip_l: TextTowerConfig
    """CLIP ViT-L's text transformer."""
    bigg: TextTowerConfig
    """OpenCLIP ViT-bigG's text transformer, with its projection."""

    @property
    def context_dim(self) -> int:
        """Channels of the stored context, [CLIP-L | bigG]."""
        return self.clip_l.width + self.bigg.width

    @property
    def pooled_dim(self) -> int:
        """Channels of the pooled text."""
        assert self.bigg.projection_dim is not None
        return self.bigg.projection_dim


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The discrete noise schedule (SDXL 2.5; betas linear in their square root, as in latent diffusion)."""

    num_timesteps: int = 1000
    """Noise levels."""
    beta_start: float = 0.00085
    """First beta."""
    beta_end: float = 0.012
    """Last beta."""
    prediction_type: PredictionType = PredictionType.EPSILON
    """What the U-Net predicts."""
    zero_terminal_snr: bool = False
    """Whether the last timestep is pure noise (arXiv 2305.08891, algorithm 1), so that pictures can be dark or bright
    as a whole. SDXL's own schedule keeps a signal there. Needs V: the noise alone says nothing about the image."""

    def __post_init__(self) -> None:
        if self.zero_terminal_snr and self.prediction_type == PredictionType.EPSILON:
            raise ValueError(
                f"zero_terminal_snr needs prediction_type {PredictionType.V.value!r}: at a signal of 0, "
                f"{str(self.prediction_type)!r} leaves the image undefined"
            )


class TimestepBias(StrEnum):
    """Which of the drawn timesteps are drawn more often than the others, or less."""

    NONE = "none"
    EARLIER = "earlier"  # the lowest ones, of little noise
    LATER = "later"  # the highest ones, of much noise
    RANGE = "range"  # those of a given range


@dataclass(frozen=True, kw_only=True)
class TimestepBiasConfig:
    """Timesteps of unequal chance, with the names of the open SDXL trainers. The paper draws them uniformly (SDXL 2.5).

    The loss does not make up for it: what is drawn more often counts for more.
    """

    strategy: TimestepBias = TimestepBias.NONE
    """Which timesteps are biased."""
    multiplier: float = 1.0
    """How many times as often one of them is drawn as one of the others; below 1 it is drawn less often."""
    portion: float = 0.25
    """Share of the drawn range that "earlier" and "later" bias."""
    range: tuple[int, int] | None = None
    """First and one past the last timestep that "range" biases."""

    def __post_init__(self) -> None:
        if (self.strategy == TimestepBias.RANGE) != (self.range is not None):
            raise ValueError(f"range is {self.range} with the strategy {str(self.strategy)!r}")


@dataclass(frozen=True, kw_only=True)
class DenoiserLossConfig:
    """How noise, timesteps and conditioning are drawn for one training step of base or refiner, and the loss's weight.

    Published are the uniform timesteps, the refiner's range and the offset noise (SDXL 2.5). SDXL's dropout rates are
    not; sizes and text were dropped as zeros, each of an embedder's outputs by itself.
    """

    timesteps: tuple[int, int] = (0, 1000)
    """First and one past the last timestep that are drawn; the refiner's expert range is (0, 200) (SDXL 2.5)."""
    timestep_bias: TimestepBiasConfig = field(default_factory=TimestepBiasConfig)
    """Which of them are drawn more often."""
    offset_noise: float = 0.0
    """Level of the noise shared by a whole channel; the paper's last base stage uses 0.05."""
    min_snr_gamma: float | None = None
    """Signal-to-noise ratio above which timesteps weigh less (arXiv 2303.09556, which takes 5); None weighs all alike,
    as SDXL does. With V, a timestep weighs no more than its alphas_cumprod: nothing at a signal of 0."""
    caption_dropout: float = 0.1
    """Chance that all text is zeroed in one draw: what guidance takes for "no text". Unpublished; 0.1 is the open
    default."""
    text_dropout: float = 0.0
    """Chance that one text output is zeroed, drawn for CLIP-L's tokens, bigG's tokens and the pooled text apart, on top
    of caption_dropout. Unpublished; 0.1 trains guidance only together with caption_dropout."""
    size_dropout: float = 0.0
    """Chance that one size embedding is zeroed. Unpublished; 0 is the open default."""

    @property
    def biased_timesteps(self) -> tuple[int, int] | None:
        """First and one past the last of the timesteps that timestep_bias names; None where it names none."""
        bias, (first, end) = self.timestep_bias, self.timesteps
        width = round(bias.portion * (end - first))
        if bias.strategy == TimestepBias.EARLIER:
            return first, first + width
        if bias.strategy == TimestepBias.LATER:
            return end - width, end
        return bias.range if bias.strategy == TimestepBias.RANGE else None


@dataclass(frozen=True, kw_only=True)
class LPIPSConfig:
    """The network that compares images as people do (arXiv 1801.03924): VGG's convolutions up to its fifth pooling."""

    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    """Channels of each level; each but the first halves the resolution before it begins."""
    convolutions: tuple[int, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each level; its last activations are compared."""

    def __post_init__(self) -> None:
        if len(self.channels) != len(self.convolutions):
            raise ValueError(f"channels {self.channels} and convolutions {self.convolutions} differ in length")

    @property
    def least_side(self) -> int:
        """Shortest side of an image, in pixels, that every level can still see."""
        return 2 ** (len(self.channels) - 1)


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the VAE's loss. The paper publishes none; the defaults are latent diffusion's kl-f8."""

    perceptual_weight: float = 1.0
    """Weight of the perceptual distance, per pixel and channel; it counts where the task names the weights of LPIPS."""
    kl_weight: float = 1e-6
    """Weight of the divergence from a unit Gaussian, summed over the latent's elements."""
    adversarial_weight: float = 0.5
    """Weight of the adversarial term, on top of the adaptive weight."""
    adversarial_start_images: int = 600_000
    """Images seen before the adversarial term joins (kl-f8: 50,001 steps of 12 images)."""


BASE_CONDITIONING = (Conditioning.ORIGINAL_SIZE, Conditioning.CROP_TOP_LEFT, Conditioning.TARGET_SIZE)
REFINER_CONDITIONING = (Conditioning.ORIGINAL_SIZE, Conditioning.CROP_TOP_LEFT, Conditioning.AESTHETIC_SCORE)

TEXT_PRESETS: Mapping[str, TextConfig] = {
    "sdxl": TextConfig(
        clip_l=TextTowerConfig(width=768, layers=12, heads=12, activation="quick_gelu", pad_token=END_OF_TEXT),
        bigg=TextTowerConfig(width=1280, layers=32, heads=20, activation="gelu", pad_token=0, projection_dim=1280),
    ),
    "tiny": TextConfig(
        clip_l=TextTowerConfig(width=32, layers=2, heads=2, activation="quick_gelu", pad_token=END_OF_TEXT),
        bigg=TextTowerConfig(width=64, layers=2, heads=2, activation="gelu", pad_token=0, projection_dim=64),
    ),
}

UNET_PRESETS: Mapping[str, UNetConfig] = {
    "base": UNetConfig(  # 2,567,463,684 parameters
        model_channels=320,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 10),
        middle_depth=10,
        context_dim=2048,
        pooled_dim=1280,
        conditioning=BASE_CONDITIONING,
    ),
    "refiner": UNetConfig(  # 2,259,526,660 parameters
        model_channels=384,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 4, 4, 0),
        middle_depth=4,
        context_dim=1280,
        pooled_dim=1280,
        conditioning=REFINER_CONDITIONING,
        context_offset=768,
    ),
    "small-base": UNetConfig(  # for one GPU, with the tiny text encoders
        model_channels=128,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 1, 4),
        middle_depth=4,
        context_dim=96,
        pooled_dim=64,
        conditioning=BASE_CONDITIONING,
    ),
    "small-refiner": UNetConfig(
        model_channels=128,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 0),
        middle_depth=2,
        context_dim=64,
        pooled_dim=64,
        conditioning=REFINER_CONDITIONING,
        context_offset=32,
    ),
    "tiny-base": UNetConfig(
        model_channels=64,
        channel_mult=(1, 2),
        transformer_depth=(0, 1),
        middle_depth=1,
        context_dim=96,
        pooled_dim=64,
        conditioning=BASE_CONDITIONING,
        head_channels=32,
    ),
    "tiny-refiner": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        transformer_depth=(1, 0),
        middle_depth=1,
        context_dim=64,
        pooled_dim=64,
        conditioning=REFINER_CONDITIONING,
        context_offset=32,
        head_channels=32,
    ),
}

VAE_PRESETS: Mapping[str, VAEConfig] = {
    "sdxl": VAEConfig(),  # 83,653,863 parameters
    "small": VAEConfig(channels=64, scaling_factor=1.0),
    "tiny": VAEConfig(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8, scaling_factor=1.0),
}

DISCRIMINATOR_PRESETS: Mapping[str, DiscriminatorConfig] = {
    "sdxl": DiscriminatorConfig(),
    "tiny": DiscriminatorConfig(channels=16, layers=2, norm_groups=8),
}

LPIPS_PRESETS: Mapping[str, LPIPSConfig] = {
    "vgg16": LPIPSConfig(),
    "tiny": LPIPSConfig(channels=(4, 8, 8), convolutions=(1, 1, 1)),
}

SSIM_WINDOW = 11
"""Side of the structural similarity's Gaussian window, and the least of an image, pixels (Wang et al. 2004, 3.2)."""
