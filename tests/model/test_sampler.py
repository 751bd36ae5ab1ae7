import math
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)

from model.config import BASE_CONDITIONING, DiffusionConfig, PredictionType, SamplerName, Spacing, UNetConfig
from model.diffusion import Diffusion, gaussian
from model.noise_levels import NoiseLevels, levels_at, noise_levels
from model.sampler import (
    Condition,
    Guidance,
    ancestral_levels,
    denoiser,
    euler_step,
    initial_noise,
    noised,
    sample,
    sample_ensemble,
    step_noise,
    step_noise_after,
)
from model.unet import UNet

DIFFUSION = Diffusion(DiffusionConfig())
ZERO_SNR = DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True)
CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    transformer_depth=(0, 1),
    middle_depth=1,
    num_res_blocks=1,
    context_dim=16,
    pooled_dim=8,
    conditioning=BASE_CONDITIONING,
    head_channels=16,
    conditioning_embed_dim=8,
    norm_groups=8,
)
SHAPE = (4, 8, 8)
NOISE = gaussian(0, 0, 2, SHAPE)
FRESH = step_noise([(0, 0), (0, 1)], SHAPE)
STEPS = 20
PUBLISHED = {
    SamplerName.EULER: EulerDiscreteScheduler,
    SamplerName.EULER_ANCESTRAL: EulerAncestralDiscreteScheduler,
    SamplerName.DPMPP_2M: DPMSolverMultistepScheduler,
    SamplerName.DDIM: DDIMScheduler,
}


@pytest.fixture
def unet(randomized):
    return randomized(UNet(CONFIG))


@pytest.fixture
def published_noise(monkeypatch):
    """Gives diffusers' samplers the noise of our steps, one after another."""
    count = iter(range(10_000))
    for scheduler in (EulerAncestralDiscreteScheduler, DDIMScheduler):
        monkeypatch.setattr(f"{scheduler.__module__}.randn_tensor", lambda *a, **k: FRESH(next(count)))


