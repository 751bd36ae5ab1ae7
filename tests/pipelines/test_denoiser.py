"""What base and refiner make of a batch, with the networks themselves in place of engines."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import denoiser_loss as losses
from model.conditioning import conditioning_vector
from model.config import (
    UNET_PRESETS,
    Conditioning,
    DenoiserLossConfig,
    DiffusionConfig,
    PredictionType,
)
from model.text import tokenize
from model.vae import scale
from pipelines import networks
from pipelines.config import SamplingConfig, TextWeightsConfig, WeightsConfig
from pipelines.schema import DataFile
from pipelines.storage import StorageOptions
from pipelines.train import denoiser as denoiser_module
from pipelines.train import outputs
from pipelines.train.batches import LatentBatch
from pipelines.train.config import BatchConfig, DenoiserTaskConfig
from pipelines.train.denoiser import DenoiserTask
from pipelines.train.tasks import Loss

BATCH = BatchConfig(global_size=4, micro_size=4, seed=3)
CPU = torch.device("cpu")


class Manifest:
    """As much of a manifest as a task reads."""

    facts: ClassVar = {"vae": {"scaling_factor": 0.5}}
    fingerprint: ClassVar = {"max_pixels": 1, "dtype": "float32"}


class Direct:
    """An engine's forward pass without an engine."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, *inputs: Tensor):
        return self.network(*inputs)


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    """A task without a dataset: batches are handed to it."""
    monkeypatch.setattr(denoiser_module, "require_manifest", lambda *_: Manifest)
    monkeypatch.setattr(denoiser_module, "LatentReader", lambda *_: None)


