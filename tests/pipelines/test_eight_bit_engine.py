"""Moments of 8 bits under DeepSpeed: steps near plain AdamW's, and a resumed run that equals an unbroken one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipelines.storage import Storage
from pipelines.train.checkpointing import Checkpointer
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.engine import Engine
from tests.in_process import forget_workers

ROWS, WIDTH = 4, 96  # 96 x 96 values: fewer than 4,096 would stay in fp32


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", os.environ.get("MASTER_PORT", "29623"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    forget_workers()  # of other tests in this process
    yield
    torch.distributed.destroy_process_group()
    forget_workers()


def new_engine(implementation: str, stage: int) -> Engine:
    torch.manual_seed(0)
    return Engine(
        "net",
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)).train(),
        optimizer=OptimizerConfig(lr=1e-2, implementation=implementation),  # type: ignore[arg-type]
        schedule=ScheduleConfig(images=100, checkpoint_images=100),
        batch=BatchConfig(global_size=ROWS, micro_size=ROWS),
        workers=WorkersConfig(zero_stage=stage),  # type: ignore[arg-type]
        ema=EMAConfig(halflife_images=8),
    )


def train(engine: Engine, first: int, last: int) -> list[torch.Tensor]:
    """The fp32 weights after the steps."""
    for step in range(first, last):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
        engine.backward((engine(x) - x.roll(1, 1)).square().mean())
        engine.step((step + 1) * ROWS)
    return [weights.detach().clone() for weights in engine.sharded.weights]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_moments_of_8_bits_train_under_each_stage_that_takes_them(stage, tmp_path):
    run = Storage(str(tmp_path))
    plain, engine = train(new_engine("plain", stage), 0, 3), new_engine("8bit", stage)
    for one, other in zip(plain, train(engine, 0, 3), strict=True):
        assert 0 < float((one - other).abs().max()) < 0.01
    largest = max(engine.sharded.weights, key=torch.Tensor.numel)
    assert engine.sharded._optimizer.state[largest]["state1"].dtype == torch.uint8
    checkpointer = Checkpointer(run, 1, lambda: None)
    checkpointer.save({"net": engine}, 3, 3 * ROWS)
    checkpointer.finish()
    unbroken, resumed = train(engine, 3, 5), new_engine("8bit", stage)
    assert Checkpointer(run, 1, lambda: None).restore({"net": resumed}) == 3
    for one, other in zip(unbroken, train(resumed, 3, 5), strict=True):
        assert torch.equal(one, other)
