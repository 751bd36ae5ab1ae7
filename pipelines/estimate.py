"""What a run needs, before it starts: parameters of each preset, and memory of each worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from model.config import DISCRIMINATOR_PRESETS, TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS
from model.text import TextEncoders
from model.unet import UNet
from model.vae import VAE
from model.vae_loss import PatchDiscriminator
from pipelines.train.config import WorkersConfig

NETWORKS: Mapping[str, Callable[[str], nn.Module]] = {
    "unet": lambda preset: UNet(UNET_PRESETS[preset]),
    "vae": lambda preset: VAE(VAE_PRESETS[preset]),
    "text": lambda preset: TextEncoders(TEXT_PRESETS[preset]),
    "discriminator": lambda preset: PatchDiscriminator(DISCRIMINATOR_PRESETS[preset]),
}


def parameters(network: str, preset: str) -> int:
    """Parameters of a preset, counted on the built network without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[network](preset).parameters())


def readable(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def memory_per_worker(networks: Mapping[str, int], workers: WorkersConfig) -> dict[str, float]:
    """Bytes of each worker by purpose, from the parameters of the networks that train; the first one is averaged.

    Activations are not in it: they depend on the batch, the bucket and checkpointing.
    """
    total, averaged = sum(networks.values()), next(iter(networks.values()))
    width = 2 if workers.dtype == "bfloat16" else 4
    shard = 1 / workers.count
    return {
        "weights": width * total,
        "gradients": width * total * (shard if workers.zero_stage >= 2 else 1),
        "fp32 master weights (sharded)": 4 * total * shard,
        "AdamW moments (sharded)": 8 * total * shard,
        "averaged weights (sharded)": 4 * averaged * shard,
    }
