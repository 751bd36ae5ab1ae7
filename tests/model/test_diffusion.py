import pytest
import torch

from model.conditioning import conditioning_vector, drop, select_context
from model.config import UNET_PRESETS, Conditioning, DiffusionConfig, PredictionType
from model.diffusion import Diffusion, gaussian
from model.layers import fourier

SHAPE = (4, 6, 8)


def test_schedule_has_the_published_values():
    diffusion = Diffusion(DiffusionConfig())
    picks = torch.tensor([0, 199, 200, 999])
    expected = torch.tensor([0.0291671582, 0.56928, 0.57167, 14.6146412293])
    torch.testing.assert_close(diffusion.sigmas[picks], expected, rtol=1e-5, atol=0)
    ends = torch.tensor([0.99915, 0.0046600985])
    torch.testing.assert_close(diffusion.alphas_cumprod[[0, 999]], ends, rtol=1e-6, atol=0)
    assert diffusion.sigmas.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", PredictionType)
def test_a_perfect_prediction_gives_back_latents_and_noise(prediction_type):
    diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
    latents, noise = gaussian(0, 0, 2 * 5, SHAPE).chunk(2)
    timesteps = torch.tensor([0, 1, 199, 500, 999])
    noisy = diffusion.add_noise(latents, noise, timesteps)
    target = diffusion.target(latents, noise, timesteps)
    torch.testing.assert_close(diffusion.predict_x0(noisy, target, timesteps), latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(diffusion.prediction_to_epsilon(noisy, target, timesteps), noise, rtol=0, atol=2e-6)


def test_v_and_noisy_latents_are_x0_and_noise_turned_by_an_angle():
    diffusion = Diffusion(DiffusionConfig(prediction_type=PredictionType.V))
    latents, noise = gaussian(0, 0, 2 * 3, SHAPE).chunk(2)
    timesteps = torch.tensor([10, 400, 900])
    noisy, v = (f(latents, noise, timesteps) for f in (diffusion.add_noise, diffusion.target))
    torch.testing.assert_close(noisy.square() + v.square(), latents.square() + noise.square())


def zero_terminal() -> Diffusion:
    return Diffusion(DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True))


def test_zero_terminal_snr_equals_diffusers_and_ends_at_exactly_nothing():
    from diffusers import DDPMScheduler

    diffusion, config = zero_terminal(), DiffusionConfig()
    theirs = DDPMScheduler(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    torch.testing.assert_close(diffusion.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=0)  # theirs in fp32
    assert diffusion.alphas_cumprod[-1] == 0
    assert diffusion.alphas_cumprod[0] == Diffusion(config).alphas_cumprod[0]
    assert (diffusion.alphas_cumprod.diff() < 0).all()


def test_sigmas_stay_finite_where_the_signal_ends():
    diffusion = zero_terminal()
    assert float(diffusion.sigmas[-1]) == pytest.approx(4096, rel=1e-6)
    assert (diffusion.sigmas.diff() > 0).all()
    above = diffusion.alphas_cumprod[:-1].double()
    torch.testing.assert_close(diffusion.sigmas[:-1].double(), ((1 - above) / above).sqrt(), rtol=1e-4, atol=0)


def test_at_a_signal_of_zero_noise_is_all_that_is_left_and_v_tells_the_image():
    diffusion = zero_terminal()
    latents, noise = gaussian(0, 0, 2 * 2, SHAPE).chunk(2)
    last = torch.tensor([999, 999])
    noisy, v = diffusion.add_noise(latents, noise, last), diffusion.target(latents, noise, last)
    assert torch.equal(noisy, noise)
    assert torch.equal(v, -latents)
    assert torch.equal(diffusion.predict_x0(noisy, v, last), latents)
    assert torch.equal(diffusion.prediction_to_epsilon(noisy, v, last), noise)


def test_noise_cannot_be_predicted_where_the_signal_ends():
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction_type 'v'"):
        DiffusionConfig(zero_terminal_snr=True)


def test_gaussian_draws_do_not_depend_on_how_the_stream_is_cut():
    assert torch.equal(gaussian(7, 100, 6, SHAPE)[4:], gaussian(7, 104, 2, SHAPE))


def conditions(batch=2):
    return {name: torch.arange(batch * name.scalars).view(batch, -1) * 7.0 for name in Conditioning}


@pytest.mark.parametrize(("preset", "width"), [("base", 2816), ("refiner", 2560)])
def test_conditioning_vector_is_pooled_text_then_sizes_in_order(preset, width):
    config = UNET_PRESETS[preset]
    pooled = torch.randn(2, config.pooled_dim)
    vector = conditioning_vector(pooled, conditions(), config)
    assert vector.shape == (2, width)
    assert torch.equal(vector[:, :1280], pooled)
    numbers = torch.cat([conditions()[name] for name in config.conditioning], dim=1)
    assert torch.equal(vector[:, 1280:].unflatten(1, (-1, 256)), fourier(numbers, 256))


def test_dropped_embeddings_are_zeros():
    config = UNET_PRESETS["tiny-refiner"]
    keep = torch.tensor([[True, False, True], [False, True, True]])
    pooled = torch.randn(2, config.pooled_dim)
    full = conditioning_vector(pooled, conditions(), config)
    vector = conditioning_vector(pooled, conditions(), config, keep)
    sizes = vector[:, config.pooled_dim :].split([512, 512, 256], dim=1)
    for index, part in enumerate(full[:, config.pooled_dim :].split([512, 512, 256], dim=1)):
        assert torch.equal(sizes[index], drop(part, keep[:, index]))
    context = torch.full((2, 77, 8), float("nan"))
    assert torch.equal(drop(context, torch.tensor([False, False])), torch.zeros(2, 77, 8))


def test_wrong_conditions_are_named():
    config = UNET_PRESETS["tiny-base"]
    pooled = torch.randn(2, config.pooled_dim)
    incomplete = {name: value for name, value in conditions().items() if name != Conditioning.TARGET_SIZE}
    with pytest.raises(KeyError, match="target_size"):
        conditioning_vector(pooled, incomplete, config)
    with pytest.raises(ValueError, match="original_size"):
        conditioning_vector(pooled, conditions() | {Conditioning.ORIGINAL_SIZE: torch.zeros(2, 3)}, config)
    with pytest.raises(ValueError, match="pooled"):
        conditioning_vector(pooled[:, 1:], conditions(), config)
    with pytest.raises(ValueError, match="keep"):
        conditioning_vector(pooled, conditions(), config, torch.ones(2, 2, dtype=torch.bool))


def test_the_refiner_reads_the_second_tower_alone():
    stored = torch.randn(2, 77, 2048)
    assert torch.equal(select_context(stored, UNET_PRESETS["base"]), stored)
    assert torch.equal(select_context(stored, UNET_PRESETS["refiner"]), stored[..., 768:])
    with pytest.raises(ValueError, match="768 to 2048"):
        select_context(stored[..., :1280], UNET_PRESETS["refiner"])
