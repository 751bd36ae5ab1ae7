"""The engine against plain torch: two workers under ZeRO do what one process does with AdamW and an average."""

from __future__ import annotations

import math
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from model.ema import EMA
from pipelines.checkpoints import averaged_weights
from pipelines.storage import Storage
from pipelines.train.config import (
    BatchConfig,
    EMAConfig,
    GuardConfig,
    OptimizerConfig,
    ScheduleConfig,
    WorkersConfig,
)

STEPS, GLOBAL, WORLD = 4, 8, 2
OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1, warmup_images=16, decay_images=16, clip_norm=0.5)
SCHEDULE = ScheduleConfig(images=STEPS * GLOBAL, checkpoint_images=GLOBAL)
HALFLIFE = 20


def network() -> nn.Module:
    torch.manual_seed(0)  # values that bfloat16 does not hold
    return nn.Sequential(nn.Linear(5, 7), nn.SiLU(), nn.Linear(7, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(GLOBAL, 5, generator=generator), torch.randn(GLOBAL, 3, generator=generator)) for _ in range(STEPS)
    ]


def by_hand() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and averaged weights of the same training without DeepSpeed."""
    model = network()
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)
    average = EMA([p.data for p in parameters], HALFLIFE)
    for step, (x, y) in enumerate(batches()):
        seen = (step + 1) * GLOBAL
        left = SCHEDULE.images - seen + GLOBAL
        for group in adamw.param_groups:
            group["lr"] = OPTIMIZER.lr * min(1, seen / OPTIMIZER.warmup_images, left / OPTIMIZER.decay_images)
        adamw.zero_grad()
        (model(x) - y).square().mean(1).mean().backward()
        nn.utils.clip_grad_norm_(parameters, OPTIMIZER.clip_norm)
        adamw.step()
        average.update([p.data for p in parameters], seen, GLOBAL)
    return [p.detach() for p in parameters], average.shadow


def worker(rank: int, port: int, folder: str) -> None:
    """All cases in one pair of processes: starting them takes longer than the cases."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = str(WORLD)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    for stage, micro, dtype in (
        (1, 4, "float32"),
        (2, 4, "float32"),
        (2, 2, "float32"),
        (1, 4, "bfloat16"),
        (2, 4, "bfloat16"),
    ):
        name = f"{stage}-{micro}-{dtype}"
        start = new_engine(stage, micro, dtype).full_weights()
        shared = Path(folder, name)
        engine = train(new_engine(stage, micro, dtype), micro, rank, 0, STEPS)
        weights = engine.full_weights()
        with engine.averaged() as averaged:
            seen_inside = [p.detach().float().clone() for p in averaged.parameters()]
            average = engine.full_weights()
        again = engine.full_weights()
        engine.save(Path(folder, f"{name}-end"))
        half = train(new_engine(stage, micro, dtype), micro, rank, 0, STEPS // 2)
        half.save(shared)
        torch.distributed.barrier()
        resumed = new_engine(stage, micro, dtype)
        resumed.load(shared)
        train(resumed, micro, rank, STEPS // 2, STEPS)
        resumed_weights = resumed.full_weights()
        with resumed.averaged():
            resumed_average = resumed.full_weights()
        torch.distributed.barrier()
        if rank == 0:
            found = {
                "checkpoint": averaged_weights(Storage(f"{folder}/{name}-end"), "net", network().to("meta")),
                "start": start,
                "weights": weights,
                "average": average,
                "inside": seen_inside,
                "again": again,
                "resumed": resumed_weights,
                "resumed_average": resumed_average,
            }
            torch.save(found, Path(folder, f"{name}.pt"))
    norms = {stage: norm_of_unequal_passes(stage) for stage in (1, 2)}
    refused = [refusals(stage, dtype, rank) for stage, dtype in ((1, "float32"), (2, "float32"), (1, "bfloat16"))]
    torch.save(refused, Path(folder, f"refused-{rank}.pt"))
    if rank == 0:
        torch.save(norms, Path(folder, "norms.pt"))
    torch.distributed.destroy_process_group()


def refusals(stage: int, dtype: str, rank: int) -> list[tuple[str | None, bool, bool]]:
    """For each of five steps: why it was refused, whether anything changed, and whether the run ends.

    Worker 1's loss is no number in the first, before any step was taken, and in the fourth and fifth; in the third it
    is a thousand times what it was.
    """
    guard = GuardConfig(spike_factor=100, window_steps=1, most_in_a_row=3)
    engine = new_engine(stage, 4, dtype, replace(OPTIMIZER, guard=guard))
    found = []
    x, y = batches()[0]
    part = slice(rank * 4, rank * 4 + 4)
    for step, factor in enumerate((math.nan, 1.0, 1e3, math.nan, math.nan)):
        before = state_of(engine)
        loss = (engine(x[part].to(next(engine.network.parameters()).dtype)).float() - y[part]).square().mean()
        engine.backward(loss * factor if rank == 1 else loss)
        engine.step((step + 1) * GLOBAL)
        changed = not all(torch.equal(a, b) for a, b in zip(before, state_of(engine), strict=True))
        found.append((engine.refusal(), changed, engine.guard.ends_the_run))
    return found


def state_of(engine) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Copies of all that a step changes: weights in both types, moments, average."""
    moments = engine._engine.basic_optimizer.state
    kept = [value for master in engine._masters() for _, value in sorted(moments[master].items())] or [
        torch.zeros(())
    ] * 3
    return [
        value.detach().clone()
        for value in (*engine.network.parameters(), *engine._masters(), *engine.ema.shadow, *kept)
    ]


def norm_of_unequal_passes(stage: int) -> float:
    """Norm of a gradient that is the mean over passes of 1 and three times 2^-9, which bf16 does not add to 1."""
    from pipelines.train.engine import Engine

    engine = Engine(
        "net",
        nn.Linear(1, 1, bias=False),
        optimizer=OPTIMIZER,
        schedule=SCHEDULE,
        batch=BatchConfig(global_size=4 * WORLD, micro_size=1),
        workers=WorkersConfig(count=WORLD, zero_stage=stage, dtype="bfloat16"),  # type: ignore[arg-type]
        ema=None,
    )
    for value in (1.0, 2**-9, 2**-9, 2**-9):
        engine.backward(engine(torch.tensor([[value]], dtype=torch.bfloat16)).float().mean())
        engine.step(4 * WORLD)
    return engine.gradient_norm()


def new_engine(stage: int, micro: int, dtype: str, optimizer: OptimizerConfig = OPTIMIZER):  # type: ignore[no-untyped-def]
    from pipelines.train.engine import Engine

    return Engine(
        "net",
        network().train(),
        optimizer=optimizer,
        schedule=SCHEDULE,
        batch=BatchConfig(global_size=GLOBAL, micro_size=micro),
        workers=WorkersConfig(count=WORLD, zero_stage=stage, dtype=dtype),  # type: ignore[arg-type]
        ema=EMAConfig(halflife_images=HALFLIFE),
    )


def train(engine, micro: int, rank: int, first: int, last: int):  # type: ignore[no-untyped-def]
    share = GLOBAL // WORLD
    dtype = next(engine.network.parameters()).dtype
    for step, (x, y) in list(enumerate(batches()))[first:last]:
        for start in range(rank * share, (rank + 1) * share, micro):
            part = slice(start, start + micro)
            loss = (engine(x[part].to(dtype)).float() - y[part]).square().mean(1)
            engine.backward(loss.mean())
            engine.step((step + 1) * GLOBAL)
    return engine


@pytest.fixture(scope="module")
def trained() -> dict[str, dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (port, folder), nprocs=WORLD)
        return {path.stem: torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("case", ["1-4-float32", "2-4-float32", "2-2-float32"])
def test_equals_plain_adamw_with_its_schedule_clipping_and_average(trained: dict, case: str) -> None:
    weights, average = by_hand()
    for ours, theirs in zip(trained[case]["weights"].values(), weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(trained[case]["average"].values(), average, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["1-4-bfloat16", "2-4-bfloat16"])
def test_bfloat16_keeps_fp32_weights_near_those_of_fp32(trained: dict, case: str) -> None:
    weights, _ = by_hand()
    for ours, theirs in zip(trained[case]["weights"].values(), weights, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)  # three decimals of bf16, through Adam


@pytest.mark.parametrize("case", [0, 1, 2])
def test_a_refused_step_changes_nothing_on_any_worker(trained: dict, case: int) -> None:
    ours, theirs = (trained[f"refused-{rank}"][case] for rank in range(WORLD))
    assert ours == theirs
    reasons, changed, ends = zip(*ours, strict=True)
    assert [bool(reason) for reason in reasons] == [True, False, True, True, True]
    assert "loss is nan" in reasons[0]
    assert "above 100 times its mean" in reasons[2]
    assert changed == (False, True, False, False, False)
    assert ends == (False, False, False, False, True)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_passes_are_summed_in_fp32(trained: dict, stage: int) -> None:
    assert trained["norms"][stage] == pytest.approx((1 + 3 * 2**-9) / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "share", "expected"),
    [
        ("linear", 0.0, [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.5, 1.0, 1.0, 1.0, 0.875, 0.75, 0.625]),
        ("cosine", 0.0, [0.5, 1.0, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("cosine", 0.5, [0.5, 1.0, 1.0, 1.0, 0.926777, 0.75, 0.573223]),
    ],
)
def test_the_rate_rises_stays_and_falls_to_its_share(shape: str, share: float, expected: list[float]) -> None:
    from pipelines.train.engine import learning_rate

    config = OptimizerConfig(
        lr=2.0,
        warmup_images=16,
        decay_images=32,
        decay_shape=shape,  # type: ignore[arg-type]
        final_lr_share=share,
    )
    steps = range(8, 64, 8)
    rates = [learning_rate(config, seen, 56 - seen + 8) / 2.0 for seen in steps]
    assert rates == pytest.approx(expected, rel=1e-5)
    constant = OptimizerConfig(lr=2.0, decay_shape=shape, final_lr_share=share)  # type: ignore[arg-type]
    assert {learning_rate(constant, seen, 56 - seen + 8) for seen in steps} == {2.0}


@pytest.mark.parametrize("case", ["1-4-float32", "2-4-float32", "1-4-bfloat16", "2-4-bfloat16"])
def test_training_starts_from_the_weights_to_the_last_digit(trained: dict, case: str) -> None:
    for ours, theirs in zip(trained[case]["start"].values(), network().parameters(), strict=True):
        assert torch.equal(ours, theirs.detach())


@pytest.mark.parametrize("case", ["1-4-float32", "2-4-float32", "1-4-bfloat16", "2-4-bfloat16"])
def test_averaged_weights_are_in_place_inside_and_gone_after(trained: dict, case: str) -> None:
    found = trained[case]
    for inside, average in zip(found["inside"], found["average"].values(), strict=True):
        rounded = average.to(torch.bfloat16).float() if "bfloat16" in case else average
        assert torch.equal(inside, rounded)
    for name, before in found["weights"].items():
        assert torch.equal(before, found["again"][name])
        assert not torch.equal(before, found["average"][name])


@pytest.mark.parametrize("case", ["1-4-float32", "2-4-float32", "2-2-float32", "1-4-bfloat16", "2-4-bfloat16"])
def test_two_and_two_steps_equal_four(trained: dict, case: str) -> None:
    for name, average in trained[case]["average"].items():
        assert torch.equal(average, trained[case]["resumed_average"][name])
        assert torch.equal(trained[case]["weights"][name], trained[case]["resumed"][name])


@pytest.mark.parametrize("case", ["1-4-float32", "2-4-float32", "2-2-float32", "1-4-bfloat16", "2-4-bfloat16"])
def test_a_checkpoint_holds_the_average_for_any_reader(trained: dict, case: str) -> None:
    found = trained[case]
    assert found["checkpoint"].keys() == found["average"].keys()
    for name, average in found["average"].items():
        assert torch.equal(found["checkpoint"][name], average)
