"""Sampling: steps down a run's noise levels, guidance, and the hand-over from base to refiner.

Here x is in sigma form, x = x0 + sigma * noise, which Euler's step changes along a straight line (arXiv 2206.00364,
eq. 4). The network sees it scaled to unit variance, x / sqrt(sigma^2 + 1), which is sqrt(a) x0 + sqrt(1 - a) noise.

B batch, C latent channels, h w latent height and width, T text tokens, D text width, V width of the vector
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from model.config import PredictionType, SamplerName, Spacing
from model.diffusion import LEAST_ALPHA_CUMPROD, Diffusion, generator
from model.noise_levels import NoiseLevels
from model.unet import UNet

Denoise = Callable[[Tensor, float, float], Tensor]
"""x [B,C,h,w], sigma, timestep -> x0 [B,C,h,w]."""

StepNoise = Callable[[int], Tensor]
"""Number of a step, from 0 -> the unit Gaussian noise [B,C,h,w] that it adds."""

OnStep = Callable[[float, Tensor], None]
"""Told after each step: its timestep, and the new x."""


def sample(
    denoise: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    sampler: SamplerName = SamplerName.EULER,
    eta: float | None = None,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """x [B,C,h,w] from the first of `levels` to the last: latents, where that one is 0.

    `eta` is the share of fresh noise in a step of Euler ancestral (None: 1) and DDIM (None: 0); the other samplers add
    none. Raises ValueError for a sampler that adds noise without `step_noise`.
    """
    eta = default_eta(sampler) if eta is None else eta
    if step_noise is None and eta > 0 and sampler in (SamplerName.EULER_ANCESTRAL, SamplerName.DDIM):
        raise ValueError(f"{sampler} with eta {eta} adds noise at every step: it needs step_noise")
    before: tuple[float, Tensor] | None = None
    for step, (timestep, (sigma, next_sigma)) in enumerate(zip(levels.timesteps, pairwise(levels.sigmas), strict=True)):
        x0 = denoise(x, sigma, timestep)  # [B,C,h,w]
        added = 0.0  # deviation of the fresh noise
        if sampler == SamplerName.EULER:
            x = euler_step(x, x0, sigma, next_sigma)  # [B,C,h,w]
        elif sampler == SamplerName.DPMPP_2M:
            x = dpmpp_2m_step(x, x0, sigma, next_sigma, before)  # [B,C,h,w]
        elif sampler == SamplerName.EULER_ANCESTRAL:
            kept, added = ancestral_levels(sigma, next_sigma, eta)
            x = euler_step(x, x0, sigma, kept)  # [B,C,h,w]
        elif sampler == SamplerName.DDIM:
            kept, added = ancestral_levels(true_sigma(sigma), next_sigma, eta)
            x = ddim_step(x, x0, sigma, kept)  # [B,C,h,w]
        else:
            raise ValueError(f"{sampler!r} is no sampler")
        if added > 0:
            assert step_noise is not None
            x = x + added * step_noise(step)  # [B,C,h,w]
        before = sigma, x0
        if on_step is not None:
            on_step(timestep, x)
    return x


def sample_ensemble(
    base: Denoise,
    refiner: Denoise,
    x: Tensor,
    levels: NoiseLevels,
    *,
    cutoff: float = 200,
    sampler: SamplerName = SamplerName.EULER,
    eta: float | None = None,
    step_noise: StepNoise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """The base steps at timesteps >= cutoff, the refiner at those below, where it was trained; no noise is added.

    DPM++ 2M starts anew at the hand-over, as in the published pipelines: the base's x0 is no past of the refiner's.
    Source: SDXL 2.5, after eDiff-I (arXiv 2211.01324).
    """
    high, low = levels.split(cutoff)
    x = sample(base, x, high, sampler=sampler, eta=eta, step_noise=step_noise, on_step=on_step)
    later = step_noise_after(step_noise, len(high.timesteps))
    return sample(refiner, x, low, sampler=sampler, eta=eta, step_noise=later, on_step=on_step)


def euler_step(x: Tensor, x0: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """One step along the slope dx/dsigma (arXiv 2206.00364, algorithm 1 without its second order), all [B,C,h,w].

    x + (next_sigma - sigma) * (x - x0) / sigma, written without a difference of numbers as large as sigma: a step from
    4096 to 0 gives x0 itself.
    """
    return (next_sigma / sigma) * x + (1.0 - next_sigma / sigma) * x0


def ddim_step(x: Tensor, x0: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """The step of DDIM without its noise (arXiv 2010.02502, eq. 12), all [B,C,h,w].

    In sigma form it is Euler's step, and with the noise that `ancestral_levels` gives, Euler ancestral's. It differs
    where the signal is 0: there x holds no x0, so none is subtracted. A run ends at x0 itself, as diffusers' does with
    set_alpha_to_one, its default and what our folders say; the published scheduler_config.json sets that to false, and
    a DDIM made from it stops at the schedule's first level, some 1e-3 away after 20 steps. diffusers also takes the
    step from a timestep t down to t - num_timesteps // steps, which is its next one only where `steps` divides the
    schedule, or where timesteps are leading.
    """
    signal = (true_sigma(sigma) ** 2 + 1.0) ** -0.5
    noisy_latents = x / (sigma**2 + 1.0) ** 0.5
    noise = (noisy_latents - signal * x0) / (1.0 - signal**2) ** 0.5
    return x0 + next_sigma * noise


def ancestral_levels(sigma: float, next_sigma: float, eta: float) -> tuple[float, float]:
    """The level to step down to, and the deviation of the noise that then leads to next_sigma: both squares add up.

    The noise is `eta` times that of a DDPM step (arXiv 2010.02502, eq. 16, in sigma form), at most next_sigma.
    """
    added = min(next_sigma, eta * next_sigma * (1.0 - (next_sigma / sigma) ** 2) ** 0.5)
    return (next_sigma**2 - added**2) ** 0.5, added


def dpmpp_2m_step(
    x: Tensor, x0: Tensor, sigma: float, next_sigma: float, before: tuple[float, Tensor] | None
) -> Tensor:
    """DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), all [B,C,h,w]; `before` is the sigma and x0 of the step before.

    Euler's step with an x0 that both steps extrapolate to; without a step before, and down to 0, where the logarithm
    that it is spaced in ends, with x0 as it is.
    """
    if before is not None and next_sigma > 0:
        before_sigma, before_x0 = before
        ratio = math.log(before_sigma / sigma) / math.log(sigma / next_sigma)
        x0 = x0 + (x0 - before_x0) / (2.0 * ratio)
    return euler_step(x, x0, sigma, next_sigma)


def default_eta(sampler: SamplerName) -> float:
    """The published share of fresh noise: all that keeps the level for Euler ancestral, and none for the others."""
    return 1.0 if sampler == SamplerName.EULER_ANCESTRAL else 0.0


def true_sigma(sigma: float) -> float:
    """Infinity for the finite sigma that `Diffusion` gives a timestep without signal; any other as it is."""
    return math.inf if sigma > LEAST_ALPHA_CUMPROD**-0.5 - 1.0 else sigma


@dataclass(frozen=True)
class Condition:
    """What a network reads of a batch of prompts."""

    context: Tensor  # [B,T,D]
    vector: Tensor  # [B,V]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): away from the negative condition by `scale`; at 1, none.

    A scale below 1 mixes the two; diffusers takes any of 1 or less for no guidance.
    A strong one raises the contrast; `rescale` is how far, from 0 to 1, the deviation of a sample's prediction is
    brought back to that of the prompt's own (arXiv 2305.08891, eq. 15 and 16).
    """

    scale: float = 5.0
    rescale: float = 0.0

    def __call__(self, positive: Tensor, negative: Tensor) -> Tensor:
        """The guided prediction, from those with the prompt and without, all [B,C,h,w]."""
        guided = negative + self.scale * (positive - negative)
        if self.rescale == 0:
            return guided
        deviation = _deviation(guided)  # [B,1,1,1]
        ratio = torch.where(
            deviation > 0, _deviation(positive) / deviation, 1.0
        )  # a flat one has no contrast to bring back
        return guided * (self.rescale * ratio + 1.0 - self.rescale)


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

    Prompt and negative prompt are two passes, not one of 2B rows, which would take twice the activations.
    """
    if guidance.scale != 1.0 and negative is None:
        raise ValueError(f"guidance of {guidance.scale} needs a negative condition")

    @torch.no_grad()
    def denoise(x: Tensor, sigma: float, timestep: float) -> Tensor:
        noisy_latents = x / (sigma**2 + 1.0) ** 0.5  # [B,C,h,w]
        timesteps = torch.full((len(x),), float(timestep), device=x.device)  # [B]
        prediction = unet(noisy_latents, timesteps, positive.context, positive.vector).float()  # [B,C,h,w]
        if negative is not None and guidance.scale != 1.0:
            away = unet(noisy_latents, timesteps, negative.context, negative.vector).float()  # [B,C,h,w]
            prediction = guidance(prediction, away)
        return predicted_x0(x, prediction, sigma, diffusion.config.prediction_type)  # [B,C,h,w]

    return denoise


def predicted_x0(x: Tensor, prediction: Tensor, sigma: float, prediction_type: PredictionType) -> Tensor:
    """The x0 that a prediction implies at any sigma, on the schedule or between, all [B,C,h,w].

    Source: arXiv 2206.00364, table 1, for the noise; arXiv 2202.00512, section 4, for v, exact where the signal is 0.
    """
    if prediction_type == PredictionType.EPSILON:
        return x - sigma * prediction
    signal = (true_sigma(sigma) ** 2 + 1.0) ** -0.5
    noisy_latents = x / (sigma**2 + 1.0) ** 0.5
    return signal * noisy_latents - (1.0 - signal**2) ** 0.5 * prediction


def initial_noise(noise: Tensor, levels: NoiseLevels, sampler: SamplerName = SamplerName.EULER) -> Tensor:
    """Unit Gaussian `noise` [B,C,h,w] as x at the first level, where the published sampler starts.

    That is with the variance of unit x0 under its noise, or of the noise alone: `starts_at_sigma`.
    """
    sigma = levels.sigmas[0]
    return noise * (sigma if starts_at_sigma(sampler, levels.spacing) else (sigma**2 + 1.0) ** 0.5)


def starts_at_sigma(sampler: SamplerName, spacing: Spacing | None) -> bool:
    """Whether a run starts with the first level's noise alone, without the variance of an x0 under it.

    As diffusers' `init_noise_sigma` has it: so do Euler and Euler ancestral, but for leading timesteps.
    """
    eulers = (SamplerName.EULER, SamplerName.EULER_ANCESTRAL)
    return sampler in eulers and spacing in (Spacing.TRAILING, Spacing.KARRAS)


def noised(latents: Tensor, noise: Tensor, levels: NoiseLevels) -> Tensor:
    """Latents under unit Gaussian `noise`, both [B,C,h,w], as x at the first level: SDEdit's start (2108.01073)."""
    return latents + levels.sigmas[0] * noise


def step_noise(
    pictures: Sequence[tuple[int, int]], shape: Sequence[int], device: torch.device | str = "cpu"
) -> StepNoise:
    """The StepNoise of a batch: row k at a step follows from that step and pictures[k], its seed and number, alone.

    `shape` is one sample's (C, h, w). Numbers come from the CPU's generator on every device.
    """

    def noise(step: int) -> Tensor:
        rows = [torch.randn(*shape, generator=generator(f"step {step}", seed, number)) for seed, number in pictures]
        return torch.stack(rows).to(device)  # [B,C,h,w]

    return noise


def step_noise_after(noise: StepNoise | None, steps: int) -> StepNoise | None:
    """The noise of a run that goes on after `steps` steps of another."""
    return None if noise is None else lambda step: noise(steps + step)


def _deviation(x: Tensor) -> Tensor:
    """Standard deviation of each sample [B,..] over everything else, [B,1,..]."""
    return x.std(dim=tuple(range(1, x.ndim)), keepdim=True)
