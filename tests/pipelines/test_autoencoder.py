"""What the VAE's task makes of a batch, with the networks themselves in place of engines."""

from __future__ import annotations

import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import (
    LPIPS_PRESETS,
    VAELossConfig,
)
from model.lpips import LPIPS
from model.metrics import psnr, ssim
from model.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    divergence_loss,
    hinge_loss,
    last_layer_gradients,
    reconstruction_loss,
)
from pipelines import networks
from pipelines.config import LPIPSWeightsConfig, SourceConfig, WeightsConfig
from pipelines.storage import Storage, StorageOptions
from pipelines.train import autoencoder as autoencoder_module
from pipelines.train.autoencoder import VAETask
from pipelines.train.batches import ImageBatch
from pipelines.train.config import BatchConfig, VAETaskConfig

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
    """A task without a dataset: batches are handed to it."""
    monkeypatch.setattr(autoencoder_module, "require_manifest", lambda *_: Manifest)
    monkeypatch.setattr(autoencoder_module, "ImageReader", lambda *_, **__: None)


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


def autoencoder(lpips: LPIPSWeightsConfig | None = None, **loss) -> VAETask:
    config = VAETaskConfig(
        vae=WeightsConfig(preset="tiny", seed=1),
        discriminator="tiny",
        index="index",
        source=SourceConfig(path="images"),
        loss=VAELossConfig(**loss),
        lpips=lpips,
    )
    return VAETask(config, BATCH, "", StorageOptions(), CPU, output=Storage("run"))


def pictures(first: int = 0) -> ImageBatch:
    image = torch.rand(4, 3, *BUCKET, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return ImageBatch(first=first, bucket=BUCKET, image=image)


def engines(task: VAETask) -> dict[str, Direct]:
    return {name: Direct(network) for name, network in task.networks().items()}


def reconstructed(task: VAETask, batch: ImageBatch):
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
    weight = adaptive_weight(last_layer_gradients(nll.mean(), adversarial.mean(), vae.last_layer))
    torch.testing.assert_close(first.terms["adaptive_weight"], weight)
    expected = nll + 1e-6 * divergence_loss(posterior, batch.image) + 0.5 * weight * adversarial
    torch.testing.assert_close(first.per_sample, expected)
    assert set(first.terms) == {"reconstruction", "perceptual", "divergence", "adversarial", "adaptive_weight"}
    assert (first.engine, second.engine) == ("vae", "discriminator")
    torch.testing.assert_close(
        second.per_sample, hinge_loss(discriminator(batch.image), discriminator(reconstruction.detach()))
    )


def learnt(lpips: LPIPSWeightsConfig, sizes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The adversarial factors of a step that is cut into passes of these sizes, and the gradients of both networks."""
    task, whole = autoencoder(lpips, adversarial_start_images=4, adversarial_weight=0.5), pictures(first=4)
    passes, factors = [], []
    for start, stop in itertools.pairwise(np.cumsum((0, *sizes)).tolist()):
        weight = len(sizes) * (stop - start) / len(whole.image)
        passes.append((ImageBatch(4 + start, BUCKET, whole.image[start:stop]), weight))
    prepared = task.prepare(engines(task), passes)
    assert (prepared is None) == (len(sizes) == 1)  # nothing is made twice where one pass is all
    for batch, weight in passes:
        for loss in task.losses(engines(task), batch, prepared):
            (loss.per_sample.mean() * weight / len(sizes)).backward()
            factors += [loss.terms["adaptive_weight"]] if loss.engine == "vae" else []
    return factors, [value.grad for network in task.networks().values() for value in network.parameters()]


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1), (1, 1, 1, 1)])
def test_a_step_learns_the_same_however_it_is_cut_into_passes(sizes, lpips):
    (expected,), whole = learnt(lpips[0], (4,))
    factors, gradients = learnt(lpips[0], sizes)
    assert len(factors) == len(sizes)
    for factor in factors:
        torch.testing.assert_close(factor, expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(gradients, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


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
