"""Pictures from trained networks: base, then refiner on its latents, then the VAE's decoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from model.conditioning import conditioning_vector, select_context
from model.config import Conditioning
from model.diffusion import Diffusion
from model.sampler import (
    Condition,
    Denoise,
    Guidance,
    denoiser,
    initial_noise,
    sample,
    sample_ensemble,
    timesteps_trailing,
)
from model.text import TextFeatures
from model.unet import UNet
from pipelines.config import GuidanceConfig

Conditions = Mapping[Conditioning, Tensor]


def base_denoiser(
    unet: UNet, diffusion: Diffusion, text: TextFeatures, conditions: Conditions, config: GuidanceConfig
) -> Denoise:
    """The base, guided away from zeros for text; the sizes stay (SDXL's published setting for an empty prompt)."""
    nothing = TextFeatures(torch.zeros_like(text.context), torch.zeros_like(text.pooled))
    positive = _condition(unet, text, conditions)
    negative = _condition(unet, nothing, conditions) if config.scale != 1 else None
    return denoiser(unet, diffusion, positive, negative, Guidance(config.scale))


def refiner_denoiser(
    unet: UNet,
    diffusion: Diffusion,
    *,
    text: TextFeatures,
    empty: TextFeatures,
    conditions: Conditions,
    config: GuidanceConfig,
) -> Denoise:
    """The refiner, guided away from the encoded empty prompt and from the negative aesthetic score."""

    def scored(score: float) -> Conditions:
        column = torch.full((len(text.pooled), 1), score, device=text.pooled.device)
        return {**conditions, Conditioning.AESTHETIC_SCORE: column}

    positive = _condition(unet, text, scored(config.aesthetic_score))
    guided = config.refiner_scale != 1
    negative = _condition(unet, empty, scored(config.negative_aesthetic_score)) if guided else None
    return denoiser(unet, diffusion, positive, negative, Guidance(config.refiner_scale))


def generate(
    base: Denoise, refiner: Denoise | None, noise: Tensor, diffusion: Diffusion, config: GuidanceConfig
) -> Tensor:
    """Scaled latents [B,4,h,w] from unit noise of that shape; without a refiner the base goes all the way."""
    timesteps = timesteps_trailing(config.steps, diffusion.config.num_timesteps)
    x = initial_noise(noise, diffusion, timesteps)
    if refiner is None or config.handover == 0:
        return sample(base, x, diffusion, timesteps)
    return sample_ensemble(base, refiner, x, diffusion, timesteps, cutoff=config.handover)


def refine(refiner: Denoise, latents: Tensor, noise: Tensor, diffusion: Diffusion, config: GuidanceConfig) -> Tensor:
    """SDEdit (arXiv 2108.01073) below the hand-over: noise finished latents [B,4,h,w] to its level, then denoise."""
    share = config.handover / diffusion.config.num_timesteps
    timesteps = timesteps_trailing(max(1, round(config.steps * share)), config.handover)
    x = latents + float(diffusion.sigmas[timesteps[0]]) * noise
    return sample(refiner, x, diffusion, timesteps)


def _condition(unet: UNet, text: TextFeatures, conditions: Conditions) -> Condition:
    return Condition(
        context=select_context(text.context, unet.config),
        vector=conditioning_vector(text.pooled, conditions, unet.config),
    )
