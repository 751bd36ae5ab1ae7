"""The VAE (SDXL 2.4, Table 3): a larger batch with averaged weights against a small batch without, images equal.

    python -m tests.proofs.vae_batch

The paper changes batch size (256 for 9) and average together. Here each of the four combinations has a row, so that one
sees which of them does it. All see as many images, so the larger batch has fewer steps; its learning rate is larger by
the root of the ratio, decided before anything was run. The rate is constant. Neither adversarial nor perceptual term.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import VAE_PRESETS, VAELossConfig
from model.diffusion import gaussian
from model.ema import EMA
from model.metrics import psnr, ssim
from model.vae import VAE
from model.vae_loss import divergence_loss, reconstruction_loss
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.size_conditioning import LARGEST, SIDE, distance, drawn
from tests.proofs.toy import HALFLIFE_IMAGES

SMALL, LARGE = 8, 32
RATE = 1e-3  # at the small batch
DATA = 2048
MEASURES = ("PSNR, dB", "SSIM", "Frechet distance")


def train(images: Tensor, count: int, batch: int, seed: int) -> tuple[VAE, VAE]:
    """A VAE as it is after `count` images, and its average."""
    torch.manual_seed(seed)
    vae, order = VAE(VAE_PRESETS["tiny"]), torch.Generator().manual_seed(seed)
    adamw = torch.optim.AdamW(vae.parameters(), lr=RATE * (batch / SMALL) ** 0.5, weight_decay=0.0)
    weights = [parameter.data for parameter in vae.parameters()]
    average, kl_weight = EMA(weights, HALFLIFE_IMAGES), VAELossConfig().kl_weight
    side = SIDE // vae.config.downsample
    for first in range(0, count, batch):
        image = images[torch.randint(len(images), (batch,), generator=order)]
        reconstruction, posterior = vae(image, gaussian(seed, first, batch, (4, side, side)))
        loss = reconstruction_loss(image, reconstruction) + kl_weight * divergence_loss(posterior, image)
        adamw.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        adamw.step()
        average.update(weights, first + batch, batch)
    averaged = VAE(vae.config).requires_grad_(False)
    for weight, value in zip(averaged.parameters(), average.shadow, strict=True):
        weight.copy_(value)
    return vae.requires_grad_(False), averaged


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Is the reconstruction nearer with the larger batch and the average?"""
    random = np.random.default_rng(0)
    data = drawn(random.integers(SIDE, LARGEST + 1, DATA).tolist(), 1).maps
    held_out = drawn(random.integers(SIDE, LARGEST + 1, samples).tolist(), 2).maps
    kinds = [(batch, averaged) for batch in (SMALL, LARGE) for averaged in (False, True)]
    names = {(b, a): f"batch {b}, {'averaged' if a else 'not averaged'}" for b, a in kinds}
    found: dict[tuple[int, bool], dict[str, list[float]]] = {kind: {name: [] for name in MEASURES} for kind in kinds}
    shown = [("held out", held_out[:24])]
    for seed in seeds:
        for batch in (SMALL, LARGE):
            for is_averaged, vae in enumerate(train(data, images, batch, seed)):
                made = vae.decode(vae.encode(held_out).mean).clamp(-1, 1)
                values = (psnr(held_out, made).mean(), ssim(held_out, made).mean(), distance(made, held_out))
                for name, value in zip(MEASURES, values, strict=True):
                    found[batch, bool(is_averaged)][name].append(float(value))
                if seed == seeds[0]:
                    shown.append((names[batch, bool(is_averaged)], made[:24]))
        rows = [[names[k], *(spread(found[k][name], 3 if name == "SSIM" else 2) for name in MEASURES)] for k in kinds]
        before, after = found[SMALL, False]["PSNR, dB"], found[LARGE, True]["PSNR, dB"]
        gains = [new - old for old, new in zip(before, after, strict=True)]
        by_average = statistics.mean(found[SMALL, True]["PSNR, dB"]) - statistics.mean(before)
        by_batch = statistics.mean(found[LARGE, False]["PSNR, dB"]) - statistics.mean(before)
        holds = min(gains) > 0
        verdict = (
            f"batch {LARGE} averaged is at {statistics.mean(gains):+.2f} dB ({min(gains):+.2f} to {max(gains):+.2f}) "
            f"to batch {SMALL} not averaged; the average alone brings {by_average:+.2f} dB, the batch "
            f"alone {by_batch:+.2f} dB."
        )
        set_up = (
            f"The tiny VAE on {DATA} pictures of {SIDE} x {SIDE}; reconstructions of {samples} held-out ones, from the "
            "posterior's mean."
        )
        claim = "VAE: a larger batch with averaged weights reconstructs better"
        yield Proof("vae_batch", claim, set_up, ["", *MEASURES], rows, holds, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=8_000, samples=256)
