"""A training step on one device: a plain loop, our engine under each ZeRO stage, and the loop fed from a dataset.

    python tests/benchmarks/gpu_training.py                                   # on a GPU: base, 1024 px, bf16, compiled
    python tests/benchmarks/gpu_training.py --device cpu --preset tiny-base   # small, for trying it

Each side is a process of its own, one after another, since each fills a GPU with its state: the peaks are its own. All
begin with the same weights and see the same inputs, and the loss of their first steps is compared. It has run on CPUs
only: no GPU was there when it was written.

- plain: forward and backward of the network in bf16, fused AdamW on fp32 masters, weights written back;
- zero-0 to zero-3, zero-2 offloaded: the same inputs through the engine, which also clips, guards and averages;
- step: the loop's step under ZeRO 1 from a batch that is held: draws, conditioning and curves as well;
- fed: the same from a latents dataset in the temporary folder, through the loader.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from torch import nn

from model.config import UNET_PRESETS, VAE_PRESETS
from model.speed import compile_blocks
from model.unet import UNet
from pipelines.config import TextWeightsConfig, WeightsConfig
from pipelines.preprocess.pipeline import LATENTS_COMPRESSION
from pipelines.preprocess.write import write_rows
from pipelines.schema import SCHEMA_VERSION, Column, DataFile, write_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import Batch, Slices
from pipelines.train.config import (
    BatchConfig,
    DenoiserTaskConfig,
    EMAConfig,
    OptimizerConfig,
    ScheduleConfig,
    WorkersConfig,
)
from pipelines.train.denoiser import DenoiserTask
from pipelines.train.engine import Engine
from pipelines.train.meter import Meter
from pipelines.train.operations import Operations, peak_tflops
from pipelines.train.plan import Plan
from tests.benchmarks.gpu_networks import built, inputs_of
from tests.benchmarks.test_latent_store import table

SIDES = ("plain", "zero-0", "zero-1", "zero-2", "zero-3", "zero-2 offloaded", "step", "fed")
OPTIMIZER = OptimizerConfig(lr=1e-6)
FILES, WARM_UP = 4, 3


@dataclass(frozen=True)
class Shape:
    """What all sides train."""

    device: str
    preset: str
    pixels: int
    images: int  # of a step, in one pass
    compiled: bool
    steps: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def down(self) -> int:
        return VAE_PRESETS["sdxl"].downsample


@dataclass(frozen=True)
class Row:
    """A side's line of the table; `loss` is of its first step."""

    side: str
    seconds: tuple[float, ...]
    loss: float
    peak_gib: float | None


def network_of(shape: Shape) -> UNet:
    network = built(UNet, UNET_PRESETS[shape.preset], shape.device, torch.float32)
    assert isinstance(network, UNet)
    if shape.compiled:
        compile_blocks(network)
    return network.train()


def plain(shape: Shape) -> Callable[[], torch.Tensor]:
    """A step of a loop that does no more than it must."""
    network = network_of(shape)
    masters = [weight.detach().clone() for weight in network.parameters()]
    network = network.to(shape.dtype)
    weights = list(network.parameters())
    adamw = torch.optim.AdamW(masters, lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay, fused=True)
    inputs, target = given(shape)

    def step() -> torch.Tensor:
        loss = F.mse_loss(network(*inputs).float(), target)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        adamw.step()
        adamw.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)
        return loss

    return step


