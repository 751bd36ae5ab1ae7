"""Base and refiner in training: the loss on latents, what validation measures, and the grids of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model.conditioning import conditioning_vector, select_context
from model.config import Conditioning, DenoiserLossConfig
from model.denoiser_loss import Draws, denoiser_loss, draw, drop_text, min_snr_weight, offset_noise
from model.diffusion import Diffusion, gaussian
from model.sampler import step_noise
from model.text import TextEncoders, TextFeatures, Tokens, tokenize
from model.unet import UNet
from model.vae import VAE, scale, unscale
from model.weights import Kind, save_weights
from pipelines import networks
from pipelines.pictures import to_pixels
from pipelines.sampling import Told, base_denoiser, generate, refine, refiner_denoiser
from pipelines.schema import require_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import Batch, LatentBatch, LatentReader, Reader
from pipelines.train.config import BatchConfig, DenoiserTaskConfig
from pipelines.train.engine import Engine
from pipelines.train.lost import LostImages
from pipelines.train.operations import Operations
from pipelines.train.tasks import Loss, from_worker_0

GOLDEN_RATIO = (5**0.5 - 1) / 2


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
        self._empty_prompt: tuple[Tensor, Tensor] | None = None

    def networks(self) -> dict[str, nn.Module]:
        """The U-Net."""
        return {"unet": self._unet}

    def prepare(self, engines: Mapping[str, Engine], passes: Sequence[tuple[Batch, float]]) -> None:
        """A sample's loss depends on no other."""

    def losses(self, engines: Mapping[str, Engine], batch: Batch, prepared: Tensor | None = None) -> Iterator[Loss]:
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

    def before_samples(self) -> None:
        """The refiner is guided away from the empty prompt, which worker 0 encodes: text encoders are large."""
        if self._empty_prompt is None and Conditioning.AESTHETIC_SCORE in self._unet.config.conditioning:
            self._empty_prompt = from_worker_0(self._encoded_empty_prompt)

    def samples(self, network: nn.Module, batch: Batch, numbers: Sequence[int]) -> np.ndarray:
        """The rows' images through the VAE, and what the base makes of their captions, or the refiner of the same
        latents, noised to its first timestep."""
        assert isinstance(network, UNet)
        assert isinstance(batch, LatentBatch)
        batch = self._on_device(batch)
        vae = self._frozen_vae
        draws = [gaussian(self._batch.seed, number, 1, batch.mean.shape[1:], self._device) for number in numbers]
        noise = torch.cat(draws)  # [B,4,h,w]
        # Pictures are asked for the config's aesthetic score, not for their own rows'.
        sizes = dict(batch.conditions)
        sizes.pop(Conditioning.AESTHETIC_SCORE, None)
        told = Told(TextFeatures(batch.context, batch.pooled), sizes)
        sampling = self._config.samples
        latents = batch.mean * self._scaling_factor
        fresh = step_noise([(self._batch.seed, row) for row in numbers], latents.shape[1:], self._device)
        if Conditioning.AESTHETIC_SCORE in network.config.conditioning:
            self.before_samples()
            assert self._empty_prompt is not None
            context, pooled = (part.to(self._device) for part in self._empty_prompt)
            empty = TextFeatures(context.expand(len(noise), -1, -1), pooled.expand(len(noise), -1))
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
        return np.stack(pictures)

    def operations(self) -> Operations:
        """Of the U-Net."""
        return Operations(self._unet.config, networks.vae_config(self._config.vae).downsample)

    @cached_property
    def _frozen_vae(self) -> VAE:
        """The VAE that decodes samples; loaded when it is first asked for, on each worker that samples."""
        return networks.vae(self._config.vae, self._options).to(self._device).eval()

    @cached_property
    def _text_encoders(self) -> TextEncoders:
        """What encodes tokens, in the type that the latents were made in; each worker has its own."""
        dtype = getattr(torch, self._made_by["dtype"])
        return networks.text_encoders(self._config.text, self._options, dtype, self._device)

    def _encoded_empty_prompt(self) -> tuple[Tensor, Tensor]:
        """The encoded empty prompt, [1,77,D] and [1,P], on the CPU; the encoders are dropped again."""
        encoders = networks.text_encoders(self._config.text, self._options)
        empty = encoders(tokenize([""], encoders.config))
        return empty.context, empty.pooled

    def export(self, network: nn.Module, weights: Mapping[str, Tensor], batches: Iterator[Batch], path: Path) -> None:
        """Write the U-Net."""
        save_weights(path, weights, Kind.UNET, self._unet.config, asdict(self._config.diffusion))


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
