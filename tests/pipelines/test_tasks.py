"""What the tasks make of a batch, with the networks themselves in place of engines."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model import denoiser_loss as losses
from model.conditioning import conditioning_vector
from model.config import (
    LPIPS_PRESETS,
    UNET_PRESETS,
    Conditioning,
    DenoiserLossConfig,
    DiffusionConfig,
    PredictionType,
    VAELossConfig,
)
from model.lpips import LPIPS
from model.metrics import psnr, ssim
from model.text import tokenize
from model.vae import scale
from model.vae_loss import adaptive_weight, adversarial_loss, divergence_loss, hinge_loss, reconstruction_loss
from pipelines import networks
from pipelines.config import LPIPSWeightsConfig, SamplingConfig, SourceConfig, TextWeightsConfig, WeightsConfig
from pipelines.schema import DataFile
from pipelines.storage import Storage, StorageOptions
from pipelines.train import outputs, tasks
from pipelines.train.batches import ImageBatch, LatentBatch
from pipelines.train.config import BatchConfig, DenoiserTaskConfig, VAETaskConfig

BATCH = BatchConfig(global_size=4, micro_size=4, seed=3)
CPU = torch.device("cpu")
BUCKET = (16, 24)


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
    """Tasks without datasets: batches are handed to them."""
    monkeypatch.setattr(tasks, "require_manifest", lambda *_: Manifest)
    monkeypatch.setattr(tasks, "LatentReader", lambda *_: None)
    monkeypatch.setattr(tasks, "ImageReader", lambda *_, **__: None)


def denoiser(preset: str = "tiny-base", **settings) -> tasks.DenoiserTask:
    config = DenoiserTaskConfig(
        unet=WeightsConfig(preset=preset),
        latents="latents",
        vae=WeightsConfig(preset="tiny"),
        text=TextWeightsConfig(preset="tiny", seed=0),
        **settings,
    )
    task = tasks.DenoiserTask(config, BATCH, "", StorageOptions(), CPU)
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


def denoiser_loss(task: tasks.DenoiserTask, batch: LatentBatch) -> tasks.Loss:
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


@pytest.fixture
def lpips(tmp_path) -> tuple[LPIPSWeightsConfig, LPIPS]:
    torch.manual_seed(1)
    network = LPIPS(LPIPS_PRESETS["tiny"])
    for name, prefix in (("trunk", "features."), ("heads", "lin")):
        part = {key: value for key, value in network.state_dict().items() if key.startswith(prefix)}
        save_file(part, tmp_path / f"{name}.safetensors")
    config = LPIPSWeightsConfig(
        preset="tiny", trunk=f"{tmp_path}/trunk.safetensors", heads=f"{tmp_path}/heads.safetensors"
    )
    return config, network


def autoencoder(lpips: LPIPSWeightsConfig | None = None, **loss) -> tasks.VAETask:
    config = VAETaskConfig(
        vae=WeightsConfig(preset="tiny", seed=1),
        discriminator="tiny",
        index="index",
        source=SourceConfig(path="images"),
        loss=VAELossConfig(**loss),
        lpips=lpips,
    )
    return tasks.VAETask(config, BATCH, "", StorageOptions(), CPU, output=Storage("run"))


def pictures(first: int = 0) -> ImageBatch:
    image = torch.rand(4, 3, *BUCKET, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return ImageBatch(first=first, bucket=BUCKET, image=image)


def engines(task: tasks.VAETask) -> dict[str, Direct]:
    return {name: Direct(network) for name, network in task.networks().items()}


def reconstructed(task: tasks.VAETask, batch: ImageBatch):
    return task.networks()["vae"](batch.image, task._posterior_noise(batch))


def test_a_vaes_loss_is_error_and_distance_and_divergence(lpips):
    config, network = lpips
    task, batch = autoencoder(config, perceptual_weight=0.7, kl_weight=0.1), pictures()
    (loss,) = task.losses(engines(task), batch)
    reconstruction, posterior = reconstructed(task, batch)
    error, divergence = reconstruction_loss(batch.image, reconstruction), divergence_loss(posterior, batch.image)
    distance = network(batch.image, reconstruction)
    torch.testing.assert_close(loss.per_sample, error + 0.7 * 3 * distance + 0.1 * divergence)
    assert set(loss.terms) == {"reconstruction", "perceptual", "divergence"}
    torch.testing.assert_close(loss.terms["perceptual"], distance)
    torch.testing.assert_close(loss.terms["reconstruction"], error)


def test_without_weights_of_lpips_there_is_no_perceptual_term():
    task, batch = autoencoder(), pictures()
    (loss,) = task.losses(engines(task), batch)
    reconstruction, posterior = reconstructed(task, batch)
    expected = reconstruction_loss(batch.image, reconstruction) + 1e-6 * divergence_loss(posterior, batch.image)
    torch.testing.assert_close(loss.per_sample, expected)
    assert "perceptual" not in loss.terms


def test_a_samples_loss_does_not_depend_on_its_neighbours(lpips):
    task, batch = autoencoder(lpips[0], kl_weight=0.1), pictures()
    (whole,) = task.losses(engines(task), batch)
    (alone,) = task.losses(engines(task), ImageBatch(first=2, bucket=BUCKET, image=batch.image[2:3]))
    torch.testing.assert_close(alone.per_sample[0], whole.per_sample[2])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_perceptual_network_is_frozen_and_the_vae_learns_from_it(lpips, checkpointing):
    gradients = []
    for weight in (0.0, 1.0):
        task = autoencoder(lpips[0], perceptual_weight=weight)
        vae = task.networks()["vae"]
        vae.activation_checkpointing = checkpointing
        (loss,) = task.losses(engines(task), pictures())
        loss.per_sample.mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in vae.parameters()]))
        assert all(parameter.grad is None for parameter in task._lpips.parameters())
        assert task._lpips.activation_checkpointing == checkpointing
    assert not torch.allclose(*gradients)
    assert list(task.networks()) == ["vae", "discriminator"]  # the first is averaged and exported; LPIPS is no part


def test_the_adversarial_term_is_weighed_against_error_and_distance(lpips):
    config, network = lpips
    task, batch = autoencoder(config, adversarial_start_images=4, adversarial_weight=0.5), pictures(first=4)
    first, second = task.losses(engines(task), batch)
    vae, discriminator = task.networks().values()
    reconstruction, posterior = reconstructed(task, batch)
    nll = reconstruction_loss(batch.image, reconstruction) + 3 * network(batch.image, reconstruction)
    adversarial = adversarial_loss(discriminator(reconstruction))
    weight = adaptive_weight(nll.mean(), adversarial.mean(), vae.last_layer)
    torch.testing.assert_close(first.terms["adaptive_weight"], weight)
    expected = nll + 1e-6 * divergence_loss(posterior, batch.image) + 0.5 * weight * adversarial
    torch.testing.assert_close(first.per_sample, expected)
    assert set(first.terms) == {"reconstruction", "perceptual", "divergence", "adversarial", "adaptive_weight"}
    assert (first.engine, second.engine) == ("vae", "discriminator")
    torch.testing.assert_close(
        second.per_sample, hinge_loss(discriminator(batch.image), discriminator(reconstruction.detach()))
    )


@pytest.mark.parametrize(("first", "count"), [(0, 1), (3, 1), (4, 2), (7, 2)])
def test_the_adversarial_term_joins_at_its_image_for_a_whole_step(first, count):
    task = autoencoder(adversarial_start_images=4)
    assert len(list(task.losses(engines(task), pictures(first)))) == count


def test_files_of_lpips_that_are_missing_are_named(tmp_path):
    config = LPIPSWeightsConfig(trunk=f"{tmp_path}/trunk.safetensors", heads="heads.safetensors")
    with pytest.raises(FileNotFoundError, match=r"trunk.safetensors: there is no such file"):
        networks.lpips(config, StorageOptions())


def test_a_vae_learns_with_every_term(lpips):
    task, batch = autoencoder(lpips[0], adversarial_start_images=0, adversarial_weight=0.1), pictures()
    networks_ = task.networks()
    steps = {name: torch.optim.AdamW(network.parameters(), lr=2e-3) for name, network in networks_.items()}
    curve: list[dict[str, float]] = []
    for _ in range(15):
        for loss in task.losses(engines(task), batch):
            steps[loss.engine].zero_grad()
            loss.per_sample.mean().backward()
            steps[loss.engine].step()
            if loss.engine == "vae":
                curve.append({name: float(value.detach().mean()) for name, value in loss.terms.items()})
    for name in ("reconstruction", "perceptual"):
        assert curve[-1][name] < 0.9 * curve[0][name], name


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


def test_a_vaes_validation_is_that_of_its_means(lpips):
    config, network = lpips
    task, batch = autoencoder(config), pictures()
    vae = task.networks()["vae"]
    with torch.no_grad():
        made = vae.decode(vae.encode(batch.image).mean)
    found = task.validate(vae, batch)
    assert set(found) == {f"validation/{name}" for name in ("reconstruction", "psnr", "ssim", "lpips")}
    torch.testing.assert_close(found["validation/psnr"], psnr(batch.image, made))
    torch.testing.assert_close(found["validation/ssim"], ssim(batch.image, made))
    torch.testing.assert_close(found["validation/lpips"], network(batch.image, made))


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
    names = [name for name, _ in outputs.sample_pictures(task, network, sampled)]
    assert names == ["samples", "samples_32x48", "samples_by_original_size"]
    rows, sizes, (noisy, _, _, vectors) = len(seen[0][0]), outputs.ORIGINAL_SIZES, seen[-1]
    assert (rows, len(seen[1][0]), len(noisy)) == (8, 4, len(sizes))
    assert all(torch.equal(row, noisy[0]) for row in noisy)
    told = outputs.by_original_size(task.reader.read([[1, 0]], (32, 32), 0)).conditions[Conditioning.ORIGINAL_SIZE]
    assert told.tolist() == [[round(32 * share)] * 2 for share in sizes]
    assert len({tuple(vector.tolist()) for vector in vectors}) == len(sizes)
