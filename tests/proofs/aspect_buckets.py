"""Multi-aspect training (SDXL 2.3): a network that trained on buckets makes whole objects at each aspect.

    python -m tests.proofs.aspect_buckets

Originals of five formats from 1:4 to 4:1, give or take a little, hold one object as long and as wide as they are. One
network sees them in the bucket of nearest aspect, and is told original size, crop and target size; one sees centre
squares of them, and is told original size and crop. Each is asked for whole pictures of every bucket's shape: the first
for that size, the second for what meant a whole object to it, a square original with crop (0, 0).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from model.config import BASE_CONDITIONING, Conditioning
from pipelines.config import CropConfig
from pipelines.images import crop_pixels, draw_crop
from pipelines.preprocess.bucket import nearest
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.toy import SHAPES, Pictures, caption, drawing, ink, on_edge, paint, pictures, train, unet_config

SQUARE = (16, 16)
BUCKETS = ((8, 32), (12, 20), SQUARE, (20, 12), (32, 8))  # of about one area, as the paper's
DATA = 2048
CROP = CropConfig(placement="center", flip_chance=0.0)
FILLS = 0.5  # of both sides, at least; the drawn objects fill more


def drawn(count: int, seed: int, buckets: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Pictures]:
    """Originals brought to their nearest bucket, by bucket."""
    random = np.random.default_rng(seed)
    rows: dict[tuple[int, int], list] = {bucket: [] for bucket in buckets}
    for _ in range(count):
        usual, stretch = BUCKETS[random.integers(len(BUCKETS))], math.exp(random.uniform(-0.06, 0.06))
        size = (round(usual[0] * stretch), round(usual[1] / stretch))
        shape, colour = SHAPES[random.integers(3)], random.uniform(0.1, 0.7, 3)
        centre = tuple(side * random.uniform(0.48, 0.52) for side in size)
        radii = tuple(side * random.uniform(0.28, 0.34) for side in size)
        original = drawing(shape, size, size, centre, radii, colour)
        bucket = nearest(size, buckets)
        top_left, flip = draw_crop(size, bucket, CROP, "")
        told = (size, top_left, bucket)
        rows[bucket].append((crop_pixels(original, bucket, top_left, flip), caption(shape, colour), *told))
    found = {}
    for bucket, members in rows.items():
        maps, captions, sizes, crops, targets = zip(*members, strict=True)
        found[bucket] = pictures(maps, captions, original_size=sizes, crop_top_left=crops, target_size=targets)
    return found


def whole(maps: Tensor) -> Tensor:
    """Whether each picture [N] holds one object, cut by no edge, that fills it."""
    results = []
    for mask, cut in zip(ink(maps).numpy(), on_edge(maps).tolist(), strict=True):
        parts, _ = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        one = len(sizes) > 0 and sizes.max() >= 0.9 * sizes.sum()
        fills = all(np.ptp(np.nonzero(mask)[axis]) + 1 >= FILLS * mask.shape[axis] for axis in (0, 1)) if one else False
        results.append(one and fills and not cut)
    return torch.tensor(results)


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Are objects whole at each aspect?"""
    bucketed, square = drawn(DATA, 1, BUCKETS), drawn(DATA, 1, [SQUARE])[SQUARE]
    captions = drawn(samples, 2, [SQUARE])[SQUARE].captions
    without_target = (Conditioning.ORIGINAL_SIZE, Conditioning.CROP_TOP_LEFT)
    shares: dict[str, dict[tuple[int, int], list[float]]] = {
        k: {b: [] for b in BUCKETS} for k in ("buckets", "squares")
    }
    shown = []
    for seed in seeds:
        multi = train(unet_config(*BASE_CONDITIONING), list(bucketed.values()), images, seed)
        single = train(unet_config(*without_target), [square], images, seed)
        for size in BUCKETS:
            made = {
                "buckets": paint(
                    multi, captions, size, seed, original_size=size, crop_top_left=(0, 0), target_size=size
                ),
                "squares": paint(single, captions, size, seed, original_size=SQUARE, crop_top_left=(0, 0)),
            }
            for name, maps in made.items():
                shares[name][size].append(100 * float(whole(maps).float().mean()))
                if seed == seeds[0]:
                    shown.append((f"trained on {name}, {size[0]} x {size[1]}", maps[:16]))
        rows = []
        for size in BUCKETS:
            real = 100 * float(whole(bucketed[size].maps).float().mean())
            cells = [f"{real:.1f}", spread(shares["buckets"][size], 1), spread(shares["squares"][size], 1)]
            rows.append([f"{size[0]} x {size[1]}", *cells])
        others = [size for size in BUCKETS if size != SQUARE]
        better = all(min(shares["buckets"][size]) > max(shares["squares"][size]) for size in others)
        means = {name: statistics.mean(v for size in others for v in shares[name][size]) for name in shares}
        verdict = (
            f"away from the square {means['buckets']:.0f}% of the objects are whole after training on buckets, and "
            f"{means['squares']:.0f}% after squares; at its worst seed the first is "
            f"{'above' if better else 'not above'} the second at its best, in every bucket."
        )
        set_up = (
            f"{DATA} originals. Whole: one object in one piece that no edge cuts, as long as {FILLS:.0%} of the "
            "picture's sides or longer; shares in percent."
        )
        columns = ["height x width", "the data", "trained on buckets", "trained on squares"]
        claim = "Multi-aspect training: whole objects at each aspect"
        yield Proof("aspect_buckets", claim, set_up, columns, rows, better, verdict, sheet(shown, 32))


if __name__ == "__main__":
    main(prove, images=20_000, samples=96)
