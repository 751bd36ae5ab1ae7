"""The noise schedule, what the U-Net learns to predict, and random numbers that follow from an image's number.

With a = alphas_cumprod[t], the noisy latents are sqrt(a) x0 + sqrt(1 - a) noise (arXiv 2006.11239, eq. 4), and the
prediction is the noise or v = sqrt(a) noise - sqrt(1 - a) x0 (arXiv 2202.00512). Since the pair (noisy, v) is the pair
(x0, noise) turned by an angle, each follows from the others without a division, except x0 from the noise.

B batch, C latent channels, h w latent height and width
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import DiffusionConfig, PredictionType

LEAST_ALPHA_CUMPROD = 2.0**-24
"""What `sigmas` take for a signal of zero; the published schedules stay far above it."""


class Diffusion:
    """The schedule of a DiffusionConfig, computed in fp64 and kept in fp32 on `device`.

    `alphas_cumprod` and `sigmas`, the noise's standard deviation over the signal's factor, are [num_timesteps]. With
    zero_terminal_snr the last of alphas_cumprod is exactly 0, and add_noise, target and predict_x0 are exact there;
    the last of sigmas is not infinite but 4096, from alphas_cumprod held at 2**-24 or more, as published samplers
    that divide by sigma have it.
    """

    def __init__(self, config: DiffusionConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        root = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_timesteps, dtype=torch.float64)
        alphas_cumprod = torch.cumprod(1.0 - root.square(), dim=0)
        if config.zero_terminal_snr:
            alphas_cumprod = _to_zero_terminal_snr(alphas_cumprod)
        visible = alphas_cumprod.clamp(min=LEAST_ALPHA_CUMPROD)
        self.alphas_cumprod = alphas_cumprod.to(device, torch.float32)
        self.sigmas = ((1.0 - visible) / visible).sqrt().to(device, torch.float32)
        self._signal = alphas_cumprod.sqrt().to(device, torch.float32)
        self._noise = (1.0 - alphas_cumprod).sqrt().to(device, torch.float32)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents [B,C,h,w] at `timesteps` [B] int64."""
        signal, sigma = self._factors(timesteps, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network should predict [B,C,h,w]."""
        if self.config.prediction_type == PredictionType.EPSILON:
            return noise
        signal, sigma = self._factors(timesteps, latents)
        return signal * noise - sigma * latents

    def predict_x0(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The noise-free latents [B,C,h,w] that a prediction implies."""
        signal, sigma = self._factors(timesteps, noisy_latents)
        if self.config.prediction_type == PredictionType.EPSILON:
            return (noisy_latents - sigma * prediction) / signal
        return signal * noisy_latents - sigma * prediction

    def prediction_to_epsilon(self, noisy_latents: Tensor, prediction: Tensor, timesteps: Tensor) -> Tensor:
        """The noise [B,C,h,w] that a prediction implies."""
        if self.config.prediction_type == PredictionType.EPSILON:
            return prediction
        signal, sigma = self._factors(timesteps, noisy_latents)
        return signal * prediction + sigma * noisy_latents

    def _factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a) at each timestep, [B,1,1,1] on the latents' device."""
        shape = (-1, *[1] * (like.ndim - 1))
        index = timesteps.to(self._signal.device)
        return self._signal[index].to(like.device).view(shape), self._noise[index].to(like.device).view(shape)


def _to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule whose signal's factor is shifted to end at 0 and scaled to begin as it did (2305.08891, alg. 1)."""
    signal = alphas_cumprod.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()


def gaussian(seed: int, first: int, count: int, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Unit Gaussian noise [count, *shape], one row or more; row k depends on (seed, first + k) alone."""
    rows = [torch.randn(*shape, generator=generator("gaussian", seed, first + k)) for k in range(count)]
    return torch.stack(rows).to(device)


def generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """The CPU's generator of one sample, for one purpose; the hash makes neighbouring indices and seeds unrelated.

    Raises ValueError for a seed beyond 64 bits.
    """
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed {seed} does not fit into 64 bits")
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8, person=purpose.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
