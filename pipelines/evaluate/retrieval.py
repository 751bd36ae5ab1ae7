"""Do pictures depend on their prompts? How near each one is to the image whose caption it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

THUMBNAIL = 32  # pixels along each side of what is compared
PERMUTATIONS = 9_999


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Where the own image stands among the candidates by distance, over all pictures."""

    pictures: int
    """Pictures that have at least one other candidate."""
    mean_rank: float
    """Mean relative rank of the own image: 0 nearest of all, 1 farthest; chance is 0.5."""
    first: float
    """Share of pictures whose nearest candidate is the own image."""
    first_by_chance: float
    """That share if pictures had nothing to do with their prompts."""
    p_value: float
    """Chance of so low a mean rank if captions were dealt out anew within each group."""

    def __str__(self) -> str:
        return (
            f"rank of the own image {self.mean_rank:.3f} (chance 0.500), nearest of all in {self.first:.1%} "
            f"(chance {self.first_by_chance:.1%}), p = {self.p_value:.4f}, over {self.pictures} pictures"
        )


def retrieval(
    pictures: Sequence[Image.Image], images: Sequence[Image.Image], groups: Sequence[object], seed: int = 0
) -> Retrieval:
    """Rank image k among the images of its group by its distance to picture k, for every k.

    A group is what a picture's shape already tells, such as its bucket: ranks and permutations stay inside groups, so
    the shape alone scores chance. The distance is Euclidean between thumbnails. Groups of one are left out.
    """
    made, real = _thumbnails(pictures), _thumbnails(images)
    members: dict[object, list[int]] = {}
    for number, group in enumerate(groups):
        members.setdefault(group, []).append(number)
    tables = []  # per group: relative rank of image j by its distance to picture i
    for numbers in members.values():
        if len(numbers) > 1:
            distance = np.linalg.norm(made[numbers][:, None] - real[numbers][None], axis=2)
            below = (distance[:, None, :] < distance[:, :, None]).sum(2)
            ties = (distance[:, None, :] == distance[:, :, None]).sum(2) - 1
            tables.append((below + 0.5 * ties) / (len(numbers) - 1))
    if not tables:
        raise ValueError("no group has two pictures")
    count = sum(len(table) for table in tables)
    own = [np.diagonal(table) for table in tables]
    total = sum(ranks.sum() for ranks in own)
    draws = np.random.Generator(np.random.PCG64(seed))
    as_low = 0
    for _ in range(PERMUTATIONS):
        dealt = sum(table[np.arange(len(table)), draws.permutation(len(table))].sum() for table in tables)
        as_low += bool(dealt <= total + 1e-9)
    return Retrieval(
        pictures=count,
        mean_rank=float(total / count),
        first=float(sum((ranks == 0).sum() for ranks in own) / count),
        first_by_chance=len(tables) / count,
        p_value=(1 + as_low) / (1 + PERMUTATIONS),
    )


def _thumbnails(images: Sequence[Image.Image]) -> np.ndarray:
    size = (THUMBNAIL, THUMBNAIL)
    return np.stack(
        [np.asarray(i.convert("RGB").resize(size, Image.Resampling.BOX), np.float32).ravel() for i in images]
    )
