"""Crop conditioning (SDXL 2.2, Figure 5): crop (0, 0) asks for the whole object, other crops for one that is cut off.

    python -m tests.proofs.crop_conditioning

Originals hold one disc near their middle; four in ten are square, the others 1.75 to 2.5 times as long as wide or as
wide as long. Preprocessing's random crop to a square cuts many of them. One network is told nothing, one the crop and
nothing else, so that no other number can give it away. Asked for several crops, it begins with the same noise.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import Conditioning
from pipelines.config import CropConfig
from pipelines.images import crop_pixels, draw_crop
from tests.proofs.report import Proof, main, sheet, spread
from tests.proofs.toy import (
    HELD_OUT,
    PIXELS,
    Pictures,
    caption,
    drawing,
    ink,
    on_edge,
    paint,
    pictures,
    train,
    unet_config,
)

SIDE = 8
DATA, SQUARE_SHARE, LONG = 4096, 0.4, (1.75, 2.5)
CROP = CropConfig(placement="random", flip_chance=0.0)
ASKED = ((0, 0), (0, 4), (0, 8), (4, 0), (8, 0))
FAR = ((0, 8), (8, 0))
LEAST_INK, LEAST_SHIFT, NEAR = 4, 1, 0.5  # elements
SHOWN = 12


def drawn(count: int, seed: int) -> Pictures:
    """Random crops of originals with a disc in their middle."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        long = SIDE if random.random() < SQUARE_SHARE else round(SIDE * random.uniform(*LONG))
        size = (long, SIDE) if random.random() < 0.5 else (SIDE, long)
        colour = random.uniform(0.1, 0.7, 3)
        centre = tuple(side / 2 + random.uniform(-0.5, 0.5) for side in size)
        radius = random.uniform(2.2, 2.8)
        original = drawing("disc", size, size, centre, (radius, radius), colour)
        top_left, flip = draw_crop(size, (SIDE, SIDE), CROP, f"{seed}-{number}")
        rows.append((crop_pixels(original, (SIDE, SIDE), top_left, flip), caption("disc", colour), top_left))
    maps, captions, crops = zip(*rows, strict=True)
    return pictures(maps, captions, crop_top_left=crops)


def whole(maps: Tensor) -> Tensor:
    """Whether each picture [N] holds an object that no edge cuts off."""
    return (ink(maps).flatten(1).sum(1) >= LEAST_INK) & ~on_edge(maps)


def share(maps: Tensor) -> float:
    """Whole objects in percent."""
    return 100 * float(whole(maps).float().mean())


def middle(maps: Tensor) -> Tensor:
    """Where the objects' centres of mass are on average, (down, across) from the picture's middle, in elements."""
    mask = ink(maps).float()
    mask = mask[mask.flatten(1).sum(1) >= LEAST_INK]
    if not len(mask):
        return torch.full((2,), math.nan)
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    total = mask.sum((1, 2))
    return torch.stack([(mask.sum(2) @ place / total).mean(), (mask.sum(1) @ place / total).mean()])


def of_crop(data: Pictures, crop: tuple[int, int]) -> Tensor:
    """The maps of one crop."""
    return data.maps[(data.conditions[Conditioning.CROP_TOP_LEFT] == torch.tensor(crop) * PIXELS).all(1)]


def row(name: str, made: Sequence[Tensor]) -> list[str]:
    """Of pictures by each seed: whole objects, and the centres down and across."""
    centres = torch.stack([middle(maps) for maps in made]).T.tolist()
    return [name, spread([share(maps) for maps in made], 1), *(spread(values) for values in centres)]


def moved(near: Tensor, far: Tensor, crop: tuple[int, int]) -> bool:
    """Whether objects lie further up (left) where a crop further down (right) is asked for, and no further aside."""
    shift = middle(near) - middle(far)
    along = 0 if crop[0] else 1
    return bool(shift[along] >= LEAST_SHIFT and shift[1 - along].abs() < LEAST_SHIFT / 2)


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Are objects whole and in the middle where crop (0, 0) is asked for, and where the crop says otherwise?"""
    seen: list[Pictures] = []  # by seed, as are all
    nothing: list[Tensor] = []
    asked: dict[tuple[int, int], list[Tensor]] = {crop: [] for crop in ASKED}
    for seed in seeds:
        data, captions = drawn(DATA, seed), drawn(samples, HELD_OUT + seed).captions
        seen.append(data)
        nothing.append(paint(train(unet_config(), [data], images, seed), captions, (SIDE, SIDE), seed))
        told = train(unet_config(Conditioning.CROP_TOP_LEFT), [data], images, seed)
        for crop, made in asked.items():
            made.append(paint(told, captions, (SIDE, SIDE), seed, crop_top_left=crop))
        rows = [row("the data, all crops", [data.maps for data in seen]), row("told nothing", nothing)]
        for crop, made in asked.items():
            rows.append(row(f"the data, crops {crop}", [of_crop(data, crop) for data in seen]))
            rows.append(row(f"told the crop, asked for {crop}", made))
        centred, blind = [share(maps) for maps in asked[0, 0]], [share(maps) for maps in nothing]
        far = [share(maps) for crop in FAR for maps in asked[crop]]
        better = min(centred) > max(*blind, *far)
        follows = all(
            moved(near, there, crop) for crop in FAR for near, there in zip(asked[0, 0], asked[crop], strict=True)
        )
        central = all(float(middle(maps).abs().max()) < NEAR for maps in asked[0, 0])
        verdict = (
            f"asked for crop (0, 0), {statistics.mean(centred):.0f}% of the objects are whole, against "
            f"{statistics.mean(blind):.0f}% of a network that is told nothing, and {statistics.mean(far):.0f}% where "
            f"far crops are asked for; its worst seed is {'above' if better else 'not above'} the best of those. "
            f"There the objects' mean centre is {'' if central else 'not '}within {NEAR} elements of the middle in "
            "every seed. Asked for a crop further down or right instead, from the same noise, "
            f"{'every' if follows else 'not every'} network moves the objects up or left by {LEAST_SHIFT} element or "
            "more, and by less than half as much aside."
        )
        set_up = (
            f"{DATA} crops of {SIDE} x {SIDE} for each seed. Whole: there is an object, and no edge cuts it. Centres "
            "are counted from the picture's middle, in elements; far crops are 8 down or across."
        )
        shown = [("what training sees, all crops", seen[0].maps[:SHOWN]), ("told nothing", nothing[0][:SHOWN])]
        shown += [(f"told the crop, asked for {crop} (down, across)", made[0][:SHOWN]) for crop, made in asked.items()]
        columns = ["", "whole objects, %", "mean centre down", "across"]
        claim = "Crop conditioning: crop (0, 0) gives whole objects in the middle"
        holds = better and central and follows
        yield Proof("crop_conditioning", claim, set_up, columns, rows, holds, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=64_000, samples=256)
