import dataclasses
import itertools

import pytest
import torch

from model import denoiser_loss as denoiser_loss_module
from model.conditioning import select_context
from model.config import (
    UNET_PRESETS,
    DenoiserLossConfig,
    DiffusionConfig,
    PredictionType,
    TimestepBias,
    TimestepBiasConfig,
)
from model.denoiser_loss import denoiser_loss, draw, drop_text, min_snr_weight, offset_noise
from model.diffusion import Diffusion, gaussian

SHAPE = (4, 6, 8)
LOSS = DenoiserLossConfig(caption_dropout=0.2, text_dropout=0.5, size_dropout=0.5)
KEEP = ("keep_clip_l", "keep_bigg", "keep_pooled", "keep_sizes")


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


def test_small_draws_do_not_depend_on_the_bucket():
    square, wide = draw(7, 0, 8, (4, 8, 8), LOSS, 3), draw(7, 0, 8, (4, 4, 16), LOSS, 3)
    for name in ("timesteps", "channel_noise", *KEEP):
        assert torch.equal(getattr(square, name), getattr(wide, name)), name


def test_every_draw_is_unlike_every_other():
    draws = draw(7, 0, 200, SHAPE, LOSS, 3)
    flat = torch.cat([draws.noise, draws.posterior_noise, gaussian(7, 0, 200, SHAPE), gaussian(8, 0, 200, SHAPE)])
    flat = flat.flatten(1)
    assert abs(flat.mean()) < 0.01
    assert abs(flat.var() - 1) < 0.01
    correlation = torch.corrcoef(flat) - torch.eye(len(flat))
    assert correlation.abs().max() < 6 * flat.shape[1] ** -0.5


def test_draws_have_the_shapes_and_ranges_of_the_config():
    draws = draw(1, 0, 500, (4, 1, 1), DenoiserLossConfig(timesteps=(0, 200)), 4)
    assert (draws.timesteps.min(), draws.timesteps.max()) == (0, 199)
    assert draws.timesteps.dtype == torch.int64
    assert draws.channel_noise.shape == (500, 4, 1, 1)
    assert draws.keep_sizes.shape == (500, 4)
    assert draws.keep_sizes.all()


@pytest.mark.parametrize("end", [1000, 200])
def test_draws_are_those_of_the_first_runs(end):
    """Numbers written down when timesteps had no bias and text no draw of its own: a run goes on as it began."""
    loss = DenoiserLossConfig(timesteps=(0, end), caption_dropout=0.0, text_dropout=0.5, size_dropout=0.5)
    draws = draw(7, 100, 8, SHAPE, loss, 3)
    assert draws.timesteps.tolist() == [time % end for time in (529, 533, 403, 559, 111, 960, 279, 227)]
    assert draws.keep_bigg.int().tolist() == [0, 0, 1, 0, 0, 1, 0, 0]
    assert draws.keep_pooled.int().tolist() == [1, 0, 0, 0, 1, 1, 1, 1]
    assert draws.keep_sizes[:3].int().tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert draws.noise[0, 0, 0, :3].tolist() == pytest.approx([2.3541007, -0.1893795, 0.4729290])
    assert draws.channel_noise[3, :, 0, 0].tolist() == pytest.approx([-0.6110161, -0.8739112, -0.4537031, 0.1369532])


def test_no_setting_moves_the_draws_of_another():
    plain = draw(7, 0, 30, SHAPE, LOSS, 3)
    biased = draw(7, 0, 30, SHAPE, dataclasses.replace(LOSS, timestep_bias=bias("later", multiplier=9.0)), 3)
    for field in dataclasses.fields(plain):
        same = torch.equal(getattr(plain, field.name), getattr(biased, field.name))
        assert same == (field.name != "timesteps"), field.name
    undropped = draw(7, 0, 30, SHAPE, DenoiserLossConfig(caption_dropout=0.0), 3)
    for name in ("timesteps", "noise", "posterior_noise", "channel_noise"):
        assert torch.equal(getattr(plain, name), getattr(undropped, name)), name


