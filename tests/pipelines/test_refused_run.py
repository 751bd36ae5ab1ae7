"""What the loop does about a step that a guard has refused: the record is there before anybody ends."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.storage import Storage
from pipelines.train import loop
from pipelines.train.config import GuardConfig
from pipelines.train.guard import Guard
from pipelines.train.plan import PlannedBatch

PLANNED = PlannedBatch((64, 64), np.array([[0, 1], [0, 2]]))


class Judged:
    """An engine that has judged its step."""

    def __init__(self, guard: Guard, loss: float) -> None:
        self.guard, self._reason = guard, guard.judge(loss, 1.0)

    def refusal(self) -> str | None:
        return self._reason


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def accepted(run: Storage, monkeypatch, *engines: tuple[Guard, float]) -> tuple[bool, list[str]]:
    """Whether training goes on, and what the driver is told."""
    told: list[str] = []
    board = SimpleNamespace(end=SimpleNamespace(remote=told.append))
    monkeypatch.setattr(loop.ray, "get", lambda answer: answer)
    task = SimpleNamespace(reader=SimpleNamespace(names=lambda rows: [f"row {row}" for _, row in rows]))
    training: Any = SimpleNamespace(output=run, board=board)
    named: Any = {f"net{number}": Judged(guard, loss) for number, (guard, loss) in enumerate(engines)}
    return loop._accepted(named, task, PLANNED, 16, training), told  # type: ignore[arg-type]


def test_a_step_that_was_taken_leaves_nothing(tmp_path, monkeypatch):
    run = Storage(str(tmp_path))
    assert accepted(run, monkeypatch, (Guard(GuardConfig()), 1.0)) == (True, [])
    assert run.list() == []


def test_a_skipped_step_is_recorded_and_printed_and_training_goes_on(tmp_path, monkeypatch, capsys):
    run = Storage(str(tmp_path))
    fine, broken = Guard(GuardConfig()), Guard(GuardConfig())
    assert accepted(run, monkeypatch, (fine, 1.0), (broken, float("nan"))) == (True, [])
    (file,) = run.list("refused_steps")
    record = run.read_json(file.name)
    assert (record["reasons"], record["rows"]) == ({"net1": "loss is nan"}, ["row 1", "row 2"])
    printed = capsys.readouterr().out
    assert f"the step to 16 images was refused: net1: loss is nan. Its rows are in {tmp_path}/{file.name}" in printed


def test_the_driver_is_told_why_a_run_ends(tmp_path, monkeypatch):
    goes_on, told = accepted(Storage(str(tmp_path)), monkeypatch, (Guard(GuardConfig(action="stop")), float("inf")))
    assert not goes_on
    assert told[0].startswith("the step to 16 images was refused: net0: loss is inf")
