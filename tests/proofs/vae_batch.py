"""The VAE (SDXL 2.4, Table 3): a larger batch with averaged weights against a small batch without.

    python -m tests.proofs.vae_batch

The paper changes batch size (256 for 9) and average together, and says nothing of steps or images. Here batch 8 runs
for as many images as batch 64, and is looked at on the way after as many steps: the two are compared at equal steps,
which is the claim, and at equal images, which is told beside it. Each combination of batch and average has a row, so
that one sees which of them does it. One constant learning rate for both; neither adversarial nor perceptual term.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import VAEConfig, VAELossConfig
from model.diffusion import gaussian
from model.ema import EMA
from model.metrics import psnr, ssim
from model.vae import VAE
from model.vae_loss import divergence_loss, reconstruction_loss
from pipelines.train.config import EMAConfig
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.size_conditioning import distance, drawn
from tests.proofs.toy import HELD_OUT

SIDE, LARGEST = 16, 32
SMALL, LARGE = 8, 64
RATE = 2e-3
DATA = 4096
CONFIG = VAEConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, norm_groups=4, scaling_factor=1.0)
MEASURES = ("PSNR, dB", "SSIM", "Frechet distance")
BEFORE, AFTER, AT_LENGTH = ("few", SMALL, False), ("few", LARGE, True), ("many", SMALL, False)
SHOWN = 12

Kind = tuple[str, int, bool]  # "few" steps or "many", batch size, whether it is the average


def train(images: Tensor, batch: int, seed: int, ends: Sequence[int]) -> Iterator[tuple[VAE, VAE]]:
    """A VAE as it is after each number of steps of `ends`, and its average."""
    torch.manual_seed(seed)
    vae, order = VAE(CONFIG), torch.Generator().manual_seed(seed)
    adamw = torch.optim.AdamW(vae.parameters(), lr=RATE, weight_decay=0.0)
    weights, settings = [parameter.data for parameter in vae.parameters()], EMAConfig()
    average, kl_weight = EMA(weights, settings.halflife_images, settings.rampup), VAELossConfig().kl_weight
    side = SIDE // CONFIG.downsample
    for step in range(1, ends[-1] + 1):
        image = images[torch.randint(len(images), (batch,), generator=order)]
        noise = gaussian(seed, (step - 1) * batch, batch, (CONFIG.latent_channels, side, side))
        reconstruction, posterior = vae(image, noise)
        loss = reconstruction_loss(image, reconstruction) + kl_weight * divergence_loss(posterior, image)
        adamw.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adamw.step()
        average.update(weights, step * batch, batch)
        if step in ends:
            yield with_weights(weights), with_weights(average.shadow)


def with_weights(weights: Sequence[Tensor]) -> VAE:
    """A VAE that has them, and no gradients."""
    vae = VAE(CONFIG).requires_grad_(False)
    for parameter, value in zip(vae.parameters(), weights, strict=True):
        parameter.copy_(value)
    return vae


def trained(data: Tensor, steps: int, seed: int) -> Iterator[tuple[Kind, VAE]]:
    """All that are compared, of one seed."""
    ratio = LARGE // SMALL
    for length, pair in zip(("few", "many"), train(data, SMALL, seed, (steps, ratio * steps)), strict=True):
        yield from (((length, SMALL, bool(averaged)), vae) for averaged, vae in enumerate(pair))
    (pair,) = train(data, LARGE, seed, (steps,))
    yield from ((("few", LARGE, bool(averaged)), vae) for averaged, vae in enumerate(pair))


def originals(count: int, seed: int) -> Tensor:
    """Maps that are as large as their originals, or smaller."""
    sizes = np.random.default_rng(seed).integers(SIDE, LARGEST + 1, count)
    return drawn(sizes.tolist(), seed, SIDE).maps


def measured(made: Tensor, image: Tensor) -> list[float]:
    """MEASURES of reconstructions."""
    return [float(psnr(image, made).mean()), float(ssim(image, made).mean()), distance(made, image)]


def better(found: Sequence[Sequence[float]], than: Sequence[Sequence[float]]) -> bool:
    """Whether each seed's measures are all on the better side: PSNR and SSIM above, the distance below."""
    return all(a[0] > b[0] and a[1] > b[1] and a[2] < b[2] for a, b in zip(found, than, strict=True))


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Is the reconstruction nearer with the larger batch and the average, by every measure and in every seed?"""
    steps = max(1, images // LARGE)
    found: dict[Kind, list[list[float]]] = {}
    shown: list[tuple[str, Tensor]] = []
    for seed in seeds:
        data, held_out = originals(DATA, seed), originals(samples, HELD_OUT + seed)
        for kind, vae in trained(data, steps, seed):
            made = vae.decode(vae.encode(held_out).mean).clamp(-1, 1)
            found.setdefault(kind, []).append(measured(made, held_out))
            if seed == seeds[0]:
                shown = shown or [("held out", held_out[:SHOWN])]
                shown.append((label(kind, steps), made[:SHOWN]))
        rows = []
        for kind, values in found.items():
            cells = [
                spread(column, digits) for column, digits in zip(zip(*values, strict=True), (2, 3, 2), strict=True)
            ]
            rows.append([label(kind, steps), *cells])
        holds, also = (better(found[AFTER], found[other]) for other in (BEFORE, AT_LENGTH))
        gains = [after[0] - before[0] for after, before in zip(found[AFTER], found[BEFORE], strict=True)]
        at_length = [after[0] - before[0] for after, before in zip(found[AFTER], found[AT_LENGTH], strict=True)]
        verdict = (
            f"at equal steps, batch {LARGE} averaged is {'better' if holds else 'not better'} than batch {SMALL} not "
            f"averaged by every measure in every seed, {spread(gains)} dB nearer; the average alone brings "
            f"{gain(found, ('few', SMALL, True)):+.2f} dB, "
            f"the batch alone {gain(found, ('few', LARGE, False)):+.2f} dB. "
            f"At equal images, where batch {SMALL} has {LARGE // SMALL} times the steps, it is "
            f"{'better, too' if also else 'not better'}: {spread(at_length)} dB."
        )
        set_up = (
            f"A VAE of 60,000 parameters on {DATA} pictures of {SIDE} x {SIDE} for each seed; reconstructions of "
            f"{samples} held-out ones, from the posterior's mean."
        )
        claim = "VAE: at equal steps, a larger batch with averaged weights reconstructs better"
        yield Proof("vae_batch", claim, set_up, ["", *MEASURES], rows, holds, verdict, sheet(shown))


def label(kind: Kind, steps: int) -> str:
    """A row's name."""
    length, batch, averaged = kind
    steps *= LARGE // SMALL if length == "many" else 1
    return f"batch {batch}, {'' if averaged else 'not '}averaged, {steps:,} steps, {steps * batch:,} images"


def gain(found: dict[Kind, list[list[float]]], kind: Kind) -> float:
    """Mean PSNR over that of the small batch after few steps, dB."""
    return statistics.mean(values[0] for values in found[kind]) - statistics.mean(values[0] for values in found[BEFORE])


if __name__ == "__main__":
    main(prove, images=25_600, samples=512)