def rate(*dropped: torch.Tensor) -> float:
    return float(torch.stack(dropped).all(0).float().mean())


def test_text_outputs_and_sizes_are_dropped_apart_from_each_other():
    loss = DenoiserLossConfig(caption_dropout=0.0, text_dropout=0.3, size_dropout=0.2)
    draws = draw(1, 0, 4000, (4, 1, 1), loss, 2)
    text = [~getattr(draws, name) for name in KEEP[:3]]
    sizes = [~draws.keep_sizes[:, index] for index in range(2)]
    for one in text:
        assert rate(one) == pytest.approx(0.3, abs=0.03)
    for one in sizes:
        assert rate(one) == pytest.approx(0.2, abs=0.03)
    for one, other in itertools.combinations(text + sizes, 2):
        assert rate(one, other) == pytest.approx(rate(one) * rate(other), abs=0.03)


def test_a_dropped_caption_takes_all_text_with_it_and_no_size():
    draws = draw(1, 0, 4000, (4, 1, 1), DenoiserLossConfig(caption_dropout=0.2), 3)
    assert torch.equal(draws.keep_clip_l, draws.keep_bigg)
    assert torch.equal(draws.keep_clip_l, draws.keep_pooled)
    assert rate(~draws.keep_clip_l) == pytest.approx(0.2, abs=0.03)
    assert draws.keep_sizes.all()


def test_by_default_guidance_sees_a_tenth_of_all_images_without_text_and_no_image_with_half_of_it():
    draws = draw(1, 0, 4000, (4, 1, 1), DenoiserLossConfig(), 3)
    without = rate(*(~getattr(draws, name) for name in KEEP[:3]))
    assert without == pytest.approx(0.1, abs=0.02)
    assert rate(~draws.keep_pooled) == without


def test_text_is_dropped_as_zeros_tower_by_tower():
    context, pooled = torch.full((8, 77, 96), float("nan")), torch.ones(8, 5)
    keep = torch.tensor(list(itertools.product([True, False], repeat=3)))
    draws = dataclasses.replace(
        draw(0, 0, 8, SHAPE, LOSS, 1), keep_clip_l=keep[:, 0], keep_bigg=keep[:, 1], keep_pooled=keep[:, 2]
    )
    dropped, pooled = drop_text(context, pooled, draws, 32)
    for row, (clip_l, bigg, text) in enumerate(keep.tolist()):
        assert dropped[row, :, :32].isnan().all() == clip_l
        assert dropped[row, :, 32:].isnan().all() == bigg
        assert torch.equal(dropped[row].nan_to_num(0), torch.zeros(77, 96))
        assert pooled[row].tolist() == [float(text)] * 5


def test_the_refiners_text_does_not_depend_on_clip_l():
    context, pooled, draws = torch.randn(20, 77, 96), torch.randn(20, 64), draw(0, 0, 20, SHAPE, LOSS, 3)
    seen = [
        select_context(drop_text(context, pooled, given, 32)[0], UNET_PRESETS["tiny-refiner"])
        for given in (draws, dataclasses.replace(draws, keep_clip_l=~draws.keep_clip_l))
    ]
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], context[..., 32:])


def bias(strategy: str, **settings) -> TimestepBiasConfig:
    return TimestepBiasConfig(strategy=TimestepBias(strategy), **settings)


