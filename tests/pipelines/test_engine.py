"""The engine against plain torch, under every ZeRO stage: pairs of workers do what one process does with AdamW and an
average, and what a pair has left four workers take up under another stage."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn

from pipelines.checkpoints import averaged_weights, newest_checkpoint
from pipelines.storage import Storage
from pipelines.train.config import OptimizerConfig
from tests.engine_workers import (
    CASES,
    EXACT,
    HALF,
    MOVES,
    OPTIMIZER,
    UNEVEN,
    WORKERS,
    batches,
    by_hand,
    network,
    parent,
    same,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every worker has found, by case and rank."""
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for probe in (a, b, c):
            probe.bind(("127.0.0.1", 0))
        ports = tuple(probe.getsockname()[1] for probe in (a, b, c))
    folder = tmp_path_factory.mktemp("engine")
    torch.multiprocessing.spawn(parent, (ports, str(folder)))
    return {"folder": folder} | {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


def close(ours: dict[str, torch.Tensor], role: str, theirs: list[torch.Tensor], atol: float = 1e-6) -> None:
    found = [value for name, value in ours.items() if name.startswith(f"{role} ")]
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("case", EXACT)
def test_every_stage_equals_plain_adamw_with_its_schedule_clipping_and_average(trained: dict, case: str) -> None:
    weights, average, losses = by_hand()
    close(trained[f"{case}.0"]["end"], "weights", weights)
    close(trained[f"{case}.0"]["end"], "average", average)
    assert trained[f"{case}.0"]["losses"] == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("case", HALF)
def test_bfloat16_keeps_fp32_weights_near_those_of_fp32(trained: dict, case: str) -> None:
    weights, _, losses = by_hand()
    close(trained[f"{case}.0"]["end"], "weights", weights, atol=1e-2)  # three decimals of bf16, through Adam
    assert trained[f"{case}.0"]["losses"] == pytest.approx(losses, rel=2e-2)


def test_the_unet_learns_alike_with_its_weights_sharded_and_whole(trained: dict) -> None:
    for rank in range(2):
        whole, sharded = (trained[f"others{pair}.{rank}"]["unet"] for pair in range(2))
        assert sharded == pytest.approx(whole, rel=1e-4)
        assert len(set(whole)) == 4  # it does learn


def test_the_vae_learns_alike_with_its_weights_sharded_and_whole(trained: dict) -> None:
    for rank in range(2):
        whole, sharded = (trained[f"others{pair}.{rank}"]["vae"] for pair in range(2))
        assert sharded == pytest.approx(whole, rel=1e-3)
        assert len(set(whole)) == 3 * (2 * 2 + 1) + 1  # losses of both networks in two passes, a step's one factor


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_passes_are_summed_in_fp32(trained: dict, stage: int) -> None:
    norms = trained["others0.0"]["norms"] | trained["others1.0"]["norms"]
    assert norms[stage] == pytest.approx((1 + 3 * 2**-9) / 4, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_training_starts_from_the_weights_to_the_last_digit(trained: dict, case: str) -> None:
    for ours, theirs in zip(trained[f"{case}.0"]["start"].values(), network().parameters(), strict=True):
        assert torch.equal(ours, theirs.detach())
    assert trained[f"{case}.1"]["start"] == {}
    assert trained[f"{case}.0"]["nothing"] == 0


@pytest.mark.parametrize("case", CASES)
def test_averaged_weights_are_in_place_inside_and_training_is_untouched(trained: dict, case: str) -> None:
    for rank in range(2):
        found = trained[f"{case}.{rank}"]
        averages = [value for name, value in found["end"].items() if name.startswith("average ")]
        for inside, average in zip(found["inside"], averages, strict=True):
            assert torch.equal(inside, average.to(inside.dtype))
        assert found["untouched"]
        assert found["called"]
        assert len(found["alone"]) == (0 if rank else len(found["inside"]))
        assert all(map(torch.equal, found["alone"], found["inside"]))


@pytest.mark.parametrize("case", CASES)
def test_two_and_two_steps_equal_four(trained: dict, case: str) -> None:
    for rank in range(2):
        assert trained[f"{case}.{rank}"]["steps"] == 2
        assert trained[f"{case}.{rank}"]["resumed"]


@pytest.mark.parametrize("move", MOVES)
def test_four_workers_take_up_under_another_stage_what_two_have_left(trained: dict, move: tuple[str, str]) -> None:
    name, stage = move
    _, _, losses = by_hand()
    for rank in range(WORKERS):
        found, left = trained[f"moved.{rank}"][f"{name} to {stage}"], trained[f"{name}.0"]
        assert found["steps"] == 2
        assert same(found["half"] | {"output": left["half"]["output"]}, left["half"])  # to the bit
        torch.testing.assert_close(found["half"]["output"], left["half"]["output"])
        assert found["losses"] == pytest.approx(losses[2:], rel=1e-5)
        for key, value in left["end"].items():
            torch.testing.assert_close(found["end"][key], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rows", "micro"), UNEVEN)
def test_workers_that_do_not_divide_a_batch_take_the_step_of_one_process(trained: dict, rows: int, micro: int) -> None:
    model, (x, y) = network(), batches()[0]
    adamw = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.lr / 2, weight_decay=OPTIMIZER.weight_decay)
    (model(x[:rows]) - y[:rows]).square().mean().backward()
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm))
    adamw.step()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    for rank in range(WORKERS):
        for stage in range(4):
            assert trained[f"uneven.{rank}"][f"{stage}-{rows}"] == pytest.approx(
                [norm, float(weights.norm())], rel=1e-5
            )


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_the_average_for_any_reader(trained: dict, case: str) -> None:
    run = Storage(str(trained["folder"] / case))
    newest = newest_checkpoint(run)
    assert newest is not None
    found = averaged_weights(run.folder(newest), "net", network().to("meta"))
    for name, average in found.items():
        assert torch.equal(average.read(), trained[f"{case}.0"]["half"][f"average {name}"])
    assert len({file.name.split("/")[1] for file in run.list()}) == 1  # the older one is gone


@pytest.mark.parametrize("case", CASES)
def test_a_refused_step_changes_nothing_on_any_worker(trained: dict, case: str) -> None:
    ours, theirs = (trained[f"{case}.{rank}"]["refused"] for rank in range(2))
    assert ours == theirs
    reasons, changed, ends = zip(*ours, strict=True)
    assert [bool(reason) for reason in reasons] == [True, False, True, True, True]
    assert "loss is nan" in reasons[0]
    assert "above 100 times its mean" in reasons[2]
    assert changed == (False, True, False, False, False)
    assert ends == (False, False, False, False, True)


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
