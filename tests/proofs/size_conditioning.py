"""Size conditioning (SDXL 2.2): sharpness follows the original size that is asked for, and small images help.

    python -m tests.proofs.size_conditioning

The set-up of the paper's Table 2: all networks see as many pictures, and of the data 2.5% are as large as the network's
own maps (there, 70,000 of 1.28 million, 5.5%). One network sees these alone, one sees all without being told, and one
is told the original size. Each paints pictures of the captions of held-out large ones, and is measured against them.
Beside the paper there is no guidance, and the features are not Inception's but simple ones, named below; and the error
of denoising held-out large pictures is measured, too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Conditioning, UNetConfig
from model.metrics import Moments, frechet_distance
from model.unet import UNet
from pipelines.images import crop_pixels
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.toy import (
    HELD_OUT,
    NOTHING_DROPPED,
    PIXELS,
    SHAPES,
    Pictures,
    caption,
    drawing,
    error,
    paint,
    pictures,
    train,
    unet_config,
)

SIDE = 8
DATA, LARGE_SHARE = 2560, 0.025
SMALLEST, LARGEST = 3, 16
ASKED = (3, 4, 6, 8, 12, 16)
SHOWN = 12
DRAWS = 8  # of timestep and noise for each held-out picture
MEASURES = ("distances", "joint", "errors")


def drawn(sizes: Sequence[int], seed: int, side: int = SIDE) -> Pictures:
    """Striped shapes, drawn at their original size and brought to the map's as preprocessing does."""
    random, rows = np.random.default_rng(seed), []
    for size in sizes:
        shape, colour = SHAPES[random.integers(3)], random.uniform(0.2, 0.9, 3)
        centre, radius = side * random.uniform(0.45, 0.55, 2), side * random.uniform(0.32, 0.44)
        stripes = (int(random.integers(2)), random.uniform(0, 2 * np.pi))
        original = drawing(shape, (side, side), (size, size), tuple(centre), (radius, radius), colour, stripes)
        rows.append(
            (crop_pixels(original, (side, side), (0, 0), False), caption(shape, colour, stripes[0]), (size, size))
        )
    maps, captions, pairs = zip(*rows, strict=True)
    return pictures(maps, captions, original_size=pairs)


def mixed_sizes(count: int, seed: int) -> list[int]:
    """Original sides: 2.5% evenly from the map's up, the others evenly below it."""
    random = np.random.default_rng(seed)
    large = random.permutation(np.arange(count) < max(1, round(count * LARGE_SHARE)))
    return [
        int(random.integers(SIDE, LARGEST + 1) if is_large else random.integers(SMALLEST, SIDE)) for is_large in large
    ]


def sharpness(maps: Tensor) -> Tensor:
    """Mean absolute difference [N] of neighbouring elements, down and across."""
    down, across = maps.diff(dim=2).abs(), maps.diff(dim=3).abs()
    return down.mean((1, 2, 3)) + across.mean((1, 2, 3))