@pytest.mark.parametrize(
    ("strategy", "settings", "biased"),
    [
        ("earlier", {"portion": 0.2}, range(100, 140)),
        ("later", {"portion": 0.2}, range(260, 300)),
        ("range", {"range": (150, 170)}, range(150, 170)),
    ],
)
@pytest.mark.parametrize("multiplier", [4.0, 0.25])
def test_biased_timesteps_are_drawn_that_many_times_as_often(strategy, settings, biased, multiplier):
    loss = DenoiserLossConfig(timesteps=(100, 300), timestep_bias=bias(strategy, multiplier=multiplier, **settings))
    times = draw(3, 0, 6000, (1, 1, 1), loss, 0).timesteps
    assert (times.min(), times.max()) == (100, 299)
    inside = ((times >= biased.start) & (times < biased.stop)).float().mean()
    weight = multiplier * len(biased)
    assert float(inside) == pytest.approx(weight / (weight + 200 - len(biased)), abs=0.03)


def test_a_bias_of_one_is_uniform_and_its_draws_are_the_exact_inverse():
    loss = DenoiserLossConfig(timesteps=(0, 4), timestep_bias=bias("later", portion=0.5, multiplier=3.0))
    chances = denoiser_loss_module._timestep_chances(loss)
    assert chances.tolist() == [1 / 8, 2 / 8, 5 / 8, 1.0]
    places = torch.tensor([0.0, 0.124, 0.125, 0.249, 0.25, 0.624, 0.625, 1 - 2.0**-53], dtype=torch.float64)
    assert denoiser_loss_module._inverse(chances, places).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    even = DenoiserLossConfig(timesteps=(0, 4), timestep_bias=bias("earlier", multiplier=1.0))
    assert denoiser_loss_module._timestep_chances(even).tolist() == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("prediction_type", PredictionType)
def test_min_snr_weighs_as_diffusers_does(prediction_type):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    config = DiffusionConfig(prediction_type=prediction_type)
    scheduler = DDPMScheduler(beta_start=config.beta_start, beta_end=config.beta_end, beta_schedule="scaled_linear")
    times = torch.tensor([0, 1, 150, 300, 500, 999])
    snr = compute_snr(scheduler, times)
    capped = snr.clamp(max=5.0)
    expected = capped / snr if prediction_type is PredictionType.EPSILON else capped / (snr + 1)
    found = min_snr_weight(Diffusion(config), times, 5.0)
    assert (found.shape, found.dtype) == ((6,), torch.float32)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=0)
    assert found[0] < 0.01 < found[2]


def test_min_snr_is_the_same_error_of_x0_for_both_predictions():
    latents, wrong, noise = (draw(0, first, 3, SHAPE, LOSS, 1).noise for first in (0, 3, 6))
    times, losses = torch.tensor([20, 300, 900]), []
    for prediction_type in PredictionType:
        diffusion = Diffusion(DiffusionConfig(prediction_type=prediction_type))
        noisy = diffusion.add_noise(latents, noise, times)
        a = diffusion.alphas_cumprod[times].view(-1, 1, 1, 1)
        implied = (noisy - a.sqrt() * wrong) / (1 - a).sqrt()  # the noise, if `wrong` were the image
        prediction = (
            implied if prediction_type is PredictionType.EPSILON else a.sqrt() * implied - (1 - a).sqrt() * wrong
        )
        error = denoiser_loss(prediction, diffusion.target(latents, noise, times))
        losses.append(min_snr_weight(diffusion, times, 5.0) * error)
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-6)


def test_min_snr_is_defined_where_the_signal_ends():
    diffusion = Diffusion(DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True))
    weights = min_snr_weight(diffusion, torch.arange(1000), 5.0)
    assert weights.isfinite().all()
    assert weights[-1] == 0
    assert weights.max() == pytest.approx(5 / 6, rel=1e-2)  # v weighs most where the ratio is gamma


def test_offset_noise_shifts_whole_channels():
    draws = draw(1, 0, 3, SHAPE, LOSS, 3)
    shift = offset_noise(draws.noise, 0.05, draws) - draws.noise
    torch.testing.assert_close(shift, 0.05 * draws.channel_noise.expand_as(shift), rtol=0, atol=1e-6)
    assert torch.equal(offset_noise(draws.noise, 0.0, draws), draws.noise)
