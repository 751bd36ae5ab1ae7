"""Crop conditioning (SDXL 2.2, Figure 5): crop (0, 0) asks for the whole object, other crops for one that is cut off.

    python -m tests.proofs.crop_conditioning

Originals hold one object near their middle; three in ten are square, the others up to 2.5 times as long as wide or as
wide as long. Preprocessing's random crop to a square cuts many of them. One network is told nothing, one the crop and
nothing else, so that no other number can give it away.
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
    PIXELS,
    SHAPES,
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

SIDE = 16
DATA, SQUARE_SHARE, LONGEST = 4096, 0.3, 2.5
CROP = CropConfig(placement="random", flip_chance=0.0)
ASKED = ((0, 0), (0, 6), (0, 12), (6, 0), (12, 0))
FAR = ((0, 12), (12, 0))


def drawn(count: int, seed: int) -> Pictures:
    """Random crops of originals with an object in their middle."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        ratio = 1.0 if random.random() < SQUARE_SHARE else math.exp(random.uniform(-1, 1) * math.log(LONGEST))
        size = (round(SIDE * max(1.0, ratio)), round(SIDE * max(1.0, 1 / ratio)))
        shape, colour = SHAPES[random.integers(3)], random.uniform(0.1, 0.7, 3)
        centre = tuple(side / 2 + random.uniform(-1, 1) for side in size)
        radius = random.uniform(4, 5)
        original = drawing(shape, size, size, centre, (radius, radius), colour)
        top_left, flip = draw_crop(size, (SIDE, SIDE), CROP, f"{seed}-{number}")
        rows.append((crop_pixels(original, (SIDE, SIDE), top_left, flip), caption(shape, colour), top_left))
    maps, captions, crops = zip(*rows, strict=True)
    return pictures(maps, captions, crop_top_left=crops)


def whole(maps: Tensor) -> Tensor:
    """Whether each picture [N] holds an object that no edge cuts off."""
    return (ink(maps).flatten(1).sum(1) >= 12) & ~on_edge(maps)


def share(maps: Tensor) -> float:
    """Whole objects in percent."""
    return 100 * float(whole(maps).float().mean())


def middle(maps: Tensor) -> Tensor:
    """Where the objects' centres of mass are on average, (down, across) from the picture's middle, in elements."""
    mask = ink(maps).float()
    mask = mask[mask.flatten(1).sum(1) >= 12]
    if not len(mask):
        return torch.full((2,), math.nan)
    place = torch.arange(SIDE) - (SIDE - 1) / 2
    total = mask.sum((1, 2))
    return torch.stack([(mask.sum(2) @ place / total).mean(), (mask.sum(1) @ place / total).mean()])


def shown_middle(found: Sequence[Tensor]) -> str:
    """Mean over the seeds, down and across."""
    down, across = torch.stack(list(found)).mean(0).tolist()
    return f"{down:+.1f}, {across:+.1f}"


def row(name: str, made: Sequence[Tensor]) -> list[str]:
    """Of pictures by each seed."""
    return [name, spread([share(maps) for maps in made], 1), shown_middle([middle(maps) for maps in made])]


def prove(images: int, seeds: Sequence[int], samples: int) -> Iterator[Proof]:
    """Are objects whole and in the middle where crop (0, 0) is asked for?"""
    data, captions = drawn(DATA, 1), drawn(samples, 2).captions
    nothing: list[Tensor] = []  # by seed
    asked: dict[tuple[int, int], list[Tensor]] = {crop: [] for crop in ASKED}
    for seed in seeds:
        nothing.append(paint(train(unet_config(), [data], images, seed), captions, (SIDE, SIDE), seed))
        told = train(unet_config(Conditioning.CROP_TOP_LEFT), [data], images, seed)
        for crop, made in asked.items():
            made.append(paint(told, captions, (SIDE, SIDE), seed, crop_top_left=crop))
        rows = [row("the data, all crops", [data.maps]), row("told nothing", nothing)]
        crops = data.conditions[Conditioning.CROP_TOP_LEFT] / PIXELS
        for crop, made in asked.items():
            real = data.maps[(crops - torch.tensor(crop)).abs().amax(1) <= min(1, sum(crop))]
            rows.append(row(f"the data, crops {f'near {crop}' if sum(crop) else crop}: {len(real)}", [real]))
            rows.append(row(f"told the crop, asked for {crop}", made))
        centred, blind = [share(maps) for maps in asked[0, 0]], [share(maps) for maps in nothing]
        far = [share(maps) for crop in FAR for maps in asked[crop]]
        better = min(centred) > max(*blind, *far)
        verdict = (
            f"asked for crop (0, 0), {statistics.mean(centred):.0f}% of the objects are whole, against "
            f"{statistics.mean(blind):.0f}% of a network that is told nothing, and {statistics.mean(far):.0f}% where "
            f"far crops are asked for; its worst seed is {'above' if better else 'not above'} the best of those."
        )
        set_up = (
            f"{DATA} crops of {SIDE} x {SIDE}. Whole: there is an object, and no edge cuts it. Centres are counted "
            "from the picture's middle, in elements; far crops are 12 down or across."
        )
        shown = [("what training sees", data.maps[:24]), ("told nothing", nothing[0][:24])]
        shown += [(f"told the crop, asked for {crop}", made[0][:24]) for crop, made in asked.items()]
        columns = ["", "whole objects, %", "mean centre (down, across)"]
        claim = "Crop conditioning: crop (0, 0) gives whole objects in the middle"
        yield Proof("crop_conditioning", claim, set_up, columns, rows, better, verdict, sheet(shown))


if __name__ == "__main__":
    main(prove, images=20_000, samples=128)
