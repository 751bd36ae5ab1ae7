"""What training at a given size needs: hours, nodes, bytes, requests and money of each stage, before it is bought.

All that can be counted is counted: operations on the networks themselves, bytes on the schema. What had to be measured
stands in UNIT_COSTS with its source and date. What depends on a machine that nobody has measured here, a GPU's share of
its peak above all, and what depends on a contract, a price, is asked of the user.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from annotated_types import Ge, Gt, Le

from model.config import UNET_PRESETS, VAE_PRESETS
from pipelines.config import Amount, Count, Positive
from pipelines.estimate import parameters
from pipelines.schema import latents_schema

HOUR, GB, MONTH_DAYS = 3600.0, 1e9, 30.4
FILE_ROWS, INDEX_FILE_ROWS = 64, 1024  # rows in one file, as encode.rows_per_file and index_rows_per_file have it
LISTED_PER_REQUEST = 1000
ROW_READS = 4.0  # requests for one row of latents: one for each of its tensors (pipelines/latents.py)
STATE_BYTES = 16  # of a parameter in a checkpoint: master weights, two moments, average, all fp32


@dataclass(frozen=True, kw_only=True)
class UnitCost:
    """One measured number."""

    value: float
    """The number."""
    unit: str
    """What it counts."""
    source: str
    """Who measured it, on what."""
    date: str
    """When."""


COUNTED = "torch.utils.flop_counter on this repository's networks (2 per multiply-add)"
BENCHMARK = "tests/benchmarks/test_unit_costs.py, CPU time on one core of a shared two-core machine"
MEASURED_MP = {"1mp": 1024 * 1024 / 1e6, "12mp": 12.0}  # sizes of the JPEG files, megapixels
UNIT_COSTS: Mapping[str, UnitCost] = {
    "index_1mp": UnitCost(value=0.0104, unit="core-seconds per image", source=BENCHMARK, date="2026-11"),
    "index_12mp": UnitCost(value=0.0955, unit="core-seconds per image", source=BENCHMARK, date="2026-11"),
    "crop_1mp": UnitCost(value=0.0093, unit="core-seconds per image", source=BENCHMARK, date="2026-11"),
    "crop_12mp": UnitCost(value=0.116, unit="core-seconds per image", source=BENCHMARK, date="2026-11"),
    "index_row_bytes": UnitCost(value=103, unit="bytes per image in the index", source=BENCHMARK, date="2026-11"),
    "text_tflop": UnitCost(value=0.1112, unit="TFLOP per caption, both text encoders", source=COUNTED, date="2026-11"),
}
SIDES = (256, 512, 1024)  # pixels, at which operations were counted
TFLOP: Mapping[str, tuple[float, float, float]] = {  # per image at each of them; training is forward and backward
    "vae_encode": (0.27272, 1.11666, 4.87895),
    "vae_train": (2.68473, 10.89353, 46.04803),  # three times encoding and decoding; the discriminator is not in it
    "base": (1.23084, 4.71375, 20.23084),
    "refiner": (1.19954, 4.83713, 21.83698),
}
RECOMPUTED = 4 / 3  # activation checkpointing runs the forward pass once more


@dataclass(frozen=True, kw_only=True)
class Published:
    """Training that somebody reported."""

    what: str
    gpu_hours: float
    dollars: float
    peak_tflops: float
    tflop: float
    source: str

    @property
    def utilization(self) -> float:
        """Share of the GPUs' peak that the report amounts to."""
        return self.tflop / (self.gpu_hours * HOUR * self.peak_tflops)


PUBLISHED = Published(
    what="Stable Diffusion 2's U-Net (866 M parameters) on 2.87 billion samples",
    gpu_hours=13_165,
    dollars=39_511,
    peak_tflops=312.0,  # A100, dense bf16, NVIDIA's data sheet
    # 550,000 steps at 256 and 850,000 at 512 pixels, of 2048; operations counted on diffusers' network of that shape
    tflop=550_000 * 2048 * 0.53931 + 850_000 * 2048 * 2.40874,
    source='Anyscale, "Reducing the Cost of Pre-training Stable Diffusion by 3.7x"; steps of the SD 2 base model card',
)


@dataclass(frozen=True, kw_only=True)
class CPUPool:
    """Machines that decode."""

    cores: Count
    """Cores at work at the same time."""
    cores_per_node: Count
    """Cores of one machine."""
    price: Positive
    """Price of a core for an hour."""


@dataclass(frozen=True, kw_only=True)
class GPUPool:
    """GPUs of one kind."""

    count: Count
    """GPUs at work at the same time."""
    per_node: Count
    """GPUs of one machine."""
    peak_tflops: Positive
    """Peak of one GPU in the type that is computed in, dense, from its data sheet."""
    utilization: Annotated[float, Gt(0), Le(1)]
    """Share of the peak that is reached, from a run of your own. There is no default: none was measured here."""
    price: Positive
    """Price of a GPU for an hour, with its share of the machine."""


