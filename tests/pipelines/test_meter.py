"""What the curves show of the losses that were taken in."""

import math

import pytest
import torch

from pipelines.train.config import BatchConfig
from pipelines.train.denoiser import by_quarter
from pipelines.train.meter import Meter
from pipelines.train.tasks import Loss

BATCH = BatchConfig(global_size=4, micro_size=2)


def read(*losses: Loss) -> dict[str, float]:
    meter = Meter()
    for loss in losses:
        meter.add(loss, weight=1.0)
    return meter.read({}, BATCH, 4, 0.0)


def loss(error: list[float], timesteps: list[int], drawn: tuple[int, int]) -> Loss:
    values = torch.tensor(error)
    return Loss("unet", values, {"term": values * 2}, by_quarter(values, torch.tensor(timesteps), drawn))


def test_each_quarter_of_the_timesteps_is_the_mean_of_its_own_samples():
    numbers = read(loss([1.0, 2.0], [0, 249], (0, 1000)), loss([6.0, 4.0], [100, 999], (0, 1000)))
    assert numbers == pytest.approx(
        {
            "loss_unet": 13 / 4,
            "term": 13 / 2,
            "squared_error_timesteps_0_to_249": 9 / 3,
            "squared_error_timesteps_750_to_999": 4.0,
        }
    )  # the quarters without a sample have no point


def test_a_pass_that_is_run_for_nothing_does_not_count():
    meter, one = Meter(), loss([1.0, 2.0], [0, 999], (0, 1000))
    meter.add(one, weight=0.5)
    meter.add(loss([9.0], [0], (0, 1000)), weight=0.0)
    assert meter.read({}, BATCH, 4, 0.0) == read(one)


def test_the_refiners_quarters_divide_its_own_timesteps():
    numbers = read(loss([1.0, 2.0, 3.0, 4.0], [49, 50, 100, 199], (0, 200)))
    quarters = {name: value for name, value in numbers.items() if "timesteps" in name}
    names = [f"squared_error_timesteps_{low}_to_{low + 49}" for low in (0, 50, 100, 150)]
    assert quarters == dict(zip(names, (1.0, 2.0, 3.0, 4.0), strict=True))


def test_a_range_narrower_than_four_timesteps_leaves_none_out():
    numbers = read(loss([1.0, 3.0], [7, 8], (7, 9)))
    assert sum(value for name, value in numbers.items() if "timesteps" in name) == 4.0


def test_a_loss_that_is_no_number_shows_in_its_quarter_and_in_no_other():
    numbers = read(loss([math.nan, 2.0], [0, 999], (0, 1000)))
    assert math.isnan(numbers["loss_unet"])
    assert math.isnan(numbers["squared_error_timesteps_0_to_249"])
    assert numbers["squared_error_timesteps_750_to_999"] == 2.0
