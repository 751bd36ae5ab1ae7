"""What the proofs share: a tiny base, pictures drawn by formula, and training on one core.

Network, conditioning, draws, loss, average, schedule and sampler are the product's; only the loop is written out here,
so that a proof needs neither Ray nor DeepSpeed. An element of a map stands for eight pixels, as one of a latent does,
so that sizes and crops have the magnitudes that SDXL embeds.

B batch, N pictures, h w height and width of a map
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.conditioning import conditioning_vector
from model.config import (
    Conditioning,
    DenoiserLossConfig,
    DiffusionConfig,
    PredictionType,
    SamplerName,
    Spacing,
    UNetConfig,
)
from model.denoiser_loss import denoiser_loss, draw
from model.diffusion import Diffusion, gaussian
from model.ema import EMA
from model.noise_levels import noise_levels
from model.sampler import Condition, denoiser, initial_noise, sample
from model.unet import UNet
from pipelines.train.config import EMAConfig, OptimizerConfig
from pipelines.train.engine import learning_rate

PIXELS = 8  # that an element of a map stands for
CAPTION = 16  # numbers of a caption: which shape, which colour, zeros
SHAPES = ("disc", "square", "diamond")
BATCH, SAMPLING_STEPS = 64, 16
RATE = 6e-3
HELD_OUT = 1000  # added to the seed of what is trained on
# SDXL predicts the noise. Where all is noise, an error of that is an error of x0 fifteen times as large, and a training
# as short as these leaves blots; of v it is none.
DIFFUSION = Diffusion(DiffusionConfig(prediction_type=PredictionType.V))
NOTHING_DROPPED = DenoiserLossConfig(caption_dropout=0.0)
SAMPLES = 4  # per element and direction, of a drawing


@dataclass(frozen=True)
class Pictures:
    """Maps of one size, and what is told of them."""

    maps: Tensor  # [N,3,h,w] in [-1, 1]
    captions: Tensor  # [N,CAPTION]
    conditions: Mapping[Conditioning, Tensor]  # [N,2] pixels

    def rows(self, rows: Tensor | slice) -> Pictures:
        """Some of them."""
        return Pictures(self.maps[rows], self.captions[rows], {k: v[rows] for k, v in self.conditions.items()})


def drawing(
    shape: str,
    extent: tuple[int, int],
    size: tuple[int, int],
    centre: tuple[float, float],
    radii: tuple[float, float],
    colour: np.ndarray,
    stripes: tuple[int, float] | None = None,
) -> Image.Image:
    """A shape on white, `size` (height, width) large; centre and radii in a plane of `extent` (height, width).

    `stripes` (0 down or 1 across, phase) adds dark stripes, four units of the plane from one to the next.
    """
    sides = [(np.arange(n * SAMPLES) + 0.5) / (n * SAMPLES) * e for n, e in zip(size, extent, strict=True)]
    place = np.meshgrid(*sides, indexing="ij")
    u, v = (np.abs((p - c) / r) for p, c, r in zip(place, centre, radii, strict=True))
    inside = {"disc": u * u + v * v < 1, "square": np.maximum(u, v) < 0.9, "diamond": u + v < 1.15}[shape]
    paint = np.broadcast_to(colour, (*inside.shape, 3))
    if stripes is not None:
        dark = np.sin(2 * np.pi * place[stripes[0]] / 4 + stripes[1]) > 0
        paint = np.where(dark[..., None], 0.25 * paint, paint)
    fine = np.where(inside[..., None], paint, 1.0)
    means = fine.reshape(size[0], SAMPLES, size[1], SAMPLES, 3).mean((1, 3))
    return Image.fromarray((means * 255).round().astype(np.uint8))


def caption(shape: str, colour: np.ndarray, stripes: int | None = None) -> np.ndarray:
    """What the text encoders' outputs stand for here: the shape, its colour, and which way stripes run."""
    way = 0 if stripes is None else 2 * stripes - 1
    return np.array([*(name == shape for name in SHAPES), *(4 * colour - 2), way, *[0] * (CAPTION - 7)], np.float32)


def pictures(pixels: Sequence[np.ndarray], captions: Sequence[np.ndarray], **told: Sequence[tuple]) -> Pictures:
    """Of uint8 [h, w, 3] maps; what is told, in elements of a map, becomes pixels."""
    maps = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    conditions = {Conditioning(name): torch.tensor(pairs).float() * PIXELS for name, pairs in told.items()}
    return Pictures(maps, torch.from_numpy(np.stack(captions)), conditions)


