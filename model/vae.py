"""The autoencoder of SDXL (SDXL 2.4): images to latents an eighth as high and wide, and back.

    encoder   convolution; each level: n residual blocks, then PaddedDownsample, but at the last level;
              Middle; GroupNorm, SiLU, convolution
    decoder   convolution; Middle; each level, the last one first: n + 1 residual blocks, then Upsample, but at the
              first level; GroupNorm, SiLU, convolution

n is `num_res_blocks`; Middle is a residual block, attention over the map's pixels, and a residual block.
Its state dict has the keys of the published single files behind their prefix `first_stage_model.`. The
published weights overflow in float16 (activations beyond 65,504): run them in fp32 or bf16.

B batch, H W image height and width, h w latent height and width, C channels of a level, Z latent channels
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import VAEConfig
from model.finite import require_finite
from model.layers import GroupNorm, Run, Upsample, map_format, runner


class VAE(nn.Module):
    """Encoder to a Gaussian per latent element, and decoder. Latents here are unscaled; see `scale`.

    Set `activation_checkpointing` to trade about a third more compute for memory in the backward pass.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Posterior]:
        """The reconstruction [B,3,H,W] through a posterior sample drawn with `noise` [B,Z,h,w], and the posterior."""
        posterior = self.encode(image)
        return self.decode(posterior.sample(noise)), posterior

    def encode(self, image: Tensor) -> Posterior:
        """The posterior of `image` [B,3,H,W] in [-1, 1]; H and W multiples of config.downsample, else ValueError.

        In float16 it raises NotFiniteError, a FloatingPointError, for samples that overflow.
        """
        side = self.config.downsample
        if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] % side or image.shape[3] % side:
            raise ValueError(f"image {tuple(image.shape)}: expected 3 channels and sides that are multiples of {side}")
        image = image.to(self.quant_conv.weight.dtype, memory_format=map_format(image.device))  # [B,3,H,W]
        hidden = self.encoder(image, runner(self.activation_checkpointing))  # [B,2Z,h,w]
        moments = require_finite(self.quant_conv(hidden), "the VAE's encoder")  # [B,2Z,h,w]
        mean, logvar = moments.float().chunk(2, dim=1)  # [B,Z,h,w] each
        return Posterior(mean=mean, std=torch.exp(0.5 * logvar.clamp(-30.0, 20.0)))

    def decode(self, unscaled_latents: Tensor) -> Tensor:
        """The image [B,3,H,W], about in [-1, 1] (not clamped), of unscaled latents [B,Z,h,w].

        Raises ValueError for another shape. In float16 it raises NotFiniteError, a FloatingPointError, for samples that
        overflow.
        """
        channels = self.config.latent_channels
        if unscaled_latents.ndim != 4 or unscaled_latents.shape[1] != channels:
            raise ValueError(f"latents {tuple(unscaled_latents.shape)}: expected [B,{channels},h,w]")
        dtype, memory_format = self.post_quant_conv.weight.dtype, map_format(unscaled_latents.device)
        latents = self.post_quant_conv(unscaled_latents.to(dtype, memory_format=memory_format))  # [B,Z,h,w]
        image = self.decoder(latents, runner(self.activation_checkpointing))  # [B,3,H,W]
        return require_finite(image, "the VAE's decoder")

    @property
    def last_layer(self) -> Tensor:
        """The decoder's last weight, where the gradients of the VAE's losses are compared."""
        return self.decoder.conv_out.weight


