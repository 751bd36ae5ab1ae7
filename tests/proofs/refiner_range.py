"""The refiner's range (SDXL 2.5): trained on the lowest 200 timesteps alone, a network has the lower error there.

    python -m tests.proofs.refiner_range

Base and expert are one architecture, begin with the same weights and see the same pictures in the same order; what
differs is the range that timesteps are drawn from, so the expert meets its own five times as often. Both are measured
on held-out pictures with the same noise. Unlike the published refiner, the expert is neither larger nor told a score.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch

from model.conditioning import conditioning_vector
from model.config import DenoiserLossConfig, DiffusionConfig
from model.diffusion import Diffusion, gaussian
from model.noise_levels import levels_at
from model.sampler import Condition, denoiser, noised, sample
from model.unet import UNet
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.size_conditioning import large_ones
from tests.proofs.toy import HELD_OUT, Pictures, error, train, unet_config

DIFFUSION = Diffusion(DiffusionConfig())  # the noise is predicted, as SDXL does
RANGE = (0, 200)
BANDS = ((0, 50), (50, 100), (100, 200), (200, 500), (500, 1000))
DATA = 1280
SHOWN = 12
STEPS = 8  # from timestep 199 down, in the picture


def noise(held_out: Pictures) -> torch.Tensor:
    """The noise that both networks take away again."""
    return gaussian(7, 0, len(held_out.maps), held_out.maps.shape[1:])


def finished(unet: UNet, held_out: Pictures) -> torch.Tensor:
    """The pictures, noised to the range's last timestep and denoised again."""
    levels = levels_at([round(RANGE[1] * (k + 1) / STEPS) - 1 for k in reversed(range(STEPS))], DIFFUSION)
    condition = Condition(held_out.captions[:, None], conditioning_vector(held_out.captions, {}, unet.config))
    return sample(denoiser(unet, DIFFUSION, condition), noised(held_out.maps, noise(held_out), levels), levels).clamp(
        -1, 1
    )


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Is the expert's error the lower one in its range?"""
    ranges = {"base": (0, 1000), "expert": RANGE}
    errors: dict[str, dict[tuple[int, int], list[float]]] = {name: {b: [] for b in (RANGE, *BANDS)} for name in ranges}
    shown: list[tuple[str, torch.Tensor]] = []
    for seed in seeds:
        data, held_out = large_ones(DATA, seed), large_ones(samples, HELD_OUT + seed)
        few = held_out.rows(slice(SHOWN))
        if seed == seeds[0]:
            noisy = DIFFUSION.add_noise(few.maps, noise(few), torch.full((len(few.maps),), RANGE[1] - 1))
            shown += [("held out", few.maps), (f"noised to timestep {RANGE[1] - 1}", noisy)]
        for name, timesteps in ranges.items():
            loss = DenoiserLossConfig(caption_dropout=0.0, timesteps=timesteps)
            unet = train(unet_config(), [data], images, seed, loss, DIFFUSION)
            for band in errors[name]:
                measured = DenoiserLossConfig(caption_dropout=0.0, timesteps=band)
                errors[name][band].append(float(error(unet, held_out, measured, HELD_OUT + seed, 0, DIFFUSION).mean()))
            if seed == seeds[0]:
                shown.append((f"finished by the {name}", finished(unet, few)))
        rows = []
        for band in (RANGE, *BANDS):
            ratios = [expert / base for base, expert in zip(errors["base"][band], errors["expert"][band], strict=True)]
            cells = [spread(errors[name][band], 4) for name in ranges]
            rows.append([f"{band[0]} to {band[1] - 1}", *cells, spread(ratios, 3)])
        inside = [expert / base for base, expert in zip(errors["base"][RANGE], errors["expert"][RANGE], strict=True)]
        better = max(inside) < 1
        verdict = (
            f"below timestep 200 the expert's error is {statistics.mean(inside):.3f} times the base's after as many "
            f"pictures, and {'lower' if better else 'not lower'} in every seed. Above, it was not trained."
        )
        set_up = (
            f"{DATA} pictures for each seed; squared error of the predicted noise over {samples} held-out ones, the "
            "same noise for both."
        )
        columns = ["timesteps", "base", "expert", "expert over base"]
        claim = "Refiner: trained on the lowest 200 timesteps, a network has the lower error there"
        yield Proof("refiner_range", claim, set_up, columns, rows, better, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=16_000, samples=512)