def denoiser(preset: str = "tiny-base", **settings) -> DenoiserTask:
    config = DenoiserTaskConfig(
        unet=WeightsConfig(preset=preset),
        latents="latents",
        vae=WeightsConfig(preset="tiny"),
        text=TextWeightsConfig(preset="tiny", seed=0),
        **settings,
    )
    task = DenoiserTask(config, BATCH, "", StorageOptions(), CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in task.networks()["unet"].parameters():
            if weight.ndim > 1 and not weight.any():
                weight.normal_(std=0.05)  # branches start at zero, where no input would show
    return task


def latents(count: int = 4) -> LatentBatch:
    draws = torch.Generator().manual_seed(1)
    return LatentBatch(
        first=8,
        bucket=(32, 48),
        mean=torch.randn(count, 4, 8, 12, generator=draws),
        std=torch.rand(count, 4, 8, 12, generator=draws),
        context=torch.randn(count, 77, 96, generator=draws),
        pooled=torch.randn(count, 64, generator=draws),
        conditions={name: torch.full((count, name.scalars), 32.0) for name in Conditioning},
    )


def denoiser_loss(task: DenoiserTask, batch: LatentBatch) -> Loss:
    with torch.no_grad():
        (loss,) = task.losses({name: Direct(network) for name, network in task.networks().items()}, batch)
    return loss


def test_tokens_train_as_the_embeddings_do_that_would_be_stored_in_their_place():
    task, batch = denoiser(loss=DenoiserLossConfig(caption_dropout=0.5)), latents()
    encoders = networks.text_encoders(TextWeightsConfig(preset="tiny", seed=0))
    tokens = tokenize(["a cat", "a dog", "", "a " * 99], encoders.config)
    features = encoders(tokens)
    stored = dataclasses.replace(batch, context=features.context.half(), pooled=features.pooled.half())
    none = torch.empty(4, 0)
    held = torch.stack([tokens.clip_l, tokens.bigg], dim=1)
    unread = dataclasses.replace(batch, context=none, pooled=none, tokens=held)
    assert torch.equal(denoiser_loss(task, unread).per_sample, denoiser_loss(task, stored).per_sample)
    assert not torch.equal(denoiser_loss(task, batch).per_sample, denoiser_loss(task, stored).per_sample)
    told = [outputs.by_original_size(one) for one in (unread, stored)]
    one, other = (task.validate(task.networks()["unet"], batch) for batch in told)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_denoisers_loss_is_the_error_at_what_was_drawn():
    config = DenoiserLossConfig(caption_dropout=0.5, text_dropout=0.3, size_dropout=0.5, offset_noise=0.1)
    task, batch = denoiser(loss=config), latents()
    found = denoiser_loss(task, batch)
    unet, diffusion = task.networks()["unet"], losses.Diffusion(DiffusionConfig())
    draws = losses.draw(BATCH.seed, batch.first, 4, (4, 8, 12), config, 3)
    clean = scale(batch.mean, batch.std, draws.posterior_noise, 0.5)
    noise = draws.noise + 0.1 * draws.channel_noise
    context = batch.context.clone()
    context[~draws.keep_clip_l, :, :32], context[~draws.keep_bigg, :, 32:] = 0, 0
    pooled = batch.pooled * draws.keep_pooled[:, None]
    vector = conditioning_vector(pooled, batch.conditions, UNET_PRESETS["tiny-base"], draws.keep_sizes)
    with torch.no_grad():
        prediction = unet(diffusion.add_noise(clean, noise, draws.timesteps), draws.timesteps, context, vector)
    torch.testing.assert_close(found.per_sample, (prediction - noise).square().mean((1, 2, 3)))
    assert (found.engine, found.per_sample.shape, dict(found.terms)) == ("unet", (4,), {})


@pytest.mark.parametrize("preset", ["tiny-base", "tiny-refiner"])
def test_a_dropped_caption_leaves_nothing_of_the_text(preset):
    task, batch = denoiser(preset, loss=DenoiserLossConfig(caption_dropout=1.0)), latents()
    other = dataclasses.replace(batch, context=batch.context + 1, pooled=batch.pooled - 1)
    assert torch.equal(denoiser_loss(task, batch).per_sample, denoiser_loss(task, other).per_sample)
    kept = denoiser(preset, loss=DenoiserLossConfig(caption_dropout=0.0))
    assert not torch.equal(denoiser_loss(kept, batch).per_sample, denoiser_loss(kept, other).per_sample)


def test_the_refiner_reads_nothing_of_clip_l():
    task, batch = denoiser("tiny-refiner"), latents()
    context = batch.context.clone()
    context[..., :32] = float("nan")
    other = dataclasses.replace(batch, context=context)
    assert torch.equal(denoiser_loss(task, batch).per_sample, denoiser_loss(task, other).per_sample)


@pytest.mark.parametrize("prediction_type", PredictionType)
def test_min_snr_weighs_each_sample_and_shows_the_error_without_it(prediction_type):
    diffusion = DiffusionConfig(prediction_type=prediction_type)
    plain = denoiser_loss(denoiser(diffusion=diffusion), latents())
    weighted = denoiser_loss(denoiser(diffusion=diffusion, loss=DenoiserLossConfig(min_snr_gamma=5.0)), latents())
    times = losses.draw(BATCH.seed, 8, 4, (4, 8, 12), DenoiserLossConfig(), 3).timesteps
    weight = losses.min_snr_weight(losses.Diffusion(diffusion), times, 5.0)
    torch.testing.assert_close(weighted.per_sample, weight * plain.per_sample)
    assert torch.equal(weighted.terms["squared_error"], plain.per_sample)


def test_a_zero_terminal_schedule_trains_with_finite_losses():
    diffusion = DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True)
    last = DenoiserLossConfig(timesteps=(999, 1000))
    assert denoiser_loss(denoiser(diffusion=diffusion, loss=last), latents()).per_sample.isfinite().all()


def test_validation_measures_the_same_error_wherever_its_rows_stand_in_a_batch():
    task = denoiser(loss=DenoiserLossConfig(caption_dropout=1.0, text_dropout=1.0, size_dropout=1.0))
    network, batch = task.networks()["unet"], latents()
    whole = task.validate(network, batch)
    names = [f"validation/squared_error_timesteps_{low}_to_{low + 249}" for low in (0, 250, 500, 750)]
    assert list(whole) == ["validation/squared_error", *names]
    torch.testing.assert_close(whole["validation/squared_error"], torch.stack([whole[n] for n in names]).mean(0))
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    last = {k: v[2:] for k, v in parts.items() if isinstance(v, Tensor)}
    conditions = {name: value[2:] for name, value in batch.conditions.items()}
    tail = dataclasses.replace(batch, first=batch.first + 2, conditions=conditions, **last)
    for name, errors in task.validate(network, tail).items():
        torch.testing.assert_close(errors, whole[name][2:])
    other = dataclasses.replace(batch, context=batch.context + 1)
    assert not torch.equal(task.validate(network, other)[names[0]], whole[names[0]])  # no caption is dropped


