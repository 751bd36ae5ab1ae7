import pytest
import torch

from model.ema import EMA


def tensors(*values):
    return [torch.full((3, 2), value) for value in values]


def test_a_halflife_of_images_halves_the_distance_at_any_batch_size():
    for batch in (1, 10, 50):
        ema = EMA(tensors(1.0), halflife_images=100, rampup=1e9)
        for step in range(100 // batch):
            ema.update(tensors(0.0), (step + 1) * batch, batch)
        torch.testing.assert_close(ema.shadow, tensors(0.5))


def test_a_young_average_forgets_its_start():
    ema = EMA(tensors(1.0), halflife_images=1_000_000, rampup=0.05)
    ema.update(tensors(0.0), 100, 100)
    assert ema.shadow[0].max() < 1e-5
    assert ema.decay(1000, 50) == 0.5
    assert ema.decay(10**9, 1_000_000) == 0.5
    assert ema.decay(0, 10) == 0.0


def test_averages_of_shards_are_shards_of_the_average():
    weights = [torch.randn(12) for _ in range(4)]
    whole, halves = EMA([weights[0]], 100), [EMA([part], 100) for part in weights[0].chunk(2)]
    for step, weight in enumerate(weights[1:]):
        whole.update([weight], 10 * step, 10)
        for half, part in zip(halves, weight.chunk(2), strict=True):
            half.update([part], 10 * step, 10)
    assert torch.equal(whole.shadow[0], torch.cat([half.shadow[0] for half in halves]))


def test_a_saved_average_goes_on_as_if_unbroken():
    unbroken, saved, resumed = (EMA(tensors(1.0, 2.0), 100) for _ in range(3))
    for ema in (unbroken, saved):
        ema.update(tensors(0.0, 5.0), 20, 20)
    resumed.load_state_dict(saved.state_dict())
    for ema in (unbroken, resumed):
        ema.update(tensors(3.0, 4.0), 40, 20)
    assert all(torch.equal(a, b) for a, b in zip(unbroken.shadow, resumed.shadow, strict=True))


def test_an_average_is_a_copy_and_refuses_what_does_not_fit():
    start = tensors(1.0)
    ema = EMA(start, 100)
    start[0].zero_()
    assert ema.shadow[0].min() == 1.0
    with pytest.raises(ValueError, match="2 tensors for an average of 1"):
        ema.update(tensors(1.0, 1.0), 1, 1)
    with pytest.raises(ValueError, match=r"0: \(2, 3\) for \(3, 2\)"):
        ema.load_state_dict(ema.state_dict() | {"shadow": [torch.zeros(2, 3)]})
    with pytest.raises(ValueError, match="halflife"):
        EMA(tensors(1.0), 200).load_state_dict(ema.state_dict())
    with pytest.raises(TypeError, match="bfloat16"):
        EMA([torch.zeros(1, dtype=torch.bfloat16)], 100)