def unet_config(*conditioning: Conditioning) -> UNetConfig:
    """The base of the proofs: 200,000 parameters, told what is named."""
    return UNetConfig(
        model_channels=16,
        channel_mult=(1, 2),
        transformer_depth=(0, 0),
        middle_depth=1,
        context_dim=CAPTION,
        pooled_dim=CAPTION,
        conditioning=conditioning,
        latent_channels=3,
        num_res_blocks=1,
        head_channels=16,
        conditioning_embed_dim=32,
        norm_groups=8,
    )


def error(
    unet: UNet, batch: Pictures, loss: DenoiserLossConfig, seed: int, first: int, diffusion: Diffusion = DIFFUSION
) -> Tensor:
    """The training loss [B] of a batch whose first picture is number `first` of the run."""
    draws = draw(seed, first, len(batch.maps), batch.maps.shape[1:], loss, len(unet.config.conditioning))
    noisy = diffusion.add_noise(batch.maps, draws.noise, draws.timesteps)  # [B,3,h,w]
    vector = conditioning_vector(batch.captions, batch.conditions, unet.config)  # [B,V]
    prediction = unet(noisy, draws.timesteps, batch.captions[:, None], vector)  # [B,3,h,w]
    return denoiser_loss(prediction, diffusion.target(batch.maps, draws.noise, draws.timesteps))


def train(
    config: UNetConfig,
    buckets: Sequence[Pictures],
    images: int,
    seed: int,
    loss: DenoiserLossConfig = NOTHING_DROPPED,
    diffusion: Diffusion = DIFFUSION,
) -> UNet:
    """The averaged weights after `images` pictures; each step takes one bucket, drawn by its number of pictures."""
    torch.manual_seed(seed)
    unet, order = UNet(config), torch.Generator().manual_seed(seed)
    settings = OptimizerConfig(lr=RATE, betas=(0.9, 0.99), warmup_images=images // 10, decay_images=images // 3)
    adamw = torch.optim.AdamW(unet.parameters(), betas=settings.betas, weight_decay=settings.weight_decay)
    weights = [parameter.data for parameter in unet.parameters()]
    average = EMA(weights, EMAConfig().halflife_images, EMAConfig().rampup)
    share = torch.tensor([float(len(bucket.maps)) for bucket in buckets])
    for first in range(0, images, BATCH):
        bucket = buckets[int(torch.multinomial(share, 1, generator=order))]
        batch = bucket.rows(torch.randint(len(bucket.maps), (BATCH,), generator=order))
        adamw.param_groups[0]["lr"] = learning_rate(settings, first + BATCH, images - first)
        adamw.zero_grad()
        error(unet, batch, loss, seed, first, diffusion).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), settings.clip_norm)
        adamw.step()
        average.update(weights, first + BATCH, BATCH)
    averaged = copy.deepcopy(unet).requires_grad_(False).eval()
    for weight, value in zip(averaged.parameters(), average.shadow, strict=True):
        weight.copy_(value)
    return averaged


def paint(unet: UNet, captions: Tensor, size: tuple[int, int], seed: int, **told: Sequence[float] | Tensor) -> Tensor:
    """Pictures [N,3,h,w] of captions [N,CAPTION]; what is told, in elements of a map, is one pair or one for each."""
    pairs = {Conditioning(k): (torch.as_tensor(v).float() * PIXELS).expand(len(captions), 2) for k, v in told.items()}
    condition = Condition(captions[:, None], conditioning_vector(captions, pairs, unet.config))
    levels = noise_levels(SAMPLING_STEPS, Spacing.KARRAS, DIFFUSION)
    noise = initial_noise(gaussian(seed, 0, len(captions), (3, *size)), levels, SamplerName.DPMPP_2M)
    denoise = denoiser(unet, DIFFUSION, condition)
    return sample(denoise, noise, levels, sampler=SamplerName.DPMPP_2M).clamp(-1, 1)


def ink(maps: Tensor) -> Tensor:
    """Where pictures [N,3,h,w] on white are painted: bool [N,h,w]."""
    return (1 - maps).amax(1) > 0.4


def on_edge(maps: Tensor) -> Tensor:
    """Whether each picture [N] is painted on more than one element of its edge."""
    mask = ink(maps)
    inner = mask[:, 1:-1, 1:-1].flatten(1).sum(1)
    return mask.flatten(1).sum(1) - inner > 1