def condition(seed, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return Condition(
        context=torch.randn(batch, 77, CONFIG.context_dim, generator=generator),
        vector=torch.randn(batch, CONFIG.vector_dim, generator=generator),
    )


def published(sampler, config, **settings):
    """diffusers' sampler on our schedule."""
    own = {SamplerName.DDIM: {"clip_sample": False, "set_alpha_to_one": True}}
    return PUBLISHED[sampler](
        num_train_timesteps=config.num_timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[config.prediction_type],
        steps_offset=1,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        **own.get(sampler, {}),
        **settings,
    )


@torch.no_grad()
def published_sample(scheduler, predict, x, **settings):
    for timestep in scheduler.timesteps:
        prediction = predict(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(prediction, timestep, x, **settings).prev_sample
    return x


def schedule_of(scheduler, levels):
    """Makes a published sampler step through our levels."""
    scheduler.set_timesteps(len(levels.timesteps))
    scheduler.timesteps, scheduler.sigmas = torch.tensor(levels.timesteps), torch.tensor(levels.sigmas)


def test_one_known_image_is_reached_exactly_by_every_sampler():
    image = torch.randn(2, *SHAPE)
    for sampler in SamplerName:
        for spacing in Spacing:
            levels = noise_levels(7, spacing, DIFFUSION)
            x = initial_noise(NOISE, levels)
            found = sample(lambda x, sigma, timestep: image, x, levels, sampler=sampler, step_noise=FRESH)
            torch.testing.assert_close(found, image)


def test_a_step_from_a_level_without_signal_to_none_gives_x0_to_the_bit():
    x, x0 = 4096 * NOISE, gaussian(3, 0, 2, SHAPE)
    assert torch.equal(euler_step(x, x0, 4096.0, 0.0), x0)
    torch.testing.assert_close(euler_step(x, x0, 4096.0, 1024.0), 0.25 * x + 0.75 * x0)


def gaussian_errors(sampler, counts):
    """Errors of what a sampler makes of Gaussian data, whose x0 and whole path are known, down to the lowest level."""
    spread, errors = 0.5, []
    for steps in counts:
        levels = noise_levels(steps, Spacing.KARRAS, DIFFUSION)
        levels = NoiseLevels(levels.timesteps[:-1], levels.sigmas[:-1])
        x = initial_noise(NOISE, levels)
        exact = x * math.sqrt((spread**2 + levels.sigmas[-1] ** 2) / (spread**2 + levels.sigmas[0] ** 2))
        found = sample(lambda x, sigma, timestep: x * spread**2 / (spread**2 + sigma**2), x, levels, sampler=sampler)
        errors.append(float((found - exact).norm() / exact.norm()))
    return errors


def test_euler_is_of_first_order_and_dpmpp_2m_of_second():
    euler = gaussian_errors(SamplerName.EULER, (25, 50, 100))
    dpmpp_2m = gaussian_errors(SamplerName.DPMPP_2M, (25, 50, 100))
    assert all(1.7 < here / finer < 2.5 for here, finer in pairwise(euler))
    assert all(3.4 < here / finer < 5 for here, finer in pairwise(dpmpp_2m))


def test_fresh_noise_keeps_the_spread_of_gaussian_data():
    spread, levels = 0.5, noise_levels(200, Spacing.KARRAS, DIFFUSION)
    noise = gaussian(1, 0, 8, (4, 16, 16))
    fresh = step_noise([(1, k) for k in range(8)], (4, 16, 16))
    for sampler, eta in ((SamplerName.EULER_ANCESTRAL, 1.0), (SamplerName.DDIM, 0.5), (SamplerName.DDIM, 1.0)):
        x = initial_noise(noise, levels)
        found = sample(
            lambda x, sigma, timestep: x * spread**2 / (spread**2 + sigma**2),
            x,
            levels,
            sampler=sampler,
            eta=eta,
            step_noise=fresh,
        )
        assert float(found.std()) == pytest.approx(spread, rel=0.05)
        assert abs(float((found * noise).mean())) < 0.95 * spread


@pytest.mark.parametrize("prediction_type", PredictionType)
@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("sampler", SamplerName)
def test_every_sampler_equals_the_published_one(
    unet, relative_error, published_noise, sampler, spacing, prediction_type
):
    config = DiffusionConfig(prediction_type=prediction_type)
    diffusion, told = Diffusion(config), condition(3)
    levels = noise_levels(STEPS, spacing, diffusion, sampler=sampler)
    if spacing is not Spacing.KARRAS:
        scheduler = published(sampler, config, timestep_spacing=spacing.value)
        scheduler.set_timesteps(STEPS)
    elif sampler is SamplerName.EULER:
        scheduler = published(sampler, config, timestep_spacing="linspace", use_karras_sigmas=True)
        scheduler.set_timesteps(STEPS)
    elif sampler is SamplerName.DPMPP_2M:
        scheduler = published(sampler, config, use_karras_sigmas=True)
        scheduler.set_timesteps(STEPS)
    elif sampler is SamplerName.EULER_ANCESTRAL:
        scheduler = published(sampler, config, timestep_spacing="linspace")
        schedule_of(scheduler, levels)
    else:  # DDIM's steps are not of sigmas but of timesteps; without noise it is Euler from DDIM's start, leading's
        scheduler = published(SamplerName.EULER, config, timestep_spacing="leading")
        schedule_of(scheduler, levels)
    torch.testing.assert_close(scheduler.timesteps.double(), torch.tensor(levels.timesteps).double(), rtol=0, atol=0.01)
    x = NOISE * scheduler.init_noise_sigma
    expected = published_sample(scheduler, lambda x, t: unet(x, t.expand(2), told.context, told.vector), x)
    x = initial_noise(NOISE, levels, sampler)
    found = sample(denoiser(unet, diffusion, told), x, levels, sampler=sampler, step_noise=FRESH)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("sampler", SamplerName)
def test_every_sampler_equals_the_published_one_from_a_level_without_signal(
    unet, relative_error, published_noise, sampler
):
    diffusion, told = Diffusion(ZERO_SNR), condition(3)
    levels = noise_levels(STEPS, Spacing.TRAILING, diffusion)
    scheduler = published(sampler, ZERO_SNR, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = NOISE * scheduler.init_noise_sigma
    expected = published_sample(scheduler, lambda x, t: unet(x, t.expand(2), told.context, told.vector), x)
    x = initial_noise(NOISE, levels, sampler)
    found = sample(denoiser(unet, diffusion, told), x, levels, sampler=sampler, step_noise=FRESH)
    assert relative_error(found, expected) < 1e-5


def test_the_start_is_the_published_one_for_any_number_of_steps():
    """500 leading timesteps begin at the noisiest one, as trailing ones do, and start with an x0 all the same."""
    for sampler in (SamplerName.EULER, SamplerName.EULER_ANCESTRAL):
        for spacing in (Spacing.LEADING, Spacing.TRAILING):
            for steps in (1, STEPS, 500):
                scheduler = published(sampler, DIFFUSION.config, timestep_spacing=spacing.value)
                scheduler.set_timesteps(steps)
                found = initial_noise(NOISE, noise_levels(steps, spacing, DIFFUSION), sampler)
                torch.testing.assert_close(found, NOISE * scheduler.init_noise_sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize(  # without signal, the published one takes the root of a rounding error at an eta of 1
    ("config", "eta"), [(DiffusionConfig(), 0.3), (DiffusionConfig(), 1.0), (ZERO_SNR, 0.999)]
)
def test_ddim_with_fresh_noise_equals_the_published_one(unet, relative_error, published_noise, config, eta):
    diffusion, told = Diffusion(config), condition(3)
    levels = noise_levels(STEPS, Spacing.TRAILING, diffusion)
    scheduler = published(SamplerName.DDIM, config, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    expected = published_sample(scheduler, lambda x, t: unet(x, t.expand(2), told.context, told.vector), NOISE, eta=eta)
    x = initial_noise(NOISE, levels, SamplerName.DDIM)
    found = sample(denoiser(unet, diffusion, told), x, levels, sampler=SamplerName.DDIM, eta=eta, step_noise=FRESH)
    assert relative_error(found, expected) < 1e-5


def test_ddim_without_fresh_noise_is_euler_and_with_it_euler_ancestral(unet, relative_error):
    levels, denoise = noise_levels(STEPS, Spacing.TRAILING, DIFFUSION), denoiser(unet, DIFFUSION, condition(3))
    x = initial_noise(NOISE, levels)

    def made(sampler, **settings):
        return sample(denoise, x, levels, sampler=sampler, **settings)

    assert relative_error(made(SamplerName.DDIM), made(SamplerName.EULER)) < 1e-5
    assert relative_error(made(SamplerName.EULER_ANCESTRAL, eta=0.0), made(SamplerName.EULER)) < 1e-5
    ancestral = made(SamplerName.EULER_ANCESTRAL, step_noise=FRESH)
    assert relative_error(made(SamplerName.DDIM, eta=1.0, step_noise=FRESH), ancestral) < 1e-5
    assert relative_error(ancestral, made(SamplerName.EULER)) > 0.1


@pytest.mark.parametrize("sampler", [SamplerName.EULER, SamplerName.DPMPP_2M])
def test_a_run_in_two_parts_equals_the_published_one(unet, relative_error, sampler):
    """The first part of DPM++ ends above 0 and stays of second order; the second part has no step before."""
    told = condition(3)
    levels = noise_levels(STEPS, Spacing.TRAILING, DIFFUSION)
    scheduler = published(sampler, DIFFUSION.config, timestep_spacing="trailing")

    def predict(x, timestep):
        return unet(x, timestep.expand(2), told.context, told.vector)

    scheduler.set_timesteps(STEPS)
    x = NOISE * scheduler.init_noise_sigma
    for part in (lambda timestep: timestep >= 200, lambda timestep: timestep < 200):
        scheduler.set_timesteps(STEPS)
        wanted = [k for k, timestep in enumerate(scheduler.timesteps) if part(timestep)]
        scheduler.set_begin_index(wanted[0])
        with torch.no_grad():
            for k in wanted:
                timestep = scheduler.timesteps[k]
                prediction = predict(scheduler.scale_model_input(x, timestep), timestep)
                x = scheduler.step(prediction, timestep, x).prev_sample
    denoise, start = denoiser(unet, DIFFUSION, told), initial_noise(NOISE, levels, sampler)
    found = sample_ensemble(denoise, denoise, start, levels, cutoff=200, sampler=sampler)
    assert relative_error(found, x) < 1e-5
    unbroken = sample(denoise, start, levels, sampler=sampler)
    assert torch.equal(found, unbroken) == (sampler is SamplerName.EULER)


def test_a_hand_over_between_equals_is_an_unbroken_run(unet):
    denoise = denoiser(unet, DIFFUSION, condition(3))
    for sampler in (SamplerName.EULER, SamplerName.EULER_ANCESTRAL, SamplerName.DDIM):
        for levels in (noise_levels(10, Spacing.KARRAS, DIFFUSION), *map(at, ([900, 500], [150, 50]))):
            x, settings = initial_noise(NOISE, levels), {"sampler": sampler, "step_noise": FRESH}
            unbroken = sample(denoise, x, levels, **settings)
            assert torch.equal(sample_ensemble(denoise, denoise, x, levels, **settings), unbroken)


def at(timesteps):
    return levels_at(timesteps, DIFFUSION)


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
        at([999, 200, 199, 0]),
        on_step=lambda timestep, x: steps.append((timestep, float(x.mean()))),
    )
    assert told == {"base": [999, 200], "refiner": [199, 0]}
    assert [timestep for timestep, _ in steps] == [999, 200, 199, 0]
    torch.testing.assert_close(steps[1][1], float(DIFFUSION.sigmas[199] / DIFFUSION.sigmas[999]))


def test_guidance_goes_from_the_negative_through_the_positive(unet):
    x, prompt, empty = initial_noise(NOISE, at([500])), condition(3), condition(4)
    no_text = Condition(torch.zeros_like(prompt.context), empty.vector)

    def once(*conditions, scale=1.0):
        return denoiser(unet, DIFFUSION, *conditions, guidance=Guidance(scale))(x, float(DIFFUSION.sigmas[500]), 500)

    positive, negative = once(prompt), once(no_text)
    torch.testing.assert_close(once(prompt, no_text, scale=5.0), negative + 5.0 * (positive - negative))
    assert torch.equal(once(prompt, no_text), positive)
    torch.testing.assert_close(once(prompt, no_text, scale=0.0), negative)
    with pytest.raises(ValueError, match="negative"):
        once(prompt, scale=5.0)


def test_rescaled_guidance_has_the_deviation_of_the_prompts_prediction():
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    positive, negative = gaussian(1, 0, 3, SHAPE), 2.0 * gaussian(2, 0, 3, SHAPE)
    guided = Guidance(7.0)(positive, negative)
    whole = Guidance(7.0, rescale=1.0)(positive, negative)
    torch.testing.assert_close(whole.flatten(1).std(1), positive.flatten(1).std(1))
    torch.testing.assert_close(Guidance(7.0, rescale=0.7)(positive, negative), 0.7 * whole + 0.3 * guided)
    torch.testing.assert_close(Guidance(7.0, rescale=0.7)(positive, negative), rescale_noise_cfg(guided, positive, 0.7))


@pytest.mark.parametrize("sampler", SamplerName)
def test_a_sample_does_not_depend_on_its_neighbours(unet, relative_error, sampler):
    levels, told, empty = noise_levels(5, Spacing.KARRAS, DIFFUSION), condition(3), condition(4)
    x, guidance, settings = initial_noise(NOISE, levels), Guidance(3.0, 0.5), {"sampler": sampler, "eta": 0.8}
    together = sample(denoiser(unet, DIFFUSION, told, empty, guidance), x, levels, step_noise=FRESH, **settings)
    second, none = (Condition(c.context[1:], c.vector[1:]) for c in (told, empty))
    fresh = step_noise([(0, 1)], SHAPE)
    alone = sample(denoiser(unet, DIFFUSION, second, none, guidance), x[1:], levels, step_noise=fresh, **settings)
    assert relative_error(together[1:], alone) < 1e-5


def test_rescaled_guidance_of_a_new_network_is_flat_and_no_nan():
    flat = torch.zeros(2, 4, 8, 8)
    assert torch.equal(Guidance(5.0, rescale=0.7)(flat, flat), flat)


def test_names_work_where_members_of_an_enumeration_do(unet):
    diffusion = Diffusion(DiffusionConfig(prediction_type="v"))
    levels = noise_levels(3, "karras", diffusion)
    assert levels == noise_levels(3, Spacing.KARRAS, diffusion)
    x = torch.randn(1, 4, 8, 8)
    for name in SamplerName:
        known = lambda x, sigma, timestep: torch.zeros_like(x)  # noqa: E731
        ends = [sample(known, x, levels, sampler=sampler, step_noise=lambda step: x) for sampler in (name, str(name))]
        assert torch.equal(*ends)
    with pytest.raises(ValueError, match="zero_terminal_snr needs"):
        DiffusionConfig(prediction_type="epsilon", zero_terminal_snr=True)


def test_the_noise_of_a_step_follows_from_seed_number_and_step_alone():
    pictures = [(seed, number) for seed in (0, 1) for number in (0, 1, 2**59)]
    fresh = step_noise(pictures, SHAPE)
    assert torch.equal(fresh(3), fresh(3))
    for row, picture in enumerate(pictures):
        assert torch.equal(step_noise([picture], SHAPE)(3)[0], fresh(3)[row])
    everything = torch.cat([fresh(0), fresh(1), fresh(999), NOISE]).flatten(1)
    assert len(everything.unique(dim=0)) == 3 * len(pictures) + len(NOISE)
    assert torch.equal(step_noise_after(fresh, 3)(2), fresh(5))
    assert step_noise_after(None, 3) is None


def test_fresh_noise_that_is_missing_is_an_error_before_the_first_step():
    levels = at([500, 100])

    def sampled(**settings):
        return sample(lambda x, sigma, timestep: x, initial_noise(NOISE, levels), levels, **settings)

    for settings in ({"sampler": SamplerName.EULER_ANCESTRAL}, {"sampler": SamplerName.DDIM, "eta": 0.1}):
        with pytest.raises(ValueError, match="needs step_noise"):
            sampled(**settings)
    for settings in ({"sampler": SamplerName.DDIM}, {"sampler": SamplerName.EULER, "eta": 1.0}):
        assert sampled(**settings).isfinite().all()


def test_fresh_noise_and_what_is_kept_make_up_the_next_level():
    for eta in (0.0, 0.4, 1.0, 3.0):
        for sigma, next_sigma in ((14.0, 3.0), (0.03, 0.029), (1.0, 0.0), (math.inf, 40.0)):
            kept, added = ancestral_levels(sigma, next_sigma, eta)
            assert math.hypot(kept, added) == pytest.approx(next_sigma)
            assert 0 <= added <= next_sigma
    assert ancestral_levels(14.0, 3.0, 0.0) == (3.0, 0.0)


def test_noised_latents_have_the_first_levels_noise():
    levels, latents = at([500, 100]), gaussian(3, 0, 2, SHAPE)
    timesteps = torch.tensor([500, 500])
    x = noised(latents, NOISE, levels)
    expected = DIFFUSION.add_noise(latents, NOISE, timesteps) * (levels.sigmas[0] ** 2 + 1) ** 0.5
    torch.testing.assert_close(x, expected)