def test_validation_timesteps_lie_in_the_refiners_own_range():
    task = denoiser("tiny-refiner", loss=DenoiserLossConfig(timesteps=(0, 200)))
    seen: list[Tensor] = []
    network = task.networks()["unet"]
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    task.validate(network, latents())
    assert [bool(((t >= low) & (t < low + 50)).all()) for t, low in zip(seen, (0, 50, 100, 150), strict=True)] == [
        True
    ] * 4
    assert len(seen[0].unique()) == 4


class Grids:
    """A reader of three buckets, in files of these many rows."""

    files: ClassVar = [
        DataFile(name="a", rows=3, bucket=(32, 48)),
        DataFile(name="b", rows=12, bucket=(32, 32)),
        DataFile(name="c", rows=4, bucket=(32, 48)),
        DataFile(name="d", rows=1, bucket=(48, 32)),
    ]

    def read(self, rows, bucket, first):
        batch = latents(len(rows))
        height, width = (side // 4 for side in bucket)
        shape = (len(rows), 4, height, width)
        assert [self.files[file].bucket for file, _ in rows] == [bucket] * len(rows)
        return dataclasses.replace(batch, bucket=bucket, mean=torch.zeros(shape), std=torch.ones(shape))


def test_grids_show_the_buckets_with_the_most_rows_and_other_original_sizes_of_one_image():
    task = denoiser(samples=SamplingConfig(steps=1, scale=1.0))
    task.reader = Grids()
    seen: list[Tensor] = []
    network = task.networks()["unet"].eval()
    network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    sampled = outputs.sampled_rows(task.reader.files, 2)
    pictures = outputs.sample_pictures(task, network, sampled, rank=0, world=1, added=lambda cells: cells)
    assert list(pictures) == ["samples", "samples_32x48", "samples_by_original_size"]
    rows, sizes, (noisy, _, _, vectors) = len(seen[0][0]), outputs.ORIGINAL_SIZES, seen[-1]
    assert (rows, len(seen[1][0]), len(noisy)) == (8, 4, len(sizes))
    assert all(torch.equal(row, noisy[0]) for row in noisy)
    told = outputs.by_original_size(task.reader.read([[1, 0]], (32, 32), 0)).conditions[Conditioning.ORIGINAL_SIZE]
    assert told.tolist() == [[round(32 * share)] * 2 for share in sizes]
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(sizes)


@pytest.mark.parametrize(("preset", "world"), [("tiny-base", 3), ("tiny-base", 40), ("tiny-refiner", 3)])
def test_workers_take_turns_at_the_pictures_and_show_what_one_would(preset, world):
    task = denoiser(preset, samples=SamplingConfig(steps=2, scale=2.0, handover=200))
    task.reader = Grids()
    network = task.networks()["unet"].eval()
    sampled = outputs.sampled_rows(task.reader.files, 3)
    alone: dict[int, list[Tensor]] = {rank: [] for rank in range(world)}

    def drawn(rank: int, world: int, added) -> dict:
        return outputs.sample_pictures(task, network, sampled, rank=rank, world=world, added=added)

    expected = drawn(0, 1, lambda cells: cells)
    for rank in range(1, world):
        assert drawn(rank, world, lambda cells, rank=rank: alone[rank].append(cells) or cells) == {}
    grids = iter(zip(*(alone[rank] for rank in range(1, world)), strict=True))
    found = drawn(0, world, lambda cells: torch.stack([cells, *next(grids)]).sum(0, dtype=torch.uint8))
    assert list(found) == list(expected)
    for name, picture in found.items():  # passes of another size round differently
        assert np.abs(picture.astype(int) - expected[name]).max() <= 2


@pytest.mark.parametrize("world", [1, 3, 40])
def test_no_worker_draws_more_than_one_picture_more_than_another(world):
    grids = ((8, 0), (4, 8), (5, 12))  # pictures, and those of the grids before
    drawn = [[len(outputs.shares(*grid, rank, world)) for grid in grids] for rank in range(world)]
    assert [sum(column) for column in zip(*drawn, strict=True)] == [8, 4, 5]
    assert max(map(sum, drawn)) - min(map(sum, drawn)) <= 1
