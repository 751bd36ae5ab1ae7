"""The parts of the U-Net: residual block, transformer, resampling, Fourier features.

Attribute names spell the published single-file layout, so that a state dict's keys equal it without a translation.

B batch, C channels, h w latent height and width, N tokens of one map (h * w), T text tokens, D text width,
E width of the time embedding, K heads
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.functions import gate, group_norm

Run = Callable[..., Tensor]
"""Runs a layer on its inputs: `plainly` or `checkpointed`."""


def runner(activation_checkpointing: bool) -> Run:
    """How a network runs its layers; what no backward pass follows keeps nothing, so it is run plainly."""
    return checkpointed if activation_checkpointing and torch.is_grad_enabled() else plainly


def plainly(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a layer and keep its activations for the backward pass."""
    return layer(*inputs)


def checkpointed(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """Run a layer and keep its inputs only; the backward pass computes the rest again.

    One residual block or one transformer block at a time: memory then holds the inputs of all and the activations of
    one. No layer draws, so no random state is kept.
    """
    return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)


def map_format(device: torch.device) -> torch.memory_format:
    """How maps lie in memory: channels last on a GPU, whose convolutions read that.

    Who runs a network on a GPU gives its weights that format, too, with `module.to(memory_format=...)`: convolutions
    copy weights of another format at every pass, which took 4% of a small batch's time on a CPU.
    """
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, added to the input (SDXL Table 1; residual blocks of ADM)."""

    def __init__(self, channels: int, out_channels: int, embed_dim: int, groups: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm(groups, channels, eps=1e-5), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_dim, out_channels))
        self.out_layers = nn.Sequential(
            GroupNorm(groups, out_channels, eps=1e-5),
            nn.SiLU(),
            nn.Identity(),  # the published layout counts a dropout of 0 here
            zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[B,C,h,w] and the time embedding [B,E] to [B,C',h,w]."""
        hidden = self.in_layers(x)  # [B,C',h,w]
        hidden = hidden + self.emb_layers(embedding)[:, :, None, None]  # [B,C',1,1]
        return self.skip_connection(x) + self.out_layers(hidden)  # [B,C',h,w]


class SpatialTransformer(nn.Module):
    """Transformer blocks over a map's pixels as tokens, added to the map. Projections are linear, as in SD 2 and XL."""

    def __init__(self, channels: int, context_dim: int, depth: int, heads: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(channels, context_dim, heads) for _ in range(depth)
        )
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, run: Run = plainly) -> Tensor:
        """`x` [B,C,h,w] and `context` [B,T,D] to [B,C,h,w]; `run` runs each transformer block."""
        height = x.shape[2]
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # [B,N,C]
        for block in self.transformer_blocks:
            tokens = run(block, tokens, context)  # [B,N,C]
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, (height, -1))  # [B,C,h,w]


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward; each normalised before and added to its input."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.attn2 = Attention(channels, context_dim, heads)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """`x` [B,N,C] and `context` [B,T,D] to [B,N,C]."""
        normed = self.norm1(x)  # [B,N,C]
        x = x + self.attn1(normed, normed)  # [B,N,C]
        x = x + self.attn2(self.norm2(x), context)  # [B,N,C]
        return x + self.ff(self.norm3(x))  # [B,N,C]


class Attention(nn.Module):
    """Softmax attention of the tokens `x` to the tokens `source`; with source = x it is self-attention."""

    def __init__(self, channels: int, source_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_channels, channels, bias=False)
        self.to_v = nn.Linear(source_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """`x` [B,N,C] and `source` [B,T,D] to [B,N,C]."""
        q, k, v = (
            tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B,K,N|T,C/K]
            for tokens in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B,K,N,C/K]
        return self.to_out(mixed.transpose(1, 2).flatten(2))  # [B,N,C]


class FeedForward(nn.Module):
    """The transformer's pointwise network, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The layout counts a dropout of 0 between the two.
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[..,C] to [..,C]."""
        return self.net(x)


class GEGLU(nn.Module):
    """A linear layer gated by the exact GELU of a second one (arXiv 2002.05202)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """[..,C] to [..,C']."""
        return gate(self.proj(x))  # [..,C'] of [..,2C']


class Downsample(nn.Module):
    """Half the height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C,h/2,w/2]."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution. Shared by U-Net and VAE."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] to [B,C,2h,2w]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes float16 and bfloat16 maps in fp32, as the published training did."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,..] to the same, in its type and memory format."""
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def fourier(values: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Features [.., dim] of the numbers `values` [..]: cosines, then sines, at dim / 2 geometric frequencies, in fp32.

    Used for timesteps and, over the same range of frequencies, for sizes in pixels. Source: arXiv 1706.03762, 3.5, with
    the two halves side by side; SDXL 2.2. Raises ValueError for an odd `dim`.
    """
    if dim % 2:
        raise ValueError(f"Fourier features come in pairs of cosine and sine: dim {dim} is odd")
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=values.device) / half
    angles = values.float()[..., None] * torch.exp(-math.log(max_period) * exponent)  # [.., dim/2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)  # [.., dim]


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters zero, so that what it ends adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
