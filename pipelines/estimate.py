"""What a run needs, before it starts: parameters of each preset, and memory of each worker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from model.config import DISCRIMINATOR_PRESETS, TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS
from model.text import TextEncoders
from model.unet import UNet
from model.vae import VAE
from model.vae_loss import PatchDiscriminator
from pipelines.train.config import DenoiserTaskConfig, VAETaskConfig, WorkersConfig
from pipelines.train.sharded import GATHERED_VALUES

NETWORKS: Mapping[str, Callable[[str], nn.Module]] = {
    "unet": lambda preset: UNet(UNET_PRESETS[preset]),
    "vae": lambda preset: VAE(VAE_PRESETS[preset]),
    "text": lambda preset: TextEncoders(TEXT_PRESETS[preset]),
    "discriminator": lambda preset: PatchDiscriminator(DISCRIMINATOR_PRESETS[preset]),
}
GPU_SIZES = (16, 24, 32, 40, 48, 80, 96, 141)  # GiB, roughly, of GPUs that are sold
FULL_MOMENT_BYTES = 8.0  # of a parameter, in fp32
BUCKET_VALUES, LIVE_VALUES = 500_000_000, 1_000_000_000  # DeepSpeed's reduce_bucket_size and stage3_max_live_parameters


def parameters(network: str, preset: str) -> int:
    """Parameters of a preset, counted on the built network without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[network](preset).parameters())


def trained_parameters(task: DenoiserTaskConfig | VAETaskConfig) -> dict[str, int]:
    """Parameters of the networks that a task trains; the averaged one first."""
    if isinstance(task, DenoiserTaskConfig):
        return {"unet": parameters("unet", task.unet.preset)}
    return {
        "vae": parameters("vae", task.vae.preset),
        "discriminator": parameters("discriminator", task.discriminator),
    }


def readable(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


@dataclass(frozen=True)
class Memory:
    """Bytes of each worker by purpose, without activations: they depend on the batch, the bucket and checkpointing."""

    device: Mapping[str, float]
    """On the GPU."""
    host: Mapping[str, float]
    """Beside it: what is offloaded, and the copy that is written as a checkpoint."""

    @property
    def fits(self) -> int | None:
        """The smallest usual GPU, GiB, that holds the device's part with a tenth to spare; None if none does."""
        needed = sum(self.device.values()) * 1.1 / 2**30
        return next((size for size in GPU_SIZES if size >= needed), None)


def memory_per_worker(
    networks: Mapping[str, int], workers: WorkersConfig, moment_bytes: float = FULL_MOMENT_BYTES
) -> Memory:
    """What each worker needs, from the parameters of the networks that train; the first one is averaged.

    `moment_bytes` are those of both moments of a parameter.

    It follows where DeepSpeed keeps what: under bf16 gradients are summed in fp32 beside those of the pass, under fp32
    the weights of stages 0 and 3 are those that the optimizer updates, and stage 3 puts a part of the weights together
    at a time. A bucket of gradients is sent in fp32 from a flat copy. The averaged network is put together while it is
    validated and sampled from, when activations are not there. PyTorch rounds pinned memory up to a power of two.
    """
    total, averaged, stage = sum(networks.values()), next(iter(networks.values())), workers.zero_stage
    half = workers.dtype == "bfloat16"
    width, part = (2 if half else 4), 1 / workers.count
    shard = part if stage else 1.0
    gradients = {0: 6.0 if half else 4.0, 1: 6.0 if half else 4.0, 2: 4 * part, 3: 4 * part}[stage]
    sent_half = (4, 4, 2 + 2 + 4, 2 + 4)  # stage 2: the bucket, flat, and in fp32
    sent_full = (4, 4 + 4, 4 + 4, 4)
    device = {
        "weights": width * total * (part if stage == 3 else 1),
        "gradients": total * gradients,
        "communication": min(total, BUCKET_VALUES) * (sent_half if half else sent_full)[stage],
        "weights gathered at a time": width * min(total, LIVE_VALUES) if stage == 3 else 0.0,
        "averaged network at times": width * averaged + 4 * min(averaged, GATHERED_VALUES),
    }
    state = {
        "fp32 weights of the optimizer": 4 * total * shard if half or stage in (1, 2) else 0.0,
        "AdamW moments": moment_bytes * total * shard,
        "averaged weights": 4 * averaged * shard,
    }
    written = [4 * count * part for count in (*networks.values(),) * 3] + [4 * averaged * part]  # each a buffer
    host = {"checkpoint's copy": float(sum(_pinned(size) if workers.gpu else size for size in written))}
    if moment_bytes < FULL_MOMENT_BYTES:
        host["moments as values, for a checkpoint"] = FULL_MOMENT_BYTES * max(networks.values()) * part
    if workers.offload_optimizer:
        if stage == 3:
            device["gradients"] = 0.0
            state["fp32 weights of the optimizer"] = 4 * total * shard
        host |= state | {"gradients": 4 * total * part}
    else:
        device |= state
    return Memory({name: size for name, size in device.items() if size}, host)


def _pinned(size: float) -> float:
    return float(1 << math.ceil(math.log2(size)))


def memory_by_stage(
    networks: Mapping[str, int],
    workers: WorkersConfig,
    stages: Sequence[Literal[0, 1, 2, 3]],
    moment_bytes: float = FULL_MOMENT_BYTES,
) -> dict[str, Memory]:
    """What each worker needs under each ZeRO stage, and with the optimizer offloaded where that is possible."""
    found = {}
    for stage in stages:
        found[f"stage {stage}"] = memory_per_worker(
            networks, replace(workers, zero_stage=stage, offload_optimizer=False), moment_bytes
        )
        if stage > 1:
            found[f"stage {stage}, offloaded"] = memory_per_worker(
                networks, replace(workers, zero_stage=stage, offload_optimizer=True)
            )
    return found