def given(shape: Shape) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Inputs of the network, and a target."""
    side = shape.pixels // shape.down
    inputs = inputs_of(UNET_PRESETS[shape.preset], shape.images, (side, side), shape.device, shape.dtype)
    return inputs, inputs[0].float().flip(0)


def engine_of(shape: Shape, network: nn.Module, stage: int, offload: bool) -> Engine:
    batch = BatchConfig(global_size=shape.images, micro_size=shape.images)
    workers = WorkersConfig(
        gpu=shape.device == "cuda",
        zero_stage=stage,  # type: ignore[arg-type]
        offload_optimizer=offload,
        dtype="bfloat16" if shape.dtype == torch.bfloat16 else "float32",
    )
    schedule = ScheduleConfig(images=10**9, checkpoint_images=1)
    return Engine(
        "unet", network, optimizer=OPTIMIZER, schedule=schedule, batch=batch, workers=workers, ema=EMAConfig()
    )


def through_engine(shape: Shape, stage: int, offload: bool) -> Callable[[], torch.Tensor]:
    """A step of the engine on inputs that are there."""
    engine, seen = engine_of(shape, network_of(shape), stage, offload), 0
    inputs, target = given(shape)

    def step() -> torch.Tensor:
        nonlocal seen
        seen += shape.images
        loss = F.mse_loss(engine(*inputs).float(), target)
        engine.backward(loss)
        engine.step(seen)
        assert engine.refusal() is None
        return loss

    return step


class InTheLoop:
    """The loop's step: from a worker's part of a batch, by its task, engine and meter."""

    def __init__(self, task: DenoiserTask, engine: Engine) -> None:
        self._task, self._engines, self._meter, self._seen = task, {"unet": engine}, Meter(), 0

    def __call__(self, passes: list[tuple[Batch, float]]) -> torch.Tensor:
        """The loss of the last pass."""
        self._seen += sum(part.count for part, _ in passes)
        for part, weight in passes:
            self._meter.saw(part.count, part.bucket)
            for loss in self._task.losses(self._engines, part):
                self._engines["unet"].backward(loss.per_sample.mean() * weight)
                self._engines["unet"].step(self._seen)
                self._meter.add(loss, weight)
        assert self._engines["unet"].refusal() is None
        return loss.per_sample.mean()


def in_the_loop(shape: Shape, folder: str, held: bool) -> Callable[[], torch.Tensor]:
    """The loop's step, from one batch that is held or from the loader."""
    write_dataset(shape, folder)
    batch = BatchConfig(global_size=shape.images, micro_size=shape.images, shuffle_rows=shape.images * FILES)
    config = DenoiserTaskConfig(
        unet=WeightsConfig(preset=shape.preset),
        latents=folder,
        vae=WeightsConfig(preset="sdxl"),
        text=TextWeightsConfig(preset="tiny", seed=0),
    )
    task = DenoiserTask(config, batch, "", StorageOptions(), torch.device(shape.device))
    network = task.networks()["unet"].to(shape.device).train()
    if shape.compiled:
        compile_blocks(network)
    step = InTheLoop(task, engine_of(shape, network, 1, False))
    passes = iter(Slices(task.reader, Plan(task.reader.files, batch), 0, 1, 0))
    kept = next(passes)
    return lambda: step(kept if held else next(passes))


def write_dataset(shape: Shape, folder: str) -> None:
    """Latents of random values, of one bucket, FILES files of two steps each."""
    config, side, dataset = UNET_PRESETS[shape.preset], shape.pixels // shape.down, Storage(folder)
    latent = (config.latent_channels, side, side)
    shapes = {Column.LATENT_MEAN: latent, Column.LATENT_STD: latent, Column.CONTEXT: (77, config.context_dim)}
    shapes[Column.POOLED] = (config.pooled_dim,)
    bucket, rows, files = (shape.pixels, shape.pixels), 2 * shape.images, []
    for number in range(FILES):
        name = f"data/x/{bucket[0]}x{bucket[1]}/{number}.parquet"
        write_rows(table(number, rows, shapes, bucket), dataset, name, LATENTS_COMPRESSION)
        files.append(DataFile(name=name, rows=rows, bucket=bucket))
    fingerprint = {"schema": SCHEMA_VERSION, "stored_text": "embeddings"}
    facts = {"vae": {"scaling_factor": VAE_PRESETS["sdxl"].scaling_factor}}
    write_manifest(dataset, files, kind="latents", counts={}, fingerprint=fingerprint, parents={}, facts=facts)


