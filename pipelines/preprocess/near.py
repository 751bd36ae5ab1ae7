"""Near-duplicates: a 64-bit perceptual hash of each image, and which of all hashes differ in few bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np

HASH_BITS, HASH_SIDE = 64, 32  # bits of a hash; pixels of the square thumbnail that it is made of
FREQUENCIES = 8  # lowest ones in each direction
SORT_COST, PAIR_COST = (
    15,
    1,
)  # what a hash costs in one table, against what a pair of candidates does: measured, roughly


def perceptual_hash(luma: np.ndarray) -> int:
    """64 bits that resizing and recompression hardly change, of a thumbnail [32, 32] of brightness.

    Which of its 8 x 8 lowest frequencies lie above their median (pHash: Zauner 2010, as imagehash computes it).
    """
    frequency, place = np.arange(FREQUENCIES)[:, None], np.arange(HASH_SIDE)[None]
    basis = np.cos(np.pi * frequency * (2 * place + 1) / (2 * HASH_SIDE))  # DCT-II, not normalized
    low = basis @ luma.astype(np.float64) @ basis.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def leaders(hashes: np.ndarray, bits: int) -> np.ndarray:
    """For each hash, uint64 [N], the place of the one that is kept for it: its own, or that of an earlier one.

    A hash is kept where no kept one before it is within `bits`; otherwise the first such stands for it. So no two kept
    ones are near each other, each other one is near the one that stands for it, and a chain is not followed further.
    """
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    order = np.argsort(first)  # distinct hashes by their first place
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    led: dict[int, int] = {}  # whom an earlier one stands for, and which; most have none
    for earlier, later in near_pairs(distinct[order], bits).tolist():
        if earlier not in led and later not in led:
            led[later] = earlier
    leader = np.arange(len(order))
    leader[list(led)] = list(led.values())
    return first[order][leader[rank[inverse]]]


def near_pairs(hashes: np.ndarray, bits: int) -> np.ndarray:
    """The pairs of places [P, 2], smaller first, in ascending order, of distinct hashes, uint64 [N], within `bits`."""
    count, found = len(hashes), [np.empty(0, np.int64)]
    for choice in choices(count, bits):
        for one, other in near_of(hashes & choice.mask, hashes, choice, bits):
            found.append(np.minimum(one, other) * count + np.maximum(one, other))
    return np.stack(np.divmod(np.sort(np.concatenate(found)), max(1, count)), axis=1)


@dataclass(frozen=True)
class Choice:
    """Some of the bands that a hash is cut into."""

    mask: np.uint64
    """The bits of them."""
    before: tuple[np.uint64, ...]
    """The bits of each band that comes before the last of them and is none of them."""


def choices(count: int, bits: int) -> list[Choice]:
    """What to look for, among so many hashes: those within `bits` of each other agree in one of these choices.

    Of bits + k bands, at most `bits` differ between such hashes and k at least agree. So for each choice of k bands the
    hashes are sorted by them, and those that agree are compared. k is chosen for the least work.
    """

    def work(k: int) -> float:
        candidates = count**2 / 2 ** (HASH_BITS * k / (bits + k) + 1)
        return math.comb(bits + k, k) * (count * SORT_COST + candidates * PAIR_COST)

    k = min(range(1, 5), key=work)
    edges = [round(HASH_BITS * band / (bits + k)) for band in range(bits + k + 1)]
    bands = [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(edges)]
    return [
        Choice(
            np.bitwise_or.reduce([bands[number] for number in chosen]),
            tuple(bands[number] for number in range(chosen[-1]) if number not in chosen),
        )
        for chosen in combinations(range(bits + k), k)
    ]


def near_of(keys: np.ndarray, hashes: np.ndarray, choice: Choice, bits: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places, some pairs [P], [P] at a time, of those of the hashes within `bits` whose keys, their bits of the
    choice, are equal. A pair that agrees in several choices is given by the first of them alone."""
    order = np.argsort(keys)
    keys, hashes = keys[order], hashes[order]
    places = np.arange(len(keys) - 1)
    step = 0
    while len(places):  # each hash against the one `step` behind it, for as long as their keys agree
        step += 1
        places = places[places + step < len(keys)]
        places = places[keys[places] == keys[places + step]]
        apart = hashes[places] ^ hashes[places + step]
        near = np.bitwise_count(apart) <= bits
        for band in choice.before:
            near &= (apart & band) != 0
        yield order[places[near]], order[places[near] + step]
