"""What one training step of base or refiner draws, and its loss: the squared error of the prediction, perhaps weighted.

Dropped text and sizes are zeros, not an empty prompt. All text of an image is dropped together (`caption_dropout`),
which is what guidance's unconditional branch sees, and each output of each text encoder by itself (`text_dropout`).

B batch, C latent channels, h w latent height and width, T text tokens, D width of the stored context, P width of the
pooled text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from model.conditioning import drop
from model.config import DenoiserLossConfig, PredictionType
from model.diffusion import Diffusion, generator


def denoiser_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error [B] in fp32, mean over channels and pixels (arXiv 2006.11239, eq. 14)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def min_snr_weight(diffusion: Diffusion, timesteps: Tensor, gamma: float) -> Tensor:
    """Each sample's weight [B] in fp32, min(snr, gamma) on the error of x0 (arXiv 2303.09556, 3.4).

    With snr = a / (1 - a) that is min(snr, gamma) / snr on the noise's error, and min(snr, gamma) / (snr + 1) on v's.
    Both are written without a division by snr: at a signal of 0 they are 1 and 0.
    """
    alphas_cumprod = diffusion.alphas_cumprod.double()[timesteps.to(diffusion.alphas_cumprod.device)]  # [B]
    capped = gamma * (1.0 - alphas_cumprod)  # [B]
    if diffusion.config.prediction_type == PredictionType.EPSILON:
        return (capped / alphas_cumprod).clamp(max=1.0).to(timesteps.device, torch.float32)
    return torch.minimum(alphas_cumprod, capped).to(timesteps.device, torch.float32)


@dataclass(frozen=True)
class Draws:
    """Everything random in one training step of base or refiner, one row per image."""

    posterior_noise: Tensor  # [B,C,h,w] picks the latents from the VAE's posterior
    noise: Tensor  # [B,C,h,w] unit Gaussian, before offset noise
    timesteps: Tensor  # [B] int64
    channel_noise: Tensor  # [B,C,1,1] unit Gaussian, for offset noise
    keep_clip_l: Tensor  # [B] bool, False where CLIP-L's tokens are dropped
    keep_bigg: Tensor  # [B] bool, False where bigG's tokens are dropped
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
    unequal = _timestep_chances(loss)
    rows = []
    for index in range(first, first + count):
        random = generator("denoiser", seed, index)
        timestep = torch.randint(*loss.timesteps, (), generator=random)
        chances = torch.rand(2 + conditions, generator=random)
        channel_noise = torch.randn(shape[0], 1, 1, generator=random)
        posterior_noise = torch.randn(*shape, generator=random)
        noise = torch.randn(*shape, generator=random)
        # Draws that one run makes and another does not have a generator of their own: the others stay what they are.
        caption, clip_l, place = torch.rand(3, generator=generator("denoiser-2", seed, index), dtype=torch.float64)
        if unequal is not None:
            timestep = _inverse(unequal, place) + loss.timesteps[0]
        keep_caption = caption >= loss.caption_dropout
        rows.append(
            Draws(
                posterior_noise=posterior_noise,
                noise=noise,
                timesteps=timestep,
                channel_noise=channel_noise,
                keep_clip_l=keep_caption & (clip_l >= loss.text_dropout),
                keep_bigg=keep_caption & (chances[0] >= loss.text_dropout),
                keep_pooled=keep_caption & (chances[1] >= loss.text_dropout),
                keep_sizes=chances[2:] >= loss.size_dropout,
            )
        )
    return Draws(**{f.name: torch.stack([getattr(row, f.name) for row in rows]).to(device) for f in fields(Draws)})


def drop_text(context: Tensor, pooled: Tensor, draws: Draws, clip_l_width: int) -> tuple[Tensor, Tensor]:
    """Stored context [B,T,D], CLIP-L's `clip_l_width` channels before bigG's, and pooled text [B,P], as drawn."""
    clip_l, bigg = context[..., :clip_l_width], context[..., clip_l_width:]
    kept = torch.cat([drop(clip_l, draws.keep_clip_l), drop(bigg, draws.keep_bigg)], dim=-1)  # [B,T,D]
    return kept, drop(pooled, draws.keep_pooled)


def offset_noise(noise: Tensor, level: float, draws: Draws) -> Tensor:
    """`noise` [B,C,h,w] plus `level` times one draw per sample and channel (SDXL 2.5; its last stage uses 0.05).

    A shift that a whole channel shares lets the network learn images that are dark or bright as a whole.
    """
    return noise + level * draws.channel_noise.to(noise)


def _timestep_chances(loss: DenoiserLossConfig) -> Tensor | None:
    """The chance [timesteps] in fp64 of a timestep up to each of the drawn range; None where all are drawn alike."""
    biased = loss.biased_timesteps
    if biased is None:
        return None
    first, end = loss.timesteps
    weights = torch.ones(end - first, dtype=torch.float64)
    weights[biased[0] - first : biased[1] - first] = loss.timestep_bias.multiplier
    return weights.cumsum(0) / weights.sum()


def _inverse(chances: Tensor, place: Tensor) -> Tensor:
    """The index, int64, that the uniform number `place` in [0, 1) falls on."""
    return torch.searchsorted(chances, place, right=True).clamp(max=len(chances) - 1)