@dataclass(frozen=True, kw_only=True)
class Store:
    """An object store: what it gives, and what it asks for."""

    gb_per_second: Positive
    """10^9 bytes that it gives in a second, to all together."""
    requests_per_second: Positive
    """Requests that it answers in a second."""
    gb_month: Annotated[float, Ge(0)]
    """Price of 10^9 bytes for a month."""
    million_reads: Annotated[float, Ge(0)]
    """Price of a million GET requests."""
    million_writes: Annotated[float, Ge(0)]
    """Price of a million PUT and LIST requests."""
    months: Annotated[float, Ge(0)]
    """How long datasets and checkpoints are kept."""


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """One run of one job."""

    kind: Literal["index", "latents", "vae", "base", "refiner"]
    """What runs."""
    resolution: Count = 1024
    """Side of the square that sets the area, pixels."""
    images: Count | None = None
    """Images that it works on; None takes all, or all that are kept."""
    images_seen: Amount = 0
    """Images that training sees; not asked of the others."""
    activation_checkpointing: bool = False
    """Whether training computes activations again."""
    keep_checkpoints: Count = 2
    """Checkpoints that stay."""

    @property
    def name(self) -> str:
        """The stage in words."""
        return self.kind if self.kind == "index" else f"{self.kind} {self.resolution}"


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What a stage needs."""

    name: str
    hours: float
    """Of wall time, on this cluster."""
    nodes: int
    """Machines at work."""
    core_hours: float
    gpu_hours: float
    read_bytes: float
    written_bytes: float
    kept_bytes: float
    """What stays on storage."""
    reads: float
    """Requests."""
    writes: float
    compute_price: float
    """Of all machines of its kinds from its start to its end, be they at work or waiting."""
    storage_price: float
    limit: str
    """What it waits for."""


def tflop(what: str, resolution: int) -> float:
    """TFLOP per image at a resolution: a + b area + c area^2, as convolutions and attention grow."""
    areas = np.square(np.array(SIDES, float) / SIDES[-1])
    return float(np.polyval(np.polyfit(areas, TFLOP[what], 2), (resolution / SIDES[-1]) ** 2))


def latents_row_bytes(resolution: int) -> int:
    """Bytes of the tensors of one row of latents of one caption, by the schema."""
    unet, vae = UNET_PRESETS["base"], VAE_PRESETS["sdxl"]
    side = resolution // vae.downsample
    schema = latents_schema((unet.latent_channels, side, side), (77, unet.context_dim), (unet.pooled_dim,))
    kinds = [field.type.value_type if pa.types.is_list(field.type) else field.type for field in schema]
    return sum(kind.byte_width for kind in kinds if pa.types.is_fixed_size_binary(kind))


def plan_capacity(
    *,
    images: int,
    kept_share: float,
    image_bytes: int,
    image_megapixels: float,
    stages: Sequence[PlannedStage],
    cpu: CPUPool,
    encode_gpu: GPUPool,
    train_gpu: GPUPool,
    store: Store,
) -> list[StageCost]:
    """What each stage needs, in the order given."""
    costs = []
    for stage in stages:
        count = float(stage.images or (images if stage.kind == "index" else images * kept_share))
        cores = gpu_tflop = read = written = keep = reads = writes = 0.0
        pool = encode_gpu if stage.kind == "latents" else train_gpu
        if stage.kind == "index":
            cores = count * _core_seconds("index", image_megapixels) / HOUR
            read, reads = count * image_bytes, count
            written = keep = count * UNIT_COSTS["index_row_bytes"].value
            writes = count / LISTED_PER_REQUEST + count / INDEX_FILE_ROWS
        elif stage.kind == "latents":
            cores = count * _core_seconds("crop", image_megapixels) / HOUR
            gpu_tflop = count * (tflop("vae_encode", stage.resolution) + UNIT_COSTS["text_tflop"].value)
            read, reads = count * image_bytes, count
            written = keep = count * latents_row_bytes(stage.resolution)
            writes = count / FILE_ROWS
        else:
            kind = "vae_train" if stage.kind == "vae" else stage.kind
            again = RECOMPUTED if stage.activation_checkpointing else 1.0
            gpu_tflop = stage.images_seen * tflop(kind, stage.resolution) * again
            reads = stage.images_seen * (1.0 if stage.kind == "vae" else ROW_READS)
            row = image_bytes if stage.kind == "vae" else latents_row_bytes(stage.resolution)
            read = stage.images_seen * float(row)
            written = keep = stage.keep_checkpoints * float(STATE_BYTES * _parameters(stage.kind))
            if stage.kind == "vae":
                cores = stage.images_seen * _core_seconds("crop", image_megapixels) / HOUR
        gpu_hours = gpu_tflop / (pool.peak_tflops * pool.utilization) / HOUR
        limits = {
            "cores": cores / cpu.cores,
            "GPUs": gpu_hours / pool.count,
            "bandwidth": (read + written) / GB / store.gb_per_second / HOUR,
            "requests": (reads + writes) / store.requests_per_second / HOUR,
        }
        limit = max(limits, key=lambda name: limits[name])
        hours = limits[limit]
        held = (cpu.cores if cores else 0) * cpu.price + (pool.count if gpu_hours else 0) * pool.price  # for an hour
        nodes = (math.ceil(pool.count / pool.per_node) if gpu_hours else 0) + (
            math.ceil(cpu.cores / cpu.cores_per_node) if cores else 0
        )
        costs.append(
            StageCost(
                name=stage.name,
                hours=hours,
                nodes=nodes,
                core_hours=cores,
                gpu_hours=gpu_hours,
                read_bytes=read,
                written_bytes=written,
                kept_bytes=keep,
                reads=reads,
                writes=writes,
                compute_price=hours * held,
                storage_price=keep / GB * store.gb_month * store.months
                + reads / 1e6 * store.million_reads
                + writes / 1e6 * store.million_writes,
                limit=limit,
            )
        )
    return costs


def _core_seconds(work: str, megapixels: float) -> float:
    """Of one image: the line through both measured sizes, and in proportion below the smaller."""
    small, large = (UNIT_COSTS[f"{work}_{size}"].value for size in MEASURED_MP)
    first, last = MEASURED_MP.values()
    if megapixels < first:
        return small * megapixels / first
    return small + (large - small) * (megapixels - first) / (last - first)


@cache
def _parameters(kind: str) -> int:
    return parameters("vae" if kind == "vae" else "unet", "sdxl" if kind == "vae" else kind)
