"""Latents from trained networks and what they are told: base and refiner, with guidance, put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from model.conditioning import conditioning_vector, select_context
from model.config import Conditioning
from model.diffusion import Diffusion
from model.noise_levels import NoiseLevels, noise_levels
from model.sampler import (
    Condition,
    Denoise,
    Guidance,
    StepNoise,
    denoiser,
    initial_noise,
    noised,
    sample,
    sample_ensemble,
    step_noise_after,
)
from model.text import TextFeatures
from model.unet import UNet
from pipelines.config import SamplingConfig

Conditions = Mapping[Conditioning, Tensor]


@dataclass(frozen=True)
class Told:
    """What a batch's prompts, or its negative prompts, tell the networks. Each network picks what it reads."""

    text: TextFeatures
    """Of both text encoders."""
    conditions: Conditions
    """[B, numbers] by name, as `conditioning_vector` takes them."""


def base_denoiser(
    unet: UNet, diffusion: Diffusion, positive: Told, negative: Told | None, config: SamplingConfig
) -> Denoise:
    """The base, guided away from `negative`; None is zeros for text and the same sizes, as no text is in training."""
    if negative is None:
        text = positive.text
        nothing = TextFeatures(torch.zeros_like(text.context), torch.zeros_like(text.pooled))
        negative = Told(nothing, positive.conditions)
    return _guided(unet, diffusion, positive, negative, Guidance(config.scale, config.rescale))


def refiner_denoiser(
    unet: UNet, diffusion: Diffusion, positive: Told, negative: Told, config: SamplingConfig
) -> Denoise:
    """The refiner, guided away from `negative`, which is the encoded empty prompt where there is no other.

    Where the conditions hold no aesthetic score, the config's two scores join them.
    """
    positive = _scored(positive, config.aesthetic_score)
    negative = _scored(negative, config.negative_aesthetic_score)
    return _guided(unet, diffusion, positive, negative, Guidance(config.refiner_scale, config.rescale))


def generate(  # noqa: PLR0917 (the parts of a run, in the order that it needs them)
    base: Denoise,
    refiner: Denoise | None,
    noise: Tensor,
    diffusion: Diffusion,
    config: SamplingConfig,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """Scaled latents [B,4,h,w] from unit noise of that shape; without a refiner the base goes all the way.

    Raises ValueError where sampler or SDEdit add noise and there is no `step_noise`.
    """
    levels = noise_levels(config.steps, config.spacing, diffusion, sampler=config.sampler)
    x = initial_noise(noise, levels, config.sampler)
    if refiner is not None and config.refiner == "ensemble" and config.handover > 0:
        return sample_ensemble(
            base,
            refiner,
            x,
            levels,
            cutoff=config.handover,
            sampler=config.sampler,
            eta=config.eta,
            step_noise=step_noise,
        )
    latents = sample(base, x, levels, sampler=config.sampler, eta=config.eta, step_noise=step_noise)
    if refiner is None or config.refiner == "ensemble":
        return latents
    if step_noise is None:
        raise ValueError("a refiner by sdedit noises the base's latents: it needs step_noise")
    again = step_noise(config.steps)  # the base has used those before
    return refine(refiner, latents, again, diffusion, config, step_noise_after(step_noise, config.steps + 1))


def refine(  # noqa: PLR0917 (as generate)
    refiner: Denoise,
    latents: Tensor,
    noise: Tensor,
    diffusion: Diffusion,
    config: SamplingConfig,
    step_noise: StepNoise | None = None,
) -> Tensor:
    """SDEdit (arXiv 2108.01073) of finished latents [B,4,h,w]: noise them to where the refiner starts, then denoise."""
    levels = _refiner_levels(diffusion, config)
    x = noised(latents, noise, levels)
    return sample(refiner, x, levels, sampler=config.sampler, eta=config.eta, step_noise=step_noise)


def _refiner_levels(diffusion: Diffusion, config: SamplingConfig) -> NoiseLevels:
    """The last steps by strength; in an ensemble, as many as lie below the hand-over, and at least one."""
    if config.refiner == "sdedit":
        return noise_levels(config.steps, config.spacing, diffusion, sampler=config.sampler).tail(config.strength)
    steps = max(1, round(config.steps * config.handover / diffusion.config.num_timesteps))
    return noise_levels(steps, config.spacing, diffusion, sampler=config.sampler, below=config.handover)


def _guided(unet: UNet, diffusion: Diffusion, positive: Told, negative: Told, guidance: Guidance) -> Denoise:
    away = _condition(unet, negative) if guidance.scale != 1 else None
    return denoiser(unet, diffusion, _condition(unet, positive), away, guidance)


def _condition(unet: UNet, told: Told) -> Condition:
    return Condition(
        context=select_context(told.text.context, unet.config),
        vector=conditioning_vector(told.text.pooled, told.conditions, unet.config),
    )


def _scored(told: Told, score: float) -> Told:
    column = torch.full((len(told.text.pooled), 1), score, device=told.text.pooled.device)
    return Told(told.text, {Conditioning.AESTHETIC_SCORE: column, **told.conditions})
