"""Size conditioning (SDXL 2.2): sharpness follows the original size that is asked for, and small images help.

    python -m tests.proofs.size_conditioning

The set-up of the paper's Table 2: all networks see as many pictures, and of the data 5% are as large as the network's
own maps (there, 70,000 of 1.28 million). One network sees these alone, one sees all without being told, and one is
told the original size. Each paints pictures of the captions of held-out large ones, and is measured against them.
Beside the paper there is no guidance, and the features are not Inception's but simple ones, named below.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Conditioning
from model.metrics import Moments, frechet_distance
from pipelines.images import crop_pixels
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.toy import SHAPES, Pictures, caption, drawing, paint, pictures, train, unet_config

SIDE = 16
DATA, LARGE_SHARE = 1280, 0.05
SMALLEST, LARGEST = 4, 32
ASKED = (4, 6, 8, 12, 16, 24, 32)


def drawn(sizes: Sequence[int], seed: int) -> Pictures:
    """Striped shapes, drawn at their original size and brought to the map's as preprocessing does."""
    random, rows = np.random.default_rng(seed), []
    for size in sizes:
        shape, colour = SHAPES[random.integers(3)], random.uniform(0.2, 0.9, 3)
        centre, radius = random.uniform(7, 9, 2), random.uniform(5, 7)
        stripes = (int(random.integers(2)), random.uniform(0, 2 * np.pi))
        original = drawing(shape, (SIDE, SIDE), (size, size), tuple(centre), (radius, radius), colour, stripes)
        rows.append((crop_pixels(original, (SIDE, SIDE), (0, 0), False), caption(shape, colour), (size, size)))
    maps, captions, pairs = zip(*rows, strict=True)
    return pictures(maps, captions, original_size=pairs)


def mixed_sizes(count: int, seed: int) -> list[int]:
    """Original sides: 5% evenly from the map's up, the others evenly below it."""
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
    return torch.cat([F.avg_pool2d(maps, SIDE // 4).flatten(1), torch.stack(bands, 1)], 1)


def distance(maps: Tensor, reference: Tensor) -> float:
    """Frechet distance of the features, each in deviations of the reference's."""
    real = features(reference)
    mean, deviation = real.mean(0), real.std(0) + 1e-6
    sides = []
    for found in (features(maps), real):
        moments = Moments(real.shape[1])
        moments.add((found - mean) / deviation)
        sides.append(moments)
    return frechet_distance(*sides)


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Does sharpness follow the size that is asked for, and is telling it better than discarding and ignoring?"""
    sizes = mixed_sizes(DATA, 0)
    data = drawn(sizes, 1)
    large = data.rows(torch.tensor([size >= SIDE for size in sizes]))
    other = mixed_sizes(int(samples / LARGE_SHARE), 2)
    held_out = drawn([size for size in other if size >= SIDE], 3)
    another = drawn([size for size in other if size >= SIDE], 4)
    arms = {
        "small ones discarded": (unet_config(), large),
        "size ignored": (unet_config(), data),
        "size told": (unet_config(Conditioning.ORIGINAL_SIZE), data),
    }
    asked_large = held_out.conditions[Conditioning.ORIGINAL_SIZE] / 8
    distances: dict[str, list[float]] = {name: [] for name in arms}
    levels: dict[str, list[float]] = {name: [] for name in arms}
    by_size: dict[int, list[float]] = {size: [] for size in ASKED}
    shown = [("held out", held_out.maps[:16])]
    few = held_out.captions[: max(8, samples // 4)]
    for seed in seeds:
        for name, (config, seen) in arms.items():
            unet = train(config, [seen], images, seed)
            made = paint(unet, held_out.captions, (SIDE, SIDE), seed, original_size=asked_large)
            distances[name].append(distance(made, held_out.maps))
            levels[name].append(float(sharpness(made).mean()))
            if seed == seeds[0]:
                shown.append((f"{name}, asked for the large sizes", made[:16]))
        for size in ASKED:
            made = paint(unet, few, (SIDE, SIDE), seed, original_size=(size, size))
            by_size[size].append(float(sharpness(made).mean()))
            if seed == seeds[0]:
                shown.append((f"size told, asked for {size} x {size}", made[:16]))
        floor, real = distance(another.maps, held_out.maps), float(sharpness(held_out.maps).mean())
        rows = [[name, spread(distances[name]), spread(levels[name], 3)] for name in arms]
        rows.append(["other large pictures", f"{floor:.2f}", f"{float(sharpness(another.maps).mean()):.3f}"])
        for size in ASKED:
            same = float(sharpness(drawn([size] * samples, 5).maps).mean())
            rows.append([f"size told, asked for {size} x {size} (real ones: {same:.3f})", "", spread(by_size[size], 3)])
        means = [statistics.mean(by_size[size]) for size in ASKED if size <= SIDE]
        rises = all(low < high for low, high in pairwise(means))
        told_, others = distances["size told"], [distances[name] for name in arms if name != "size told"]
        better = all(max(told_) < min(other) for other in others)
        verdict = (
            f"sharpness {'rises' if rises else 'does not rise'} with every size up to the map's "
            f"({means[0]:.3f} to {means[-1]:.3f}, held-out large ones {real:.3f}). The distance of the network that is "
            f"told, at its worst seed, is {'below' if better else 'not below'} that of both others at their best."
        )
        set_up = (
            f"{DATA} pictures of which {len(large.maps)} are {SIDE} x {SIDE} or larger; distances over "
            f"{len(held_out.maps)} pictures each, of 51 features: colours of 4 x 4 fields and strength of details in "
            "three bands."
        )
        columns = ["network", "Frechet distance to held-out large pictures", "sharpness"]
        claim = "Size conditioning: sharpness follows the size asked for, and small images help"
        yield Proof("size_conditioning", claim, set_up, columns, rows, rises and better, verdict, sheet(shown, 48))


if __name__ == "__main__":
    main(prove, images=20_000, samples=256)
