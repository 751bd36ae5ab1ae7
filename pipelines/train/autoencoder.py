"""The VAE in training: its loss against a discriminator, what validation measures, and the grids of reconstructions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.diffusion import gaussian
from model.metrics import psnr, ssim
from model.vae import VAE
from model.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    divergence_loss,
    hinge_loss,
    last_layer_gradients,
    perceptual_loss,
    reconstruction_loss,
)
from model.weights import Kind, save_weights
from pipelines import networks
from pipelines.config import Size, all_sources
from pipelines.originals import Originals
from pipelines.pictures import to_pixels
from pipelines.schema import require_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import DECODERS, Batch, ImageBatch, ImageReader, Reader
from pipelines.train.config import BatchConfig, VAETaskConfig
from pipelines.train.engine import Engine
from pipelines.train.lost import LostImages
from pipelines.train.operations import Operations
from pipelines.train.tasks import Loss, mean_over_workers, workers_there


@dataclass(frozen=True)
class Forward:
    """A micro-batch's forward pass."""

    image: Tensor  # [B,3,H,W]
    reconstruction: Tensor  # [B,3,H,W]
    error: Tensor  # [B] with the perceptual term
    terms: dict[str, Tensor]
    adversarial: Tensor | None  # [B], once it has joined
    last_layer: Tensor

    def gradients(self) -> Tensor:
        """Of reconstruction error and adversarial loss, at the decoder's last layer."""
        assert self.adversarial is not None
        return last_layer_gradients(self.error.mean(), self.adversarial.mean(), self.last_layer)


