"""That the script for a GPU's training steps works; its figures come from the script itself, on a GPU."""

from __future__ import annotations

import pytest

from tests.benchmarks.gpu_training import Shape, measure, report


@pytest.mark.usefixtures("one_thread", "one_worker")
def test_sides_take_steps_and_begin_with_the_same_loss() -> None:
    shape = Shape(device="cpu", preset="tiny-base", pixels=64, images=2, compiled=False, steps=1)
    sides = ("plain", "zero-2 offloaded", "fed")
    rows = [measure(side, shape) for side in sides]
    plain, offloaded, _ = rows
    assert offloaded.loss == pytest.approx(plain.loss, rel=1e-4)
    text = report(rows, shape)
    assert all(f"| {side} |" in text for side in sides)
