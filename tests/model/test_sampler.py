import pytest
import torch

from model.config import UNET_PRESETS, DiffusionConfig, PredictionType
from model.diffusion import Diffusion, gaussian
from model.sampler import (
    Condition,
    Guidance,
    denoiser,
    initial_noise,
    sample,
    sample_ensemble,
    timesteps_leading,
    timesteps_trailing,
)
from model.unet import UNet

DIFFUSION = Diffusion(DiffusionConfig())
CONFIG = UNET_PRESETS["tiny-base"]


@pytest.fixture
def unet(randomized):
    return randomized(UNet(CONFIG))


def condition(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        context=torch.randn(batch, 77, CONFIG.context_dim, generator=generator),
        vector=torch.randn(batch, CONFIG.vector_dim, generator=generator),
    )


def start(timesteps, batch=2):
    return initial_noise(gaussian(0, 0, batch, (4, 8, 8)), DIFFUSION, timesteps)


def test_one_known_image_is_reached_exactly():
    image = torch.randn(2, 4, 8, 8)
    timesteps = timesteps_leading(7)
    found = sample(lambda x, sigma, timestep: image, start(timesteps), DIFFUSION, timesteps)
    torch.testing.assert_close(found, image)


def test_steps_converge_to_the_solution_for_gaussian_data():
    spread = 0.5

    def denoise(x, sigma, timestep):
        return x * spread**2 / (spread**2 + sigma**2)

    errors = []
    for steps in (50, 200, 1000):
        timesteps = timesteps_trailing(steps)
        x = start(timesteps)
        exact = x * spread / (spread**2 + float(DIFFUSION.sigmas[999]) ** 2) ** 0.5
        errors.append(float((sample(denoise, x, DIFFUSION, timesteps) - exact).norm() / exact.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


@pytest.mark.parametrize("prediction_type", PredictionType)
@pytest.mark.parametrize(
    ("spacing", "timesteps"), [("leading", timesteps_leading(8)), ("trailing", timesteps_trailing(8))]
)
def test_sampling_equals_diffusers_euler(unet, relative_error, prediction_type, spacing, timesteps):
    from diffusers import EulerDiscreteScheduler

    config = DiffusionConfig(prediction_type=prediction_type)
    diffusion, told = Diffusion(config), condition(3)
    scheduler = EulerDiscreteScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        timestep_spacing=spacing,
        steps_offset=1,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction_type],
    )
    scheduler.set_timesteps(len(timesteps))
    assert scheduler.timesteps.tolist() == timesteps
    x = start(timesteps)
    if spacing == "leading":
        torch.testing.assert_close(x, gaussian(0, 0, 2, (4, 8, 8)) * scheduler.init_noise_sigma)
    expected = x
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(expected, timestep)
            prediction = unet(scaled, timestep.expand(2), told.context, told.vector)
            expected = scheduler.step(prediction, timestep, expected).prev_sample
    found = sample(denoiser(unet, diffusion, told), x, diffusion, timesteps)
    assert relative_error(found, expected) < 1e-5


def test_a_hand_over_between_equals_is_an_unbroken_run(unet):
    denoise = denoiser(unet, DIFFUSION, condition(3))
    for timesteps in (timesteps_leading(10), timesteps_trailing(10), [900, 500], [150, 50]):
        x = start(timesteps)
        unbroken = sample(denoise, x, DIFFUSION, timesteps)
        assert torch.equal(sample_ensemble(denoise, denoise, x, DIFFUSION, timesteps), unbroken)


def test_each_expert_steps_through_its_own_timesteps():
    told = {"base": [], "refiner": []}

    def expert(name):
        def denoise(x, sigma, timestep):
            told[name].append(timestep)
            return torch.zeros_like(x)

        return denoise

    steps = []
    sample_ensemble(
        expert("base"),
        expert("refiner"),
        torch.ones(1, 4, 2, 2),
        DIFFUSION,
        [999, 200, 199, 0],
        on_step=lambda timestep, x: steps.append((timestep, float(x.mean()))),
    )
    assert told == {"base": [999, 200], "refiner": [199, 0]}
    assert [timestep for timestep, _ in steps] == [999, 200, 199, 0]
    torch.testing.assert_close(steps[1][1], float(DIFFUSION.sigmas[199] / DIFFUSION.sigmas[999]))


def test_guidance_goes_from_the_negative_through_the_positive(unet):
    x, prompt, empty = start([500]), condition(3), condition(4)
    no_text = Condition(torch.zeros_like(prompt.context), empty.vector)

    def once(*conditions, scale=1.0):
        return denoiser(unet, DIFFUSION, *conditions, guidance=Guidance(scale))(x, float(DIFFUSION.sigmas[500]), 500)

    positive, negative = once(prompt), once(no_text)
    torch.testing.assert_close(once(prompt, no_text, scale=5.0), negative + 5.0 * (positive - negative))
    assert torch.equal(once(prompt, no_text), positive)
    torch.testing.assert_close(once(prompt, no_text, scale=0.0), negative)
    with pytest.raises(ValueError, match="negative"):
        once(prompt, scale=5.0)


def test_a_sample_does_not_depend_on_its_neighbours(unet, relative_error):
    timesteps, told, empty = timesteps_leading(5), condition(3), condition(4)
    together = sample(denoiser(unet, DIFFUSION, told, empty, Guidance(3.0)), start(timesteps), DIFFUSION, timesteps)
    first, none = (Condition(c.context[:1], c.vector[:1]) for c in (told, empty))
    alone = sample(denoiser(unet, DIFFUSION, first, none, Guidance(3.0)), start(timesteps, 1), DIFFUSION, timesteps)
    assert relative_error(together[:1], alone) < 1e-5


def test_timesteps_descend_within_the_schedule():
    for steps in (1, 7, 30, 50, 1000):
        for timesteps in (timesteps_leading(steps), timesteps_trailing(steps)):
            assert len(timesteps) == steps
            assert 0 <= timesteps[-1] <= timesteps[0] <= 999
    assert timesteps_trailing(4)[0] == 999
    assert timesteps_leading(4) == [751, 501, 251, 1]
    with pytest.raises(ValueError, match="0 steps"):
        timesteps_leading(0)
    with pytest.raises(ValueError, match="descend"):
        sample(lambda x, sigma, timestep: x, start([5]), DIFFUSION, [5, 5])
