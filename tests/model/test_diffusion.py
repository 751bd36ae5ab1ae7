import dataclasses

import pytest
import torch

from model.conditioning import conditioning_vector, drop, select_context
from model.config import UNET_PRESETS, Conditioning, DenoiserLossConfig, DiffusionConfig, PredictionType
from model.diffusion import Diffusion, denoiser_loss, draw, gaussian, offset_noise
from model.layers import fourier

SHAPE = (4, 6, 8)
LOSS = DenoiserLossConfig(text_dropout=0.5, size_dropout=0.5)


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
    assert denoiser_loss(target, target).tolist() == [0.0] * 5


def test_v_and_noisy_latents_are_x0_and_noise_turned_by_an_angle():
    diffusion = Diffusion(DiffusionConfig(prediction_type=PredictionType.V))
    latents, noise = gaussian(0, 0, 2 * 3, SHAPE).chunk(2)
    timesteps = torch.tensor([10, 400, 900])
    noisy, v = (f(latents, noise, timesteps) for f in (diffusion.add_noise, diffusion.target))
    torch.testing.assert_close(noisy.square() + v.square(), latents.square() + noise.square())


def test_loss_is_per_sample():
    prediction = torch.zeros(3, *SHAPE)
    target = torch.arange(3.0).view(3, 1, 1, 1).expand(3, *SHAPE)
    assert denoiser_loss(prediction, target).tolist() == [0.0, 1.0, 4.0]
    assert denoiser_loss(prediction.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_draws_do_not_depend_on_how_the_stream_is_cut():
    whole = draw(7, 100, 6, SHAPE, LOSS, 3)
    parts = [draw(7, first, count, SHAPE, LOSS, 3) for first, count in ((100, 1), (101, 2), (103, 3))]
    for field in dataclasses.fields(whole):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(whole, field.name)), field.name
    assert torch.equal(gaussian(7, 100, 6, SHAPE)[4:], gaussian(7, 104, 2, SHAPE))


def test_small_draws_do_not_depend_on_the_bucket():
    square, wide = draw(7, 0, 8, (4, 8, 8), LOSS, 3), draw(7, 0, 8, (4, 4, 16), LOSS, 3)
    for name in ("timesteps", "channel_noise", "keep_context", "keep_pooled", "keep_sizes"):
        assert torch.equal(getattr(square, name), getattr(wide, name)), name


def test_every_draw_is_unlike_every_other():
    draws = draw(7, 0, 200, SHAPE, LOSS, 3)
    flat = torch.cat([draws.noise, draws.posterior_noise, gaussian(7, 0, 200, SHAPE), gaussian(8, 0, 200, SHAPE)])
    flat = flat.flatten(1)
    assert abs(flat.mean()) < 0.01
    assert abs(flat.var() - 1) < 0.01
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 6 * flat.shape[1] ** -0.5


def test_draws_have_the_shapes_ranges_and_rates_of_the_config():
    draws = draw(1, 0, 2000, (4, 1, 1), DenoiserLossConfig(timesteps=(0, 200), text_dropout=0.2), 4)
    assert (draws.timesteps.min(), draws.timesteps.max()) == (0, 199)
    assert draws.timesteps.dtype == torch.int64
    assert draws.channel_noise.shape == (2000, 4, 1, 1)
    assert draws.keep_sizes.shape == (2000, 4)
    assert draws.keep_sizes.all()
    dropped_context, dropped_pooled = ~draws.keep_context, ~draws.keep_pooled
    assert abs(dropped_context.float().mean() - 0.2) < 0.03
    assert abs((dropped_context & dropped_pooled).float().mean() - 0.04) < 0.02  # independent of each other


def test_offset_noise_shifts_whole_channels():
    draws = draw(1, 0, 3, SHAPE, LOSS, 3)
    shift = offset_noise(draws.noise, 0.05, draws) - draws.noise
    torch.testing.assert_close(shift, 0.05 * draws.channel_noise.expand_as(shift), rtol=0, atol=1e-6)
    assert torch.equal(offset_noise(draws.noise, 0.0, draws), draws.noise)


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