def features(maps: Tensor) -> Tensor:
    """[N,51]: the colours of 4 x 4 fields, and how strong details of 1, 2 and 4 elements are (log)."""
    bands, rest = [], maps
    for _ in range(3):
        coarse = F.avg_pool2d(rest, 2)
        detail = rest - F.interpolate(coarse, scale_factor=2.0)
        bands.append((detail.abs().mean((1, 2, 3)) + 1e-3).log())
        rest = coarse
    return torch.cat([F.avg_pool2d(maps, maps.shape[2] // 4).flatten(1), torch.stack(bands, 1)], 1)


def distance(maps: Tensor, reference: Tensor, captions: Tensor | None = None) -> float:
    """Frechet distance of the features, each in deviations of the reference's.

    With `captions` [N,..] of both beside the features, so that it counts, too, whether a picture is of its caption.
    """
    beside = torch.zeros(len(maps), 0) if captions is None else captions
    real, made = (torch.cat([features(each), beside], 1) for each in (reference, maps))
    mean, deviation = real.mean(0), real.std(0) + 1e-6
    sides = []
    for found in (made, real):
        moments = Moments(real.shape[1])
        moments.add((found - mean) / deviation)
        sides.append(moments)
    return frechet_distance(*sides)


def large_ones(count: int, seed: int) -> Pictures:
    """Pictures whose originals are as large as a map or larger."""
    return drawn(np.random.default_rng(seed).integers(SIDE, LARGEST + 1, count).tolist(), seed)


@dataclass
class Arm:
    """One kind of network, and what was found of it by each seed."""

    config: UNetConfig
    distances: list[float] = field(default_factory=list)
    joint: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    levels: list[float] = field(default_factory=list)

    def measure(self, unet: UNet, held_out: Pictures, seed: int) -> Tensor:
        """Pictures of the held-out captions at the held-out sizes, which have been measured."""
        sizes = held_out.conditions[Conditioning.ORIGINAL_SIZE] / PIXELS
        made = paint(unet, held_out.captions, (SIDE, SIDE), seed, original_size=sizes)
        self.distances.append(distance(made, held_out.maps))
        self.joint.append(distance(made, held_out.maps, held_out.captions))
        draws = [number * len(made) for number in range(DRAWS)]
        errors = [error(unet, held_out, NOTHING_DROPPED, HELD_OUT + seed, first).mean() for first in draws]
        self.errors.append(float(torch.stack(errors).mean()))
        self.levels.append(float(sharpness(made).mean()))
        return made

    def row(self, name: str) -> list[str]:
        """Of the table."""
        columns = ((self.distances, 2), (self.joint, 2), (self.errors, 4), (self.levels, 3))
        return [name, *(spread(values, digits) for values, digits in columns)]


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Does sharpness follow the size that is asked for, and is telling it better than discarding and ignoring?"""
    told = Arm(unet_config(Conditioning.ORIGINAL_SIZE))
    arms = {"small ones discarded": Arm(unet_config()), "size ignored": Arm(unet_config()), "size told": told}
    others = [arm for arm in arms.values() if arm is not told]
    by_size: dict[int, list[float]] = {size: [] for size in ASKED}
    floors: list[list[float]] = []
    shown: list[tuple[str, Tensor]] = []
    for seed in seeds:
        sizes = mixed_sizes(DATA, seed)
        data, held_out = drawn(sizes, seed), large_ones(samples, HELD_OUT + seed)
        large = data.rows(torch.tensor([size >= SIDE for size in sizes]))
        first = seed == seeds[0]
        shown += [("held out, large", held_out.maps[:SHOWN])] if first else []
        for name, arm in arms.items():
            unet = train(arm.config, [large if name == "small ones discarded" else data], images, seed)
            made = arm.measure(unet, held_out, seed)
            shown += [(f"{name}, for the same captions and large sizes", made[:SHOWN])] if first else []
        for size in ASKED:  # of the last network, which is told
            made = paint(unet, held_out.captions, (SIDE, SIDE), seed, original_size=(size, size))
            by_size[size].append(float(sharpness(made).mean()))
            shown += [(f"size told, asked for {size} x {size}", made[:SHOWN])] if first else []
        another = large_ones(samples, 2 * HELD_OUT + seed)
        floors.append([distance(another.maps, held_out.maps), float(sharpness(another.maps).mean())])
        rows = [arm.row(name) for name, arm in arms.items()]
        floor, real = zip(*floors, strict=True)
        rows.append(["other large pictures", spread(floor), "", "", spread(real, 3)])
        for size in ASKED:
            same = float(sharpness(drawn([size] * samples, HELD_OUT).maps).mean())
            rows.append(
                [f"size told, asked for {size} x {size} (real: {same:.3f})", *[""] * 3, spread(by_size[size], 3)]
            )
        below = [size for size in ASKED if size <= SIDE]
        rises = all(
            low < high
            for small, next_ in pairwise(below)
            for low, high in zip(by_size[small], by_size[next_], strict=True)
        )
        better = all(max(getattr(told, measure)) < min(getattr(arm, measure)) for arm in others for measure in MEASURES)
        verdict = (
            f"sharpness {'rises' if rises else 'does not rise'} with every size up to the map's, in every seed "
            f"({statistics.mean(by_size[below[0]]):.3f} to {statistics.mean(by_size[below[-1]]):.3f}; large ones have "
            f"{statistics.mean(real):.3f}). By both distances and by the error, the network that is told is, at its "
            f"worst seed, {'better' if better else 'not better'} than both others at their best."
        )
        set_up = (
            f"{DATA} pictures for each seed, of which {len(large.maps)} are {SIDE} x {SIDE} or larger; distances over "
            f"{samples} held-out large pictures, of 51 features: colours of 4 x 4 fields and strength of details in "
            "three bands; the second distance with the captions beside them. The error is of v, at all timesteps."
        )
        columns = ["network", "Frechet distance", "with captions", "error", "sharpness"]
        claim = "Size conditioning: sharpness follows the size asked for, and small images help"
        yield Proof("size_conditioning", claim, set_up, columns, rows, rises and better, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=64_000, samples=512, first_seed=20)  # 10 is the first try's: docs/proofs.md
