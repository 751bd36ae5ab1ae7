from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler

from model.config import DiffusionConfig, SamplerName, Spacing
from model.diffusion import Diffusion
from model.noise_levels import (
    NoiseLevels,
    karras_sigmas,
    levels_at,
    levels_of,
    noise_levels,
    timesteps_leading,
    timesteps_trailing,
)

DIFFUSION = Diffusion(DiffusionConfig())
STEPS = 20


def test_timesteps_descend_within_the_schedule():
    for steps in (1, 7, 30, 50, 1000):
        for spacing in Spacing:
            for sampler in (SamplerName.EULER, SamplerName.DPMPP_2M):
                levels = noise_levels(steps, spacing, DIFFUSION, sampler=sampler)
                assert len(levels.timesteps) == steps
                assert 0 <= levels.timesteps[-1] <= levels.timesteps[0] <= 999
                assert levels.sigmas[-1] == 0
    assert timesteps_trailing(4)[0] == 999
    assert timesteps_leading(4) == [751, 501, 251, 1]
    for steps in range(1, 1001):  # numpy adds one below 0 at times, and diffusers a step at it
        assert timesteps_trailing(steps) == (np.arange(1000, 0, -1000 / steps).round()[:steps] - 1).tolist()
    assert noise_levels(40, Spacing.TRAILING, DIFFUSION, below=200).timesteps[::20] == (199, 99)
    for steps, below in ((0, None), (1001, None), (201, 200)):
        with pytest.raises(ValueError, match=f"{steps} steps over"):
            noise_levels(steps, Spacing.TRAILING, DIFFUSION, below=below)
    for timesteps in ([5, 5], [5, 7]):
        with pytest.raises(ValueError, match="descend"):
            levels_at(timesteps, DIFFUSION)
    with pytest.raises(ValueError, match="one sigma more"):
        NoiseLevels((5.0,), (1.0,))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_karras_levels_equal_the_published_ones_over_any_range(spacing):
    scheduler = EulerDiscreteScheduler(
        beta_start=DIFFUSION.config.beta_start,
        beta_end=DIFFUSION.config.beta_end,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing=spacing,
        use_karras_sigmas=True,
    )
    scheduler.set_timesteps(STEPS)
    first, last = {"leading": (951, 1), "trailing": (999, 49), "linspace": (999, 0)}[spacing]
    found = levels_of(karras_sigmas(STEPS, *DIFFUSION.sigmas[[first, last]].tolist()), DIFFUSION)
    torch.testing.assert_close(torch.tensor(found.sigmas), scheduler.sigmas, rtol=3e-5, atol=0)
    torch.testing.assert_close(torch.tensor(found.timesteps), scheduler.timesteps, rtol=0, atol=0.01)
    if spacing == "linspace":
        assert noise_levels(STEPS, Spacing.KARRAS, DIFFUSION) == replace(found, spacing=Spacing.KARRAS)


def test_sigmas_of_the_schedule_stand_for_their_own_timesteps():
    timesteps = [999, 998, 500, 1, 0]
    assert levels_of(DIFFUSION.sigmas[timesteps].tolist(), DIFFUSION).timesteps == pytest.approx(timesteps)
    assert levels_of([100.0, 1e-3], DIFFUSION).timesteps == (999, 0)


def test_the_part_that_goes_back_over_an_image_is_the_runs_last():
    levels = noise_levels(50, Spacing.LEADING, DIFFUSION)
    for strength, kept in ((0.3, 15), (0.99, 49), (0.02, 1), (1.0, 50)):
        tail = levels.tail(strength)
        assert tail.timesteps == levels.timesteps[-kept:]
        assert tail.sigmas == levels.sigmas[-kept - 1 :]
    with pytest.raises(ValueError, match=r"strength 0.01 of 50 steps"):
        levels.tail(0.01)


@pytest.mark.parametrize("spacing", Spacing)
def test_levels_and_their_parts_know_how_the_run_was_spaced(spacing):
    for sampler in SamplerName:
        levels = noise_levels(STEPS, str(spacing), DIFFUSION, sampler=sampler)
        parts = (*levels.split(200), levels.tail(0.3), noise_levels(STEPS, spacing, DIFFUSION, below=200))
        assert [part.spacing for part in (levels, *parts)] == [spacing] * 5
        assert isinstance(levels.spacing, Spacing)
    with pytest.raises(ValueError, match="linspace"):
        noise_levels(STEPS, "linspace", DIFFUSION)