def measure(side: str, shape: Shape) -> Row:
    """Steps of one side, in a process group of this process, after some that compile and warm up."""
    with tempfile.TemporaryDirectory() as folder:
        if side == "plain":
            step = plain(shape)
        elif side.startswith("zero"):
            step = through_engine(shape, int(side[5]), side.endswith("offloaded"))
        else:
            step = in_the_loop(shape, folder, held=side == "step")
        first = float(step().detach())
        for _ in range(WARM_UP):
            step()
        seconds = []
        if shape.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(shape.steps):
            _wait(shape.device)
            begun = time.perf_counter()
            step()
            _wait(shape.device)
            seconds.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() / 2**30 if shape.device == "cuda" else None
    return Row(side, tuple(seconds), first, peak)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def report(rows: list[Row], shape: Shape) -> str:
    """The rows in Markdown; MFU counts no operation twice that checkpointing would repeat."""
    config = UNET_PRESETS[shape.preset]
    operations = Operations(config, shape.down)((shape.pixels, shape.pixels)) * shape.images
    peak = peak_tflops(None, torch.device(shape.device), str(shape.dtype).removeprefix("torch."))
    bare = next((statistics.median(row.seconds) for row in rows if row.side == "plain"), None)
    lines = [
        "| side | ms | least to greatest | images/s | MFU | peak GiB | rate of the plain loop's |",
        "|" + "---|" * 7,
    ]
    for row in rows:
        median = statistics.median(row.seconds)
        mfu = f"{operations / median / peak / 1e12:.3f}" if peak else ""
        gib = f"{row.peak_gib:.1f}" if row.peak_gib else ""
        ratio = f"{bare / median:.3f}" if bare else ""
        spread = f"{min(row.seconds) * 1e3:.1f} to {max(row.seconds) * 1e3:.1f}"
        lines.append(
            f"| {row.side} | {median * 1e3:.1f} | {spread} | {shape.images / median:.2f} | {mfu} | {gib} | {ratio} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the sides, one process each, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=tuple(UNET_PRESETS), default="base")
    parser.add_argument("--pixels", type=int, help="side of the images; 1024, or 128 for a tiny network")
    parser.add_argument("--images", type=int, help="of a step, in one pass; 8, or 2 for a tiny network")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--json", type=Path, help="where the rows are written as well")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu --preset tiny-base runs without one")
    tiny = options.preset.startswith("tiny")
    pixels, images = options.pixels or (128 if tiny else 1024), options.images or (2 if tiny else 8)
    shape = Shape(options.device, options.preset, pixels, images, not options.eager, options.steps)
    if options.alone:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # which DeepSpeed asks for
        backend = "nccl" if options.device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
        options.json.write_text(json.dumps(asdict(measure(options.alone, shape))))
        return
    rows, failed = [], []
    for side in options.sides:
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "row.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--alone", side, "--json", str(told)]
            ended = subprocess.run(command, check=False, capture_output=True, text=True)
            if ended.returncode:  # the others may fit
                failed.append(side)
                print(f"{side} failed: {ended.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            found = json.loads(told.read_text())
        rows.append(Row(**found | {"seconds": tuple(found["seconds"])}))
        print(f"{side}: {statistics.median(rows[-1].seconds):.3f} s a step, first loss {rows[-1].loss:.4f}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    losses = [row.loss for row in rows if row.side == "plain" or row.side.startswith("zero")]
    assert not losses or max(losses) - min(losses) < 0.01 * max(losses), "the sides do not compute the same"
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    how = "eager" if options.eager else "compiled"
    print(f"\n{name}, torch {torch.__version__}, {options.preset}, {images} images of {pixels} px, {how}\n")
    print(report(rows, shape))
    if failed:
        sys.exit(f"\nfailed, and not in the table: {', '.join(failed)}")


if __name__ == "__main__":
    main()
