"""Which values of which parameter a worker's optimizer holds, under each ZeRO stage.

Everything that is kept by worker (fp32 weights, moments, average) lies in the optimizer's own flat tensors, whose cut
differs by stage. Named runs of values are what all stages have in common: checkpoints are written, read and gathered by
them, so neither the stage nor the number of workers enters there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of one parameter's values in a flat tensor of the optimizer."""

    name: str
    start: int
    """The first of them, in the flattened parameter."""
    length: int
    tensor: int
    """Number of the optimizer's tensor."""
    offset: int
    """Where they begin there."""

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The values [length], in place, in tensors that are cut like the optimizer's."""
        return tensors[self.tensor].detach().view(-1)[self.offset : self.offset + self.length]


def whole(sizes: Mapping[str, int]) -> list[Piece]:
    """Stage 0: every worker holds every parameter, in a tensor each."""
    return [Piece(name, 0, size, number, 0) for number, (name, size) in enumerate(sizes.items())]


def line(sizes: Mapping[str, int], rank: int, length: int) -> list[Piece]:
    """Stages 1 and 2: the parameters lie end to end, padded at the end, and the line is cut into equal parts."""
    pieces, place, begin, end = [], 0, rank * length, (rank + 1) * length
    for name, size in sizes.items():
        first, last = max(place, begin), min(place + size, end)
        if first < last:
            pieces.append(Piece(name, first - place, last - first, 0, first - begin))
        place += size
    return pieces


def each(groups: Sequence[Mapping[str, int]], rank: int, world: int) -> list[Piece]:
    """Stage 3: every parameter is padded and cut into equal parts; a tensor holds the parts of a group of them."""
    pieces = []
    for number, sizes in enumerate(groups):
        offset = 0
        for name, size in sizes.items():
            part = -(-size // world)
            start = rank * part
            if start < size:
                pieces.append(Piece(name, start, min(part, size - start), number, offset))
            offset += part
    return pieces


def share(pieces: Sequence[Piece], rank: int, world: int) -> list[Piece]:
    """What worker `rank` writes of pieces that all workers hold alike: an equal part of the line that they make."""
    total = sum(piece.length for piece in pieces)
    begin, end = rank * total // world, (rank + 1) * total // world
    found, place = [], 0
    for piece in pieces:
        first, last = max(place, begin) - place, min(place + piece.length, end) - place
        if first < last:
            found.append(replace(piece, start=piece.start + first, length=last - first, offset=piece.offset + first))
        place += piece.length
    return found
