"""The noise schedule, what the U-Net learns to predict, and the random draws of a training step.

With a = alphas_cumprod[t], the noisy latents are sqrt(a) x0 + sqrt(1 - a) noise (arXiv 2006.11239, eq. 4), and the
prediction is the noise or v = sqrt(a) noise - sqrt(1 - a) x0 (arXiv 2202.00512). Since the pair (noisy, v) is the pair
(x0, noise) turned by an angle, each follows from the others without a division, except x0 from the noise.

B batch, C latent channels, h w latent height and width
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model.config import DenoiserLossConfig, DiffusionConfig, PredictionType


class Diffusion:
    """The schedule of a DiffusionConfig, computed in fp64 and kept in fp32 on `device`.

    `alphas_cumprod` and `sigmas`, the noise's standard deviation over the signal's factor, are [num_timesteps].
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1.0 - root.square(), dim=0)
        self.alphas_cumprod = alphas_cumprod.to(device, torch.float32)
        self.sigmas = ((1.0 - alphas_cumprod) / alphas_cumprod).sqrt().to(device, torch.float32)
        self._signal = alphas_cumprod.sqrt().to(device, torch.float32)
        self._noise = (1.0 - alphas_cumprod).sqrt().to(device, torch.float32)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents [B,C,h,w] at `timesteps` [B] int64."""
        signal, sigma = self._factors(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict [B,C,h,w]."""
        if self.config.prediction_type is PredictionType.EPSILON:
            return noise
        signal, sigma = self._factors(timesteps, latents)
        return signal * noise - sigma * latents

    def predict_x0(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The noise-free latents [B,C,h,w] that a prediction implies."""
        signal, sigma = self._factors(timesteps, noisy_latents)
        if self.config.prediction_type is PredictionType.EPSILON:
            return (noisy_latents - sigma * prediction) / signal
        return signal * noisy_latents - sigma * prediction

    def prediction_to_epsilon(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The noise [B,C,h,w] that a prediction implies."""
        if self.config.prediction_type is PredictionType.EPSILON:
            return prediction
        signal, sigma = self._factors(timesteps, noisy_latents)
        return signal * prediction + sigma * noisy_latents

    def _factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a) at each timestep, [B,1,1,1] on the latents' device."""
        shape = (-1, *[1] * (like.ndim - 1))
        index = timesteps.to(self._signal.device)
        return self._signal[index].to(like.device).view(shape), self._noise[index].to(like.device).view(shape)


def denoiser_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error [B] in fp32, mean over channels and pixels (arXiv 2006.11239, eq. 14)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


@dataclass(frozen=True)
class Draws:
    """Everything random in one training step of base or refiner, one row per image."""

    posterior_noise: Tensor  # [B,C,h,w] picks the latents from the VAE's posterior
    noise: Tensor  # [B,C,h,w] unit Gaussian, before offset noise
    timesteps: Tensor  # [B] int64
    channel_noise: Tensor  # [B,C,1,1] unit Gaussian, for offset noise
    keep_context: Tensor  # [B] bool, False where the context is dropped
    keep_pooled: Tensor  # [B] bool, False where the pooled text is dropped
    keep_sizes: Tensor  # [B, conditions] bool, False where a size embedding is dropped


def draw(  # noqa: PLR0917 (its arguments are the coordinates of a draw)
    seed: int,
    first: int,
    count: int,
    shape: Sequence[int],
    loss: DenoiserLossConfig,
    conditions: int,
    device: torch.device | str = "cpu",
) -> Draws:
    """Draws for the images `first` to `first + count - 1` of a run, counted over all workers since its start.

    `shape` is one sample's (C, h, w). Row k depends on (seed, first + k) alone, so that a run that was resumed, or
    split over another number of workers, draws what an unbroken one draws. Numbers come from the CPU's generator on
    every device; the small ones come first, so they do not depend on the latents' size.
    """
    rows = []
    for index in range(first, first + count):
        generator = _generator("denoiser", seed, index)
        timestep = torch.randint(*loss.timesteps, (), generator=generator)
        chances = torch.rand(2 + conditions, generator=generator)
        channel_noise = torch.randn(shape[0], 1, 1, generator=generator)
        posterior_noise = torch.randn(*shape, generator=generator)
        noise = torch.randn(*shape, generator=generator)
        rows.append(
            Draws(
                posterior_noise=posterior_noise,
                noise=noise,
                timesteps=timestep,
                channel_noise=channel_noise,
                keep_context=chances[0] >= loss.text_dropout,
                keep_pooled=chances[1] >= loss.text_dropout,
                keep_sizes=chances[2:] >= loss.size_dropout,
            )
        )
    return Draws(**{f.name: torch.stack([getattr(row, f.name) for row in rows]).to(device) for f in fields(Draws)})


def offset_noise(noise: Tensor, level: float, draws: Draws) -> Tensor:
    """`noise` [B,C,h,w] plus `level` times one draw per sample and channel (SDXL 2.5; its last stage uses 0.05).

    A shift that a whole channel shares lets the network learn images that are dark or bright as a whole.
    """
    return noise + level * draws.channel_noise.to(noise)


def gaussian(seed: int, first: int, count: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Unit Gaussian noise [count, *shape]; row k depends on (seed, first + k) alone, as in `draw`."""
    rows = [torch.randn(*shape, generator=_generator("gaussian", seed, first + k)) for k in range(count)]
    return torch.stack(rows).to(device)


def _generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """A generator for one sample; the hash makes neighbouring indices and seeds unrelated."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8, person=purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