class VAETask:
    """The autoencoder against a patch discriminator (SDXL 2.4; arXiv 2112.10752, appendix G)."""

    def __init__(
        self,
        config: VAETaskConfig,
        batch: BatchConfig,
        pinned: str,
        options: StorageOptions,
        device: torch.device,
        *,
        output: Storage,
        decoders: int = DECODERS,
    ) -> None:
        """`pinned` is the digest of the index's manifest, `output` the run's folder, in which its images are listed;
        `decoders` images are decoded at a time."""
        index = Storage(config.index, options)
        manifest = require_manifest(index, "index", pinned)
        originals = Originals(all_sources(config.source, config.sources), options)
        max_pixels = int(manifest.fingerprint["max_pixels"])
        self.lost: LostImages | None = LostImages(config.lost_share, batch.validation_share)
        self.reader: Reader = ImageReader(output, originals, config.crop, max_pixels, lost=self.lost, decoders=decoders)
        self._config, self._batch, self._device = config, batch, device
        self._vae = networks.vae(config.vae, options)
        self._discriminator = networks.discriminator(config.discriminator, batch.seed)
        self._lpips = networks.lpips(config.lpips, options).to(device) if config.lpips else None

    def networks(self) -> dict[str, nn.Module]:
        """The VAE and its discriminator."""
        return {"vae": self._vae, "discriminator": self._discriminator}

    def prepare(self, engines: Mapping[str, Engine], passes: Sequence[tuple[Batch, float]]) -> Tensor | None:
        """The adversarial term's factor, of all images of a step, however they are cut into passes and over workers.

        It costs a forward pass. None where all workers have one pass of the same size, whose loss has what it takes.
        """
        even = self._batch.global_size % workers_there() == 0
        if not self._is_adversarial(passes[0][0]) or (len(passes) == 1 and even):
            return None
        gradients = torch.stack([self._forward(engines, batch).gradients() * weight for batch, weight in passes])
        return adaptive_weight(mean_over_workers(gradients.mean(0)))

    def losses(self, engines: Mapping[str, Engine], batch: Batch, prepared: Tensor | None = None) -> Iterator[Loss]:
        """The VAE's loss, and once the adversarial term has joined, the discriminator's on the same pictures.

        Where the task names the weights of LPIPS, its distance is part of the reconstruction error, which the
        adversarial term is compared with.
        """
        config = self._config.loss
        made = self._forward(engines, batch)
        total = made.error + config.kl_weight * made.terms["divergence"]  # [B]
        if made.adversarial is None:
            yield Loss("vae", total, made.terms)
            return
        weight = prepared if prepared is not None else adaptive_weight(mean_over_workers(made.gradients()))
        total = total + config.adversarial_weight * weight * made.adversarial  # [B]
        yield Loss("vae", total, made.terms | {"adversarial": made.adversarial, "adaptive_weight": weight})
        both = torch.cat([made.image, made.reconstruction.detach().to(made.image)])  # [2B,3,H,W]
        real, fake = engines["discriminator"](both).chunk(2)  # [B,1,h,w]
        yield Loss("discriminator", hinge_loss(real, fake), {})

    def _forward(self, engines: Mapping[str, Engine], batch: Batch) -> Forward:
        """What a micro-batch comes to, up to the adversarial term's factor."""
        assert isinstance(batch, ImageBatch)
        image = batch.image.to(self._device)  # [B,3,H,W]
        reconstruction, posterior = engines["vae"](image, self._posterior_noise(batch))  # [B,3,H,W]
        error = reconstruction_loss(image, reconstruction)  # [B]
        terms = {"reconstruction": error, "divergence": divergence_loss(posterior, image)}
        if self._lpips is not None:
            self._lpips.activation_checkpointing = self._vae.activation_checkpointing
            distance = self._lpips(image, reconstruction)  # [B]
            error = error + self._config.loss.perceptual_weight * perceptual_loss(distance, image)  # [B]
            terms["perceptual"] = distance
        adversarial = None
        if self._is_adversarial(batch):
            discriminator = engines["discriminator"]
            discriminator.network.requires_grad_(False)
            adversarial = adversarial_loss(discriminator(reconstruction))  # [B]
            discriminator.network.requires_grad_(True)
        return Forward(image, reconstruction, error, terms, adversarial, self._vae.last_layer)

    def _is_adversarial(self, batch: Batch) -> bool:
        """Whether the term has joined before this step, of all workers."""
        begun = batch.first - batch.first % self._batch.global_size
        return begun >= self._config.loss.adversarial_start_images

    @torch.no_grad()
    def validate(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """How far the reconstructions are from the images, decoded from the posterior's mean: no noise enters."""
        assert isinstance(network, VAE)
        assert isinstance(batch, ImageBatch)
        image = batch.image.to(self._device)  # [B,3,H,W]
        reconstruction = network.decode(network.encode(image).mean).float()  # [B,3,H,W]
        numbers = {
            "validation/reconstruction": reconstruction_loss(image, reconstruction),
            "validation/psnr": psnr(image, reconstruction),
            "validation/ssim": ssim(image, reconstruction),
        }
        if self._lpips is not None:
            numbers["validation/lpips"] = self._lpips(image, reconstruction)
        return numbers

    @torch.no_grad()
    def samples(self, network: nn.Module, batch: Batch, numbers: Sequence[int]) -> np.ndarray:
        """The images, and their reconstructions."""
        assert isinstance(batch, ImageBatch)
        image = batch.image.to(self._device)
        noise = torch.cat([self._noise(number, 1, batch.bucket) for number in numbers])
        reconstruction, _ = network(image, noise)
        return np.stack([to_pixels(image), to_pixels(reconstruction)])

    @torch.no_grad()
    def export(self, network: nn.Module, weights: Mapping[str, Tensor], batches: Iterator[Batch], path: Path) -> None:
        """Write the VAE, with one over the deviation of its latents as the scaling factor."""
        assert isinstance(network, VAE)
        count, total, squares, seen = 0, 0.0, 0.0, 0
        while seen < self._config.scaling_images:
            batch = next(batches)
            assert isinstance(batch, ImageBatch)
            posterior = network.encode(batch.image.to(self._device))
            count += posterior.mean.numel()
            total += float(posterior.mean.double().sum())
            squares += float((posterior.mean.double().square() + posterior.std.double().square()).sum())
            seen += len(batch.image)
        deviation = (squares / count - (total / count) ** 2) ** 0.5
        config = replace(self._vae.config, scaling_factor=1 / deviation)
        save_weights(path, weights, Kind.VAE, config, {"scaling_images": seen})

    def operations(self) -> Operations:
        """Of the VAE; discriminator and LPIPS are left out."""
        return Operations(self._vae.config, 1)

    def before_samples(self) -> None:
        """There is nothing to get ready."""

    def _posterior_noise(self, batch: ImageBatch) -> Tensor:
        return self._noise(batch.first, len(batch.image), batch.bucket)

    def _noise(self, first: int, count: int, bucket: Size) -> Tensor:
        """Noise of the posteriors of images `first` and following, [count,4,h,w]."""
        shape = (self._vae.config.latent_channels, *(side // self._vae.config.downsample for side in bucket))
        return gaussian(self._batch.seed, first, count, shape, self._device)
