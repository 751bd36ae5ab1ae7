"""What each network learns: a task turns a batch into losses per sample, and averaged weights into pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from model.conditioning import conditioning_vector, select_context
from model.config import Conditioning, DenoiserLossConfig
from model.denoiser_loss import Draws, denoiser_loss, draw, drop_text, min_snr_weight, offset_noise
from model.diffusion import Diffusion, gaussian
from model.metrics import psnr, ssim
from model.sampler import step_noise
from model.text import TextEncoders, TextFeatures, Tokens, tokenize
from model.unet import UNet
from model.vae import VAE, scale, unscale
from model.vae_loss import (
    adaptive_weight,
    adversarial_loss,
    divergence_loss,
    hinge_loss,
    perceptual_loss,
    reconstruction_loss,
)
from model.weights import Kind, save_weights
from pipelines import networks
from pipelines.config import all_sources
from pipelines.originals import Originals
from pipelines.pictures import grid, to_pixels
from pipelines.sampling import Told, base_denoiser, generate, refine, refiner_denoiser
from pipelines.schema import require_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import DECODERS, Batch, ImageBatch, ImageReader, LatentBatch, LatentReader, Reader
from pipelines.train.config import BatchConfig, DenoiserTaskConfig, VAETaskConfig
from pipelines.train.engine import Engine
from pipelines.train.lost import LostImages
from pipelines.train.operations import Operations

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Loss:
    """One network's loss on a micro-batch."""

    engine: str
    """Name of the network that learns from it."""
    per_sample: Tensor  # [B]
    terms: Mapping[str, Tensor]
    """Parts of it, per sample or scalar, for the curves."""
    shares: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Curves over some of the samples: values [B], and which of them count [B]."""


class Task(Protocol):
    """What the loop asks of VAE, base and refiner."""

    reader: Reader
    """What reads the task's dataset."""
    lost: LostImages | None
    """What it could not read; None where nothing can be lost."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by name."""
        ...

    def losses(self, engines: Mapping[str, Engine], batch: Batch) -> Iterator[Loss]:
        """The losses of a micro-batch, one after another: each is learnt from before the next is made."""
        ...

    def validate(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """What the averaged weights make of held-out rows, by curve: values [B] that depend on nothing but the rows'
        numbers and the seed."""
        ...

    def samples(self, network: nn.Module, batch: Batch, *, same_noise: bool = False) -> np.ndarray:
        """Pictures from the averaged weights, uint8 [H, W, 3]; with `same_noise` all rows begin with the first's."""
        ...

    def operations(self) -> Operations:
        """What training of the averaged network costs."""
        ...

    def export(self, network: nn.Module, weights: Mapping[str, Tensor], batches: Iterator[Batch], path: Path) -> None:
        """Write the averaged `weights`, in fp32; `network` computes with them, `batches` are there to measure on."""
        ...


class DenoiserTask:
    """Base and refiner: predict the noise in latents, given text and sizes (SDXL 2.2, 2.5)."""

    lost: LostImages | None = None

    def __init__(
        self,
        config: DenoiserTaskConfig,
        batch: BatchConfig,
        pinned: str,
        options: StorageOptions,
        device: torch.device,
    ) -> None:
        """`pinned` is the digest of the latents' manifest."""
        dataset = Storage(config.latents, options)
        manifest = require_manifest(dataset, "latents", pinned)
        self.reader: Reader = LatentReader(dataset, manifest, batch.seed, device.type == "cuda")
        self._config, self._batch, self._options, self._device = config, batch, options, device
        self._made_by = manifest.fingerprint
        self._scaling_factor = float(manifest.facts["vae"]["scaling_factor"])
        self._clip_l_width = networks.text_config(config.text).clip_l.width
        self._unet = networks.unet(config.unet, options)
        self._diffusion = Diffusion(config.diffusion, device)

    def networks(self) -> dict[str, nn.Module]:
        """The U-Net."""
        return {"unet": self._unet}

    def losses(self, engines: Mapping[str, Engine], batch: Batch) -> Iterator[Loss]:
        """Squared error of the prediction, per sample; where min-SNR weighs it, unweighted for the curves as well.

        Each quarter of the drawn timesteps has a curve of its own: a mean over all hides what happens at low noise.
        """
        assert isinstance(batch, LatentBatch)
        config = self._config.loss
        draws = self._draws(batch, config)
        error = self._error(engines["unet"], self._on_device(batch), draws)  # [B]
        shares = by_quarter(error, draws.timesteps, config.timesteps)
        if config.min_snr_gamma is None:
            yield Loss("unet", error, {}, shares)
            return
        weight = min_snr_weight(self._diffusion, draws.timesteps, config.min_snr_gamma)  # [B]
        yield Loss("unet", weight * error, {"squared_error": error}, shares)

    @torch.no_grad()
    def validate(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The squared error [B] at one timestep in each quarter, and its mean over the quarters; nothing is dropped.

        A row's place in the quarters follows from its number by the golden ratio, which spreads few rows and many
        evenly; noise and posterior are drawn by its number as well.
        """
        assert isinstance(batch, LatentBatch)
        kept = replace(self._config.loss, caption_dropout=0.0, text_dropout=0.0, size_dropout=0.0)
        draws = self._draws(batch, kept)
        batch = self._on_device(batch)
        numbers = torch.arange(batch.first, batch.first + len(batch.mean), dtype=torch.float64, device=self._device)
        place = ((numbers + 0.5) * GOLDEN_RATIO) % 1.0  # [B]
        (first, end), errors = kept.timesteps, {}
        mean = torch.zeros(len(batch.mean), device=self._device)  # [B]
        for low, high in quarters(first, end):
            timesteps = low + (place * (high - low)).long()
            error = self._error(network, batch, replace(draws, timesteps=timesteps))
            errors[f"validation/squared_error_timesteps_{low}_to_{high - 1}"] = error
            mean += error * ((high - low) / (end - first))
        return {"validation/squared_error": mean, **errors}

    def _on_device(self, batch: LatentBatch) -> LatentBatch:
        """The batch on the device; where the dataset holds tokens, with the text that it would hold in their place."""
        moved = to_device(batch, self._device)
        if moved.tokens is None:
            return moved
        features = self._text_encoders(Tokens(clip_l=moved.tokens[:, 0], bigg=moved.tokens[:, 1]))
        context, pooled = (tensor.half().float() for tensor in (features.context, features.pooled))
        return replace(moved, context=context, pooled=pooled, tokens=None)

    def _draws(self, batch: LatentBatch, config: DenoiserLossConfig) -> Draws:
        size, shape, sizes = len(batch.mean), batch.mean.shape[1:], len(self._unet.config.conditioning)
        return draw(self._batch.seed, batch.first, size, shape, config, sizes, self._device)

    def _error(self, predict: Callable[..., Tensor], batch: LatentBatch, draws: Draws) -> Tensor:
        """Squared error [B] of the prediction for a batch, on the device, at what was drawn."""
        unet = self._unet.config
        latents = scale(batch.mean, batch.std, draws.posterior_noise, self._scaling_factor)  # [B,4,h,w]
        noise = offset_noise(draws.noise, self._config.loss.offset_noise, draws)  # [B,4,h,w]
        noisy_latents = self._diffusion.add_noise(latents, noise, draws.timesteps)  # [B,4,h,w]
        context, pooled = drop_text(batch.context, batch.pooled, draws, self._clip_l_width)  # [B,77,2048], [B,P]
        context = select_context(context, unet)  # [B,77,D]
        vector = conditioning_vector(pooled, batch.conditions, unet, draws.keep_sizes)  # [B,V]
        prediction = predict(noisy_latents, draws.timesteps, context, vector)  # [B,4,h,w]
        return denoiser_loss(prediction, self._diffusion.target(latents, noise, draws.timesteps))

    def samples(self, network: nn.Module, batch: Batch, *, same_noise: bool = False) -> np.ndarray:
        """The rows' images through the VAE, and below them: the base's own pictures for their captions, or the
        refiner's of the same latents, noised to its first timestep."""
        assert isinstance(network, UNet)
        assert isinstance(batch, LatentBatch)
        batch = self._on_device(batch)
        vae = self._frozen_vae
        noise = gaussian(self._batch.seed, 0, len(batch.mean), batch.mean.shape[1:], self._device)
        numbers = [0] * len(noise) if same_noise else range(len(noise))
        noise = noise[list(numbers)]
        # Pictures are asked for the config's aesthetic score, not for their own rows'.
        sizes = dict(batch.conditions)
        sizes.pop(Conditioning.AESTHETIC_SCORE, None)
        told = Told(TextFeatures(batch.context, batch.pooled), sizes)
        sampling = self._config.samples
        latents = batch.mean * self._scaling_factor
        fresh = step_noise([(self._batch.seed, row) for row in numbers], latents.shape[1:], self._device)
        if Conditioning.AESTHETIC_SCORE in network.config.conditioning:
            one, count = self._empty_prompt, len(batch.mean)
            empty = TextFeatures(one.context.expand(count, -1, -1), one.pooled.expand(count, -1))
            denoise = refiner_denoiser(network, self._diffusion, told, Told(empty, sizes), sampling)
            made = refine(denoise, latents, noise, self._diffusion, sampling, fresh)
        else:
            denoise = base_denoiser(network, self._diffusion, told, None, sampling)
            made = generate(denoise, None, noise, self._diffusion, sampling, fresh)
        with torch.no_grad():  # one picture at a time: decoding takes the most memory
            pictures = [
                np.concatenate([to_pixels(vae.decode(unscale(x, self._scaling_factor))) for x in row.split(1)])
                for row in (latents, made)
            ]
        return grid(pictures)

    def operations(self) -> Operations:
        """Of the U-Net."""
        return Operations(self._unet.config, networks.vae_config(self._config.vae).downsample)

    @cached_property
    def _frozen_vae(self) -> VAE:
        """The VAE that decodes samples; loaded when it is first asked for, on the worker that samples."""
        return networks.vae(self._config.vae, self._options).to(self._device).eval()

    @cached_property
    def _text_encoders(self) -> TextEncoders:
        """What encodes tokens, in the type that the latents were made in; each worker has its own."""
        dtype = getattr(torch, self._made_by["dtype"])
        return networks.text_encoders(self._config.text, self._options, dtype, self._device)

    @cached_property
    def _empty_prompt(self) -> TextFeatures:
        """The encoded empty prompt, [1,77,D] and [1,P]; the encoders are dropped again."""
        encoders = networks.text_encoders(self._config.text, self._options)
        empty = encoders(tokenize([""], encoders.config))
        return TextFeatures(empty.context.to(self._device), empty.pooled.to(self._device))

    def export(self, network: nn.Module, weights: Mapping[str, Tensor], batches: Iterator[Batch], path: Path) -> None:
        """Write the U-Net."""
        save_weights(path, weights, Kind.UNET, self._unet.config, asdict(self._config.diffusion))


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

    def losses(self, engines: Mapping[str, Engine], batch: Batch) -> Iterator[Loss]:
        """The VAE's loss, and once the adversarial term has joined, the discriminator's on the same pictures.

        Where the task names the weights of LPIPS, its distance is part of the reconstruction error, which the
        adversarial term is compared with.
        """
        assert isinstance(batch, ImageBatch)
        config = self._config.loss
        image = batch.image.to(self._device)  # [B,3,H,W]
        noise = self._posterior_noise(batch)  # [B,4,h,w]
        reconstruction, posterior = engines["vae"](image, noise)  # [B,3,H,W]
        error = reconstruction_loss(image, reconstruction)  # [B]
        divergence = divergence_loss(posterior, image)  # [B]
        terms = {"reconstruction": error, "divergence": divergence}
        if self._lpips is not None:
            self._lpips.activation_checkpointing = self._vae.activation_checkpointing
            distance = self._lpips(image, reconstruction)  # [B]
            error = error + config.perceptual_weight * perceptual_loss(distance, image)  # [B]
            terms["perceptual"] = distance
        total = error + config.kl_weight * divergence  # [B]
        begun = batch.first - batch.first % self._batch.global_size  # images seen before this step, on every worker
        if begun < config.adversarial_start_images:
            yield Loss("vae", total, terms)
            return
        discriminator = engines["discriminator"]
        discriminator.network.requires_grad_(False)
        adversarial = adversarial_loss(discriminator(reconstruction))  # [B]
        weight = adaptive_weight(error.mean(), adversarial.mean(), self._vae.last_layer, mean_over_workers)
        total = total + config.adversarial_weight * weight * adversarial  # [B]
        yield Loss("vae", total, terms | {"adversarial": adversarial, "adaptive_weight": weight})
        discriminator.network.requires_grad_(True)
        real, fake = discriminator(torch.cat([image, reconstruction.detach().to(image)])).chunk(2)  # [B,1,h,w]
        yield Loss("discriminator", hinge_loss(real, fake), {})

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
    def samples(self, network: nn.Module, batch: Batch, *, same_noise: bool = False) -> np.ndarray:
        """The images, and below them their reconstructions."""
        assert isinstance(batch, ImageBatch)
        image = batch.image.to(self._device)
        reconstruction, _ = network(image, self._posterior_noise(batch))
        return grid([to_pixels(image), to_pixels(reconstruction)])

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

    def _posterior_noise(self, batch: ImageBatch) -> Tensor:
        size, _, height, width = batch.image.shape
        down = self._vae.config.downsample
        shape = (self._vae.config.latent_channels, height // down, width // down)
        return gaussian(self._batch.seed, batch.first, size, shape, self._device)


def by_quarter(error: Tensor, timesteps: Tensor, drawn: tuple[int, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Curves of the error [B] by quarter of the range `drawn` (first, one past the last) that the timesteps [B] lie in,
    named by the quarter's first and last timestep."""
    return {
        f"squared_error_timesteps_{low}_to_{high - 1}": (error, (timesteps >= low) & (timesteps < high))
        for low, high in quarters(*drawn)
    }


def quarters(first: int, end: int) -> list[tuple[int, int]]:
    """The quarters (first, one past the last) of a range of timesteps; of fewer than four timesteps, as many."""
    edges = [first + (end - first) * quarter // 4 for quarter in range(5)]
    return [(low, high) for low, high in pairwise(edges) if low < high]


def mean_over_workers(value: Tensor) -> Tensor:
    """The mean of a tensor over all workers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def to_device(batch: LatentBatch, device: torch.device) -> LatentBatch:
    """The batch on a device, in fp32; it travels as fp16."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True).float()

    return replace(
        batch,
        mean=moved(batch.mean),
        std=moved(batch.std),
        context=moved(batch.context),
        pooled=moved(batch.pooled),
        conditions={name: moved(value) for name, value in batch.conditions.items()},
        tokens=None if batch.tokens is None else batch.tokens.to(device, non_blocking=True),
    )
