"""AdamW's forms: the same steps from each, and moments of 8 bits that a checkpoint's values bring back to the bit."""

import bitsandbytes.functional
import pytest
import torch

from pipelines.train import optimizers
from pipelines.train.config import OptimizerConfig, WorkersConfig
from pipelines.train.optimizers import adamw, check_installed, check_sizes, moments, set_updates, take_up, updates

SIZE = 5_000  # of which the last block is not full; fewer than 4,096 stay in fp32


def after_steps(implementation: str, count: int, size: int = SIZE):
    """(optimizer, weights) after steps whose gradients are mostly negative, so that the largest moments are too."""
    weights = torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))
    config = OptimizerConfig(lr=1e-2, implementation=implementation)
    optimizer = adamw(config, [weights], lambda: True)
    go_on(optimizer, weights, 0, count)
    return optimizer, weights


def go_on(optimizer, weights, first, last):
    for step in range(first, last):
        weights.grad = torch.randn(len(weights), generator=torch.Generator().manual_seed(step + 1)) - 1.0
        optimizer.step()


@pytest.mark.parametrize(("implementation", "tolerance"), [("fused", 1e-6), ("auto", 1e-6), ("8bit", 0.01)])
def test_every_form_takes_the_steps_of_the_plain_one(implementation, tolerance):
    (_, plain), (_, other) = after_steps("plain", 4), after_steps(implementation, 4)
    assert 0 <= float((plain - other).detach().abs().max()) <= tolerance
    assert torch.equal(plain, other) == (tolerance == 0.0)


@pytest.mark.parametrize("implementation", ["plain", "fused", "8bit"])
def test_a_refused_step_does_nothing(implementation):
    weights = torch.nn.Parameter(torch.ones(SIZE))
    optimizer = adamw(OptimizerConfig(implementation=implementation), [weights], lambda: False)
    weights.grad = torch.ones(SIZE)
    optimizer.step()
    assert torch.equal(weights, torch.ones(SIZE))


@pytest.mark.parametrize("size", [SIZE, 100])
@pytest.mark.parametrize("implementation", ["plain", "fused", "8bit"])
def test_an_optimizer_goes_on_with_the_moments_of_another_to_the_bit(implementation, size):
    one, weights = after_steps(implementation, 3, size)
    values = {name: value.clone() for name, value in moments(one, weights).items()}
    take_up(one, weights, values)  # as at a checkpoint
    other, copied = after_steps(implementation, 0, size)
    copied.data.copy_(weights.data)
    for name, value in moments(other, copied).items():
        assert not value.any()
        value.copy_(values[name])
    take_up(other, copied, values)
    set_updates(other, copied, updates(one, weights))
    go_on(one, weights, 3, 6)
    go_on(other, copied, 3, 6)
    assert updates(other, copied) == 6
    assert torch.equal(weights, copied)


def test_moments_of_8_bits_are_the_librarys_and_a_checkpoint_takes_nothing_from_them():
    optimizer, weights = after_steps("8bit", 3)
    state, before = optimizer.state[weights], moments(optimizer, weights)
    for number, value in enumerate(before.values(), 1):
        theirs = bitsandbytes.functional.dequantize_blockwise(
            state[f"state{number}"], absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
        )
        assert torch.equal(value, theirs)
    codes = [state[f"state{number}"].clone() for number in (1, 2)]
    for _ in range(50):  # checkpoints
        take_up(optimizer, weights, moments(optimizer, weights))
    assert all(torch.equal(state[f"state{number}"], code) for number, code in enumerate(codes, 1))
    for name, value in moments(optimizer, weights).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=0.0)
    assert float(before["exp_avg"].abs().max()) == -float(before["exp_avg"].min())


def test_moments_are_the_same_whatever_is_taken_at_a_time(monkeypatch):
    optimizer, weights = after_steps("8bit", 3)
    state, whole = optimizer.state[weights], moments(optimizer, weights)
    codes = [state[f"state{number}"].clone() for number in (1, 2)]
    monkeypatch.setattr(optimizers, "VALUES_AT_A_TIME", 1024)
    parts = moments(optimizer, weights)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    take_up(optimizer, weights, parts)
    assert all(torch.equal(state[f"state{number}"], code) for number, code in enumerate(codes, 1))


def test_a_part_of_a_network_that_8_bits_cannot_count_is_refused_with_the_remedy():
    eight, base = OptimizerConfig(implementation="8bit"), {"unet": 2_567_463_684}
    check_sizes(eight, WorkersConfig(count=2), base)
    check_sizes(eight, WorkersConfig(count=1, zero_stage=0), base)
    check_sizes(OptimizerConfig(implementation="fused"), WorkersConfig(count=1), base)
    for workers in (WorkersConfig(count=1), WorkersConfig(count=8, min_count=1)):
        with pytest.raises(ValueError, match=r'"8bit" takes at most 2,147,483,647 values per worker.*take 2 workers'):
            check_sizes(eight, workers, base)


def test_a_form_whose_package_is_missing_is_refused_before_anything_starts(monkeypatch):
    check_installed(OptimizerConfig(implementation="8bit"))
    monkeypatch.setattr(optimizers, "EIGHT_BIT", "not-installed")
    check_installed(OptimizerConfig(implementation="fused"))
    with pytest.raises(
        ValueError, match=r'"8bit" needs not-installed, which is not installed; install the extra "8bit"'
    ):
        check_installed(OptimizerConfig(implementation="8bit"))