@dataclass(frozen=True)
class Posterior:
    """A Gaussian per latent element: `mean` and `std`, unscaled, [B,Z,h,w] fp32."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """An unscaled draw [B,Z,h,w] for unit Gaussian `noise` of that shape."""
        return self.mean + self.std * noise

    def kl(self) -> Tensor:
        """Divergence from the unit Gaussian in nats, summed over the elements: [B] (arXiv 1312.6114, appendix B)."""
        per_element = 0.5 * (self.mean.square() + self.std.square() - 1.0) - self.std.log()
        return per_element.flatten(1).sum(1)


def scale(mean: Tensor, std: Tensor, noise: Tensor, scaling_factor: float) -> Tensor:
    """The latents that the U-Net sees, of about unit variance, from a stored posterior and unit Gaussian noise."""
    return scaling_factor * (mean + std * noise)


def unscale(latents: Tensor, scaling_factor: float) -> Tensor:
    """Latents as the decoder takes them; undoes the factor in `scale`."""
    return latents / scaling_factor


class Encoder(nn.Module):
    """Image [B,3,H,W] to the moments [B,2Z,h,w]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.channels
        for level, mult in enumerate(config.channel_mult):
            width = config.channels * mult
            blocks = [VAEResBlock(channels if i == 0 else width, width, groups) for i in range(config.num_res_blocks)]
            is_last = level == len(config.channel_mult) - 1
            self.down.append(Level(blocks, downsample=None if is_last else PaddedDownsample(width)))
            channels = width
        self.mid = Middle(channels, groups)
        self.norm_out = GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor, run: Run) -> Tensor:
        """[B,3,H,W] to [B,2Z,h,w]; `run` runs each block."""
        hidden = self.conv_in(image)  # [B,C,H,W]
        for level in self.down:
            hidden = level(hidden, run)  # [B,C,H/2^l,W/2^l]
        hidden = self.mid(hidden, run)  # [B,C,h,w]
        return self.conv_out(F.silu(self.norm_out(hidden)))  # [B,2Z,h,w]


class Decoder(nn.Module):
    """Unscaled latents [B,Z,h,w] to the image [B,3,H,W]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        channels = config.channels * config.channel_mult[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels, 3, padding=1)
        self.mid = Middle(channels, groups)
        levels: list[nn.Module] = []
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            width = config.channels * mult
            blocks = [
                VAEResBlock(channels if i == 0 else width, width, groups) for i in range(config.num_res_blocks + 1)
            ]
            levels.insert(0, Level(blocks, upsample=None if level == 0 else Upsample(width)))
            channels = width
        self.up = nn.ModuleList(levels)  # counted from the finest level, so the forward pass runs them backwards
        self.norm_out = GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, latents: Tensor, run: Run) -> Tensor:
        """[B,Z,h,w] to [B,3,H,W]; `run` runs each block."""
        hidden = self.mid(self.conv_in(latents), run)  # [B,C,h,w]
        for level in reversed(self.up):
            hidden = level(hidden, run)  # [B,C,H/2^l,W/2^l]
        return self.conv_out(F.silu(self.norm_out(hidden)))  # [B,3,H,W]


class Level(nn.Module):
    """Residual blocks at one resolution, then perhaps a change of resolution."""

    def __init__(
        self, blocks: list[VAEResBlock], downsample: nn.Module | None = None, upsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """[B,C,h,w] to [B,C',h,w], or to half or twice the sides; `run` runs each block."""
        for block in self.block:
            x = run(block, x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention over all latent pixels, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = VAEResBlock(channels, channels, groups)
        self.attn_1 = MapAttention(channels, groups)
        self.block_2 = VAEResBlock(channels, channels, groups)

    def forward(self, x: Tensor, run: Run) -> Tensor:
        """[B,C,h,w] to [B,C,h,w]; `run` runs each block."""
        return run(self.block_2, run(self.attn_1, run(self.block_1, x)))


class VAEResBlock(nn.Module):
    """Two normalised convolutions added to the input."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # "nin", network in network, is the published name of a 1 x 1 convolution.
        self.nin_shortcut = None if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C',h,w]."""
        hidden = x
        for layer in (self.norm1, F.silu, self.conv1, self.norm2, F.silu, self.conv2):  # each lets go of what it read
            hidden = layer(hidden)  # [B,C|C',h,w]
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class MapAttention(nn.Module):
    """Self-attention of a map's pixels, one head, its projections written as 1 x 1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C,h,w]."""
        normed = self.norm(x)  # [B,C,h,w]
        q, k, v = (
            layer(normed)
            .flatten(2)
            .transpose(1, 2)
            .contiguous()[:, None]  # [B,1,hw,C]; of strided tokens torch would build hw x hw
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]  # [B,hw,C]
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))  # [B,C,h,w]


class PaddedDownsample(nn.Module):
    """Half the height and width; the padding is one row below and one column to the right only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C,h/2,w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))
