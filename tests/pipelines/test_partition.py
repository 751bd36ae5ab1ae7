"""What each worker's optimizer holds, for any number of workers under each stage."""

import pytest
import torch

from pipelines.train.partition import Piece, each, line, share, whole

SIZES = {"a": 7, "b": 1, "c": 12, "d": 5}
LINE = torch.arange(25.0)  # every value is its own name


def of(name: str) -> torch.Tensor:
    names = list(SIZES)
    return LINE.split(list(SIZES.values()))[names.index(name)]


def cut(stage: int, rank: int, world: int) -> tuple[list[Piece], list[torch.Tensor]]:
    """A worker's pieces and its tensors, as DeepSpeed lays them out; padding is -1."""
    if stage == 0:
        return whole(SIZES), [of(name) for name in SIZES]
    padding = torch.full((40,), -1.0)
    if stage < 3:
        length = -(-len(LINE) // (2 * world)) * 2
        return line(SIZES, rank, length), [torch.cat([LINE, padding])[rank * length : (rank + 1) * length]]
    groups, tensors = [{"a": 7, "b": 1}, {"c": 12, "d": 5}], []
    for group in groups:
        parts = [-(-size // world) for size in group.values()]
        cuts = [torch.cat([of(name), padding])[rank * p : (rank + 1) * p] for name, p in zip(group, parts, strict=True)]
        tensors.append(torch.cat(cuts))
    return each(groups, rank, world), tensors


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 40])
def test_together_the_workers_hold_each_value_once_where_it_is_said_to_be(stage, world):
    counts = {name: torch.zeros(size) for name, size in SIZES.items()}
    for rank in range(world):
        pieces, tensors = cut(stage, rank, world)
        for piece in share(pieces, rank, world) if stage == 0 else pieces:
            assert torch.equal(piece.of(tensors), of(piece.name)[piece.start : piece.start + piece.length])
            counts[piece.name][piece.start : piece.start + piece.length] += 1
    assert all((count == 1).all() for count in counts.values())


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_what_all_hold_alike_is_written_in_equal_parts(world):
    written = [sum(piece.length for piece in share(whole(SIZES), rank, world)) for rank in range(world)]
    assert max(written) - min(written) <= 1


def test_a_piece_is_a_view():
    pieces, tensors = cut(1, 1, 2)
    pieces[0].of(tensors).zero_()
    assert tensors[0][pieces[0].offset] == 0
