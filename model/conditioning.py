"""What the U-Net is told beside the text tokens: the pooled text and the embedded sizes (SDXL 2.2, 2.3).

B batch, T text tokens, D width of the stored context, P width of the pooled text, V width of the vector
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.config import Conditioning, UNetConfig
from model.layers import fourier


def conditioning_vector(
    pooled: Tensor,
    conditions: Mapping[Conditioning, Tensor],
    config: UNetConfig,
    keep: Tensor | None = None,
) -> Tensor:
    """The vector [B,V] in fp32: the pooled text, then the Fourier features of each of config.conditioning, in order.

    `pooled` is [B,P]; `conditions` maps at least the names in config.conditioning to [B, numbers], height before
    width and top before left, in pixels; `keep` [B, len(config.conditioning)] is False where an embedding is dropped,
    which leaves zeros. Raises KeyError for a missing name, ValueError for a shape that does not fit.
    """
    batch = len(pooled)
    if pooled.shape != (batch, config.pooled_dim):
        raise ValueError(f"pooled {tuple(pooled.shape)}: expected ({batch}, {config.pooled_dim})")
    if keep is not None and keep.shape != (batch, len(config.conditioning)):
        raise ValueError(f"keep {tuple(keep.shape)}: expected ({batch}, {len(config.conditioning)})")
    parts = [pooled.float()]  # [B,P]
    for index, name in enumerate(config.conditioning):
        if name not in conditions:
            raise KeyError(f"condition {name.value} is missing; given: {sorted(map(str, conditions))}")
        values = conditions[name]  # [B,n]
        if values.shape != (batch, name.scalars):
            raise ValueError(f"{name} {tuple(values.shape)}: expected ({batch}, {name.scalars})")
        features = fourier(values, config.conditioning_embed_dim).flatten(1)  # [B,256n]
        parts.append(features if keep is None else drop(features, keep[:, index]))
    return torch.cat(parts, dim=1)  # [B,V]


def drop(x: Tensor, keep: Tensor) -> Tensor:
    """`x` [B,..] with zeros for the samples where `keep` [B] is False.

    Zeros, not an empty prompt, are what SDXL's base takes for "no text".
    """
    dropped = ~keep.to(device=x.device, dtype=torch.bool)
    return x.masked_fill(dropped.view(-1, *[1] * (x.ndim - 1)), 0)


def select_context(context: Tensor, config: UNetConfig) -> Tensor:
    """The channels [B,T,context_dim] of the stored context [B,T,D] that this network reads.

    The base reads both text towers, the refiner bigG's alone. Raises ValueError where the stored context is too narrow.
    """
    end = config.context_offset + config.context_dim
    if context.shape[-1] < end:
        raise ValueError(f"context of {context.shape[-1]} channels: the network reads {config.context_offset} to {end}")
    return context[..., config.context_offset : end]
