"""The denoising U-Net of SDXL, base and refiner (SDXL Table 1), from one config.

    input_blocks    convolution
                    each level: n times (ResBlock, SpatialTransformer), then Downsample, but at the last level
    middle_block    ResBlock, SpatialTransformer, ResBlock
    output_blocks   each level, the last one first: n + 1 times (ResBlock, SpatialTransformer), then Upsample, but at
                    the first level; each ResBlock reads the map before and, beside it, one that an input block left
    out             GroupNorm, SiLU, convolution

n is `num_res_blocks`; levels whose `transformer_depth` is 0 have no SpatialTransformer. What ResBlocks read besides is
the time embedding, with the conditioning vector in it, and what SpatialTransformers read is the text.
Its state dict has the keys of the published single files behind their prefix `model.diffusion_model.`.

B batch, C latent channels, h w latent height and width, l number of a level and L of the last, M channels of a level
and M' of the skip that joins it, M0 those of the first level, T text tokens, D text width, V width of the conditioning
vector, E width of the time embedding
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import UNetConfig
from model.layers import (
    Downsample,
    GroupNorm,
    ResBlock,
    Run,
    SpatialTransformer,
    Upsample,
    fourier,
    map_format,
    runner,
    zeroed,
)


class UNet(nn.Module):
    """Predicts the noise (or v) in `noisy_latents`, given the text tokens and the conditioning vector.

    The final layer starts at zero, so a new network predicts zero; so do the last layers of each residual block and
    each spatial transformer, which start as their skip connections.
    Set `activation_checkpointing` to trade about a third more compute for memory in the backward pass.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        embed = config.time_embed_dim
        self.time_embed = _mlp(config.model_channels, embed)
        self.label_emb = nn.Sequential(_mlp(config.vector_dim, embed))  # nested as in the published layout

        levels = [config.model_channels * mult for mult in config.channel_mult]
        last = len(levels) - 1
        channels = levels[0]
        skips = [channels]  # channels that each encoder block hands to the decoder
        self.input_blocks = nn.ModuleList(
            [Block([nn.Conv2d(config.latent_channels, channels, kernel_size=3, padding=1)])]
        )
        for level, width in enumerate(levels):
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(
                    Block(
                        [_res(config, channels, width), *_transformer(config, width, config.transformer_depth[level])]
                    )
                )
                channels = width
                skips.append(channels)
            if level != last:
                self.input_blocks.append(Block([Downsample(channels)]))
                skips.append(channels)

        self.middle_block = Block(
            [
                _res(config, channels, channels),
                *_transformer(config, channels, config.middle_depth),
                _res(config, channels, channels),
            ]
        )

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(levels))):
            for index in range(config.num_res_blocks + 1):
                block = [
                    _res(config, channels + skips.pop(), width),
                    *_transformer(config, width, config.transformer_depth[level]),
                ]
                channels = width
                if level != 0 and index == config.num_res_blocks:
                    block.append(Upsample(channels))
                self.output_blocks.append(Block(block))

        self.out = nn.Sequential(
            GroupNorm(config.norm_groups, channels, eps=1e-5),
            nn.SiLU(),
            zeroed(nn.Conv2d(channels, config.latent_channels, 3, padding=1)),
        )

    def forward(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor) -> Tensor:
        """The prediction [B,C,h,w], in the weights' dtype.

        `noisy_latents` [B,C,h,w] (h and w multiples of config.downsample), `timesteps` [B] (integer or not),
        `context` [B,T,D], `vector` [B,V] from `conditioning_vector`. Raises ValueError where a shape does not fit.
        """
        self._check(noisy_latents, timesteps, context, vector)
        run = runner(self.activation_checkpointing)
        dtype = next(self.parameters()).dtype
        context = context.to(dtype)  # [B,T,D]
        time = fourier(timesteps, self.config.model_channels).to(dtype)  # [B,M0]
        embedding = self.time_embed(time) + self.label_emb(vector.to(dtype))  # [B,E]

        hidden = noisy_latents.to(dtype, memory_format=map_format(noisy_latents.device))  # [B,C,h,w]
        skips = []
        for block in self.input_blocks:
            hidden = block(hidden, embedding, context, run)  # [B,M,h/2^l,w/2^l]
            skips.append(hidden)
        hidden = self.middle_block(hidden, embedding, context, run)  # [B,M,h/2^L,w/2^L]
        for block in self.output_blocks:
            hidden = torch.cat([hidden, skips.pop()], dim=1)  # [B,M+M',h/2^l,w/2^l]
            hidden = block(hidden, embedding, context, run)  # [B,M,h/2^l,w/2^l]
        return self.out(hidden)  # [B,C,h,w]

    def _check(self, noisy_latents: Tensor, timesteps: Tensor, context: Tensor, vector: Tensor) -> None:
        config = self.config
        if noisy_latents.ndim != 4:
            raise ValueError(f"latents {tuple(noisy_latents.shape)}: expected [B,{config.latent_channels},h,w]")
        batch, channels, height, width = noisy_latents.shape
        if channels != config.latent_channels or height % config.downsample or width % config.downsample:
            raise ValueError(
                f"latents {tuple(noisy_latents.shape)}: expected {config.latent_channels} channels and sides that are "
                f"multiples of {config.downsample}"
            )
        if timesteps.shape != (batch,):
            raise ValueError(f"timesteps {tuple(timesteps.shape)}: expected ({batch},)")
        if context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, config.context_dim):
            raise ValueError(f"context {tuple(context.shape)}: expected ({batch}, tokens, {config.context_dim})")
        if vector.shape != (batch, config.vector_dim):
            raise ValueError(f"vector {tuple(vector.shape)}: expected ({batch}, {config.vector_dim})")


class Block(nn.ModuleList):
    """Layers in a row, each given those of time embedding and text that it reads."""

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor, run: Run) -> Tensor:
        """A map through all layers; `run` runs each residual and transformer block."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = run(layer, x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context, run)
            else:
                x = layer(x)
        return x


def _mlp(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))


def _res(config: UNetConfig, channels: int, out_channels: int) -> nn.Module:
    return ResBlock(channels, out_channels, config.time_embed_dim, config.norm_groups)


def _transformer(config: UNetConfig, channels: int, depth: int) -> list[nn.Module]:
    """A transformer of this depth, or nothing where the depth is 0."""
    if depth == 0:
        return []
    heads = channels // config.head_channels
    return [SpatialTransformer(channels, config.context_dim, depth, heads, config.norm_groups)]
