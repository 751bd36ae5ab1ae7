"""How long training stands still for a checkpoint: written behind it, waited for, and DeepSpeed's own.

One worker, stage 1, a network of 8 million values (134 MB of state with the average). Sides take turns in one process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from pipelines.checkpoints import AVERAGE, Run, Shards, newest_checkpoint
from pipelines.storage import Storage
from pipelines.train.checkpointing import Checkpointer
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.engine import Engine

WIDTH, LAYERS, BATCH, STEPS, ROUNDS = 2048, 2, 64, 8, 3


def test_checkpoint_stall(one_worker: None, tmp_path: Path) -> None:
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    engine = Engine(
        "net",
        network,
        optimizer=OptimizerConfig(),
        schedule=ScheduleConfig(images=10**9, checkpoint_images=1),
        batch=BatchConfig(global_size=BATCH, micro_size=BATCH),
        workers=WorkersConfig(),
        ema=EMAConfig(),
    )
    x, seen = torch.randn(BATCH, WIDTH), 0

    def steps() -> None:
        nonlocal seen
        for _ in range(STEPS):
            seen += BATCH
            engine.backward(engine(x).square().mean())
            engine.step(seen)

    run = Storage(str(tmp_path / "run"))
    checkpointer = Checkpointer(run, 1, check=lambda: None)

    def behind() -> None:
        checkpointer.save({"net": engine}, seen, seen)

    def waited() -> None:
        checkpointer.save({"net": engine}, seen, seen)
        checkpointer.finish()

    def theirs() -> None:
        engine._engine.save_checkpoint(str(tmp_path / "theirs"), tag="state")
        assert engine.ema is not None
        torch.save(engine.ema.state_dict(), tmp_path / "ema.pt")

    def nothing() -> None:
        pass

    sides: dict[str, Callable[[], None]] = {
        "none": nothing,
        "ours, behind training": behind,
        "ours, waited for": waited,
        "DeepSpeed's and torch.save": theirs,
    }
    stalls: dict[str, list[float]] = {name: [] for name in sides}
    totals: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):  # the first round fills buffers
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            stalls[name].append(time.perf_counter() - begun)
            steps()
            totals[name].append(time.perf_counter() - begun)
            checkpointer.finish()
    waited()
    newest = newest_checkpoint(run)
    assert newest is not None
    assert engine.ema is not None
    written = Shards(run.folder(newest), "net").read(AVERAGE, Run("0.weight", 0, WIDTH * WIDTH))
    assert torch.equal(written, engine.ema.shadow[0][: WIDTH * WIDTH])
    theirs()
    saved = torch.load(tmp_path / "ema.pt", weights_only=True)["shadow"][0]
    assert torch.equal(saved, engine.ema.shadow[0])
    for what, times in (("training stands still, s", stalls), (f"with {STEPS} steps after it, s", totals)):
        print(f"\n{what}")
        for name, seconds in times.items():
            kept = seconds[1:]
            print(f"  {name:<28} {statistics.median(kept):7.3f}  ({min(kept):.3f} to {max(kept):.3f})")
