"""Multi-aspect training (SDXL 2.3): a network that trained on buckets makes whole objects in long pictures.

    python -m tests.proofs.aspect_buckets

Originals of five formats, those of the buckets, hold one object as long and as wide as they are. One network sees them
whole, in their buckets, and is told original size, crop and target size; one sees centre squares of them, and is told
original size and crop. Each is asked for whole pictures of every bucket's shape: the first by its numbers, the second
once by those of a whole square, and once by those of the picture's own size.
"""

from __future__ import annotations

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
from tests.proofs.toy import HELD_OUT, Pictures, caption, drawing, ink, on_edge, paint, pictures, train, unet_config

SQUARE = (10, 10)
BUCKETS = ((6, 16), (8, 12), SQUARE, (12, 8), (16, 6))  # of about one area, as the paper's
DATA = 2048
CROP = CropConfig(placement="center", flip_chance=0.0)
WITHOUT_TARGET = (Conditioning.ORIGINAL_SIZE, Conditioning.CROP_TOP_LEFT)
ARMS = ("trained on buckets", "on squares, asked for a square's whole", "on squares, asked for its own size")
LONGEST = ((6, 16), (16, 6))
LEAST_INK, ONE_PIECE = 4, 0.9  # elements; share of the ink
SHOWN = 8


def drawn(count: int, seed: int, buckets: Sequence[tuple[int, int]]) -> dict[tuple[int, int], Pictures]:
    """Originals brought to their nearest bucket, by bucket."""
    random = np.random.default_rng(seed)
    rows: dict[tuple[int, int], list] = {bucket: [] for bucket in buckets}
    for _ in range(count):
        size = BUCKETS[random.integers(len(BUCKETS))]
        colour = random.uniform(0.1, 0.7, 3)
        centre = tuple(side * random.uniform(0.48, 0.52) for side in size)
        radii = tuple(side * random.uniform(0.26, 0.32) for side in size)
        original = drawing("disc", size, size, centre, radii, colour)
        bucket = nearest(size, buckets)
        top_left, flip = draw_crop(size, bucket, CROP, "")
        told = (size, top_left, bucket)
        rows[bucket].append((crop_pixels(original, bucket, top_left, flip), caption("disc", colour), *told))
    found = {}
    for bucket, members in rows.items():
        maps, captions, sizes, crops, targets = zip(*members, strict=True)
        found[bucket] = pictures(maps, captions, original_size=sizes, crop_top_left=crops, target_size=targets)
    return found


def whole(maps: Tensor) -> Tensor:
    """Whether each picture [N] holds one object, in one piece, that no edge cuts off."""
    results = []
    for mask, cut in zip(ink(maps).numpy(), on_edge(maps).tolist(), strict=True):
        parts, _ = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        one = sizes.sum() >= LEAST_INK and sizes.max() >= ONE_PIECE * sizes.sum()
        results.append(bool(one) and not cut)
    return torch.tensor(results)


def percent(maps: Tensor) -> float:
    """Whole objects in percent."""
    return 100 * float(whole(maps).float().mean())


def painted(seed: int, images: int, captions: Tensor) -> dict[str, list[Tensor]]:
    """What each of ARMS paints at each of BUCKETS."""
    bucketed, square = (drawn(DATA, seed, buckets) for buckets in (BUCKETS, [SQUARE]))
    multi = train(unet_config(*BASE_CONDITIONING), list(bucketed.values()), images, seed)
    single = train(unet_config(*WITHOUT_TARGET), list(square.values()), images, seed)
    made: dict[str, list[Tensor]] = {name: [] for name in ARMS}
    for size in BUCKETS:
        for name, unet, original in zip(ARMS, (multi, single, single), (size, SQUARE, size), strict=True):
            told = {"original_size": original, "crop_top_left": (0, 0), "target_size": size}
            made[name].append(paint(unet, captions, size, seed, **told))
    return made


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Are more objects whole where pictures are long?"""
    shares: dict[str, list[list[float]]] = {name: [] for name in ARMS}  # by seed, then by bucket
    shown: list[tuple[str, Tensor]] = []
    for seed in seeds:
        captions = drawn(samples, HELD_OUT + seed, [SQUARE])[SQUARE].captions
        made = painted(seed, images, captions)
        for name, maps in made.items():
            shares[name].append([percent(each) for each in maps])
        shown = shown or [
            (f"{size[0]} x {size[1]}, {name}", made[name][at][:SHOWN])
            for at, size in enumerate(BUCKETS)
            for name in ARMS
        ]
        found = {name: list(zip(*values, strict=True)) for name, values in shares.items()}  # by bucket, then by seed
        real = drawn(DATA, HELD_OUT, BUCKETS)
        rows = [
            [
                f"{size[0]} x {size[1]}",
                f"{percent(real[size].maps):.1f}",
                *(spread(found[name][at], 1) for name in ARMS),
            ]
            for at, size in enumerate(BUCKETS)
        ]
        first, *others = ARMS
        longest = [at for at, size in enumerate(BUCKETS) if size in LONGEST]
        better = all(min(found[first][at]) > max(found[name][at]) for at in longest for name in others)
        means = [statistics.mean(v for at in longest for v in found[name][at]) for name in ARMS]
        verdict = (
            f"where one side is more than twice the other, {means[0]:.0f}% of the objects are whole after training on "
            f"buckets. After training on squares it is {means[1]:.0f}% for a square's numbers and {means[2]:.0f}% for "
            f"the picture's own. In both formats the first is, at its worst seed, {'above' if better else 'not above'} "
            "the others at their best. The other formats are beside it, without a condition."
        )
        set_up = (
            f"{DATA} originals for each seed. Whole: one object in one piece that no edge cuts; shares in percent, of "
            f"{samples} pictures."
        )
        columns = ["height x width", "the data", *ARMS]
        claim = "Multi-aspect training: whole objects in long pictures"
        yield Proof("aspect_buckets", claim, set_up, columns, rows, better, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=32_000, samples=256)
