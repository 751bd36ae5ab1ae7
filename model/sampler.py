"""Sampling: Euler steps down the noise levels, guidance, and the hand-over from base to refiner.

Here x is in sigma form, x = x0 + sigma * noise, which a step changes along a straight line (arXiv 2206.00364, eq. 4 and
algorithm 1 without its second order). The network sees it scaled to unit variance, x / sqrt(sigma^2 + 1).

B batch, C latent channels, h w latent height and width, T text tokens, D text width, V width of the vector
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.diffusion import Diffusion
from model.unet import UNet

Denoise = Callable[[Tensor, float, int], Tensor]
"""x [B,C,h,w], sigma, timestep -> x0 [B,C,h,w]."""

OnStep = Callable[[int, Tensor], None]
"""Told after each step: its timestep, and the new x."""


def sample(
    denoise: Denoise,
    x: Tensor,
    diffusion: Diffusion,
    timesteps: Sequence[int],
    *,
    until: int | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler steps through descending `timesteps`, from x [B,C,h,w] at the first one's noise level.

    The last step ends without noise, or, for another network to go on, at the noise level of timestep `until`.
    Raises ValueError for timesteps that do not descend.
    """
    levels = [*timesteps, *([] if until is None else [until])]
    if any(here <= below for here, below in pairwise(levels)):
        raise ValueError(f"timesteps do not descend: {levels}")
    sigmas = [float(diffusion.sigmas[t]) for t in levels] + ([0.0] if until is None else [])
    for timestep, (sigma, next_sigma) in zip(timesteps, pairwise(sigmas), strict=True):
        x0 = denoise(x, sigma, timestep)  # [B,C,h,w]
        slope = (x - x0) / sigma  # [B,C,h,w]
        x = x + (next_sigma - sigma) * slope  # [B,C,h,w]
        if on_step is not None:
            on_step(timestep, x)
    return x


def sample_ensemble(
    base: Denoise,
    refiner: Denoise,
    x: Tensor,
    diffusion: Diffusion,
    timesteps: Sequence[int],
    *,
    cutoff: int = 200,
    on_step: OnStep | None = None,
) -> Tensor:
    """The base steps at timesteps >= cutoff, the refiner at those below, where it was trained; no noise is added.

    Source: SDXL 2.5, after eDiff-I (arXiv 2211.01324).
    """
    high = [t for t in timesteps if t >= cutoff]
    low = [t for t in timesteps if t < cutoff]
    x = sample(base, x, diffusion, high, until=low[0] if low else None, on_step=on_step)
    return sample(refiner, x, diffusion, low, on_step=on_step)


@dataclass(frozen=True)
class Condition:
    """What a network reads of a batch of prompts."""

    context: Tensor  # [B,T,D]
    vector: Tensor  # [B,V]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): away from the negative condition by `scale`; at 1, none."""

    scale: float = 5.0

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The guided prediction, from those with the prompt and without, all [B,C,h,w]."""
        return negative + self.scale * (positive - negative)


def denoiser(
    unet: UNet,
    diffusion: Diffusion,
    positive: Condition,
    negative: Condition | None = None,
    guidance: Guidance = Guidance(1.0),
) -> Denoise:
    """A Denoise of a U-Net for one batch of prompts.

    For the base, the negative condition of an empty prompt has zeros for context and pooled text and keeps the sizes;
    the refiner encodes the empty prompt. Raises ValueError for guidance without a negative condition.
    """
    if guidance.scale != 1.0 and negative is None:
        raise ValueError(f"guidance of {guidance.scale} needs a negative condition")

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float, timestep: int) -> Tensor:
        noisy_latents = x / (sigma**2 + 1.0) ** 0.5  # [B,C,h,w]
        timesteps = torch.full((len(x),), timestep, device=x.device)  # [B]
        prediction = unet(noisy_latents, timesteps, positive.context, positive.vector).float()  # [B,C,h,w]
        if negative is not None and guidance.scale != 1.0:
            away = unet(noisy_latents, timesteps, negative.context, negative.vector).float()  # [B,C,h,w]
            prediction = guidance(prediction, away)
        return diffusion.predict_x0(noisy_latents, prediction, timesteps)  # [B,C,h,w]

    return denoise


def initial_noise(noise: Tensor, diffusion: Diffusion, timesteps: Sequence[int]) -> Tensor:
    """Unit Gaussian `noise` [B,C,h,w] as x at the first timestep, with the variance of unit x0 under its noise."""
    return noise * (float(diffusion.sigmas[timesteps[0]]) ** 2 + 1.0) ** 0.5


def timesteps_leading(steps: int, num_timesteps: int = 1000, offset: int = 1) -> list[int]:
    """`steps` descending timesteps, evenly spaced from `offset` on: the published pipeline's, which skips the noisiest.

    Raises ValueError where there are more steps than timesteps.
    """
    _check_steps(steps, num_timesteps)
    return [min(k * (num_timesteps // steps) + offset, num_timesteps - 1) for k in reversed(range(steps))]


def timesteps_trailing(steps: int, num_timesteps: int = 1000) -> list[int]:
    """`steps` descending timesteps, evenly spaced and starting at the noisiest (arXiv 2305.08891, 3.3).

    Raises ValueError where there are more steps than timesteps.
    """
    _check_steps(steps, num_timesteps)
    return [round(num_timesteps - k * num_timesteps / steps) - 1 for k in range(steps)]


def _check_steps(steps: int, num_timesteps: int) -> None:
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} steps over {num_timesteps} timesteps")
