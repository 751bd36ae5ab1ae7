"""Aspect buckets: which sizes there are (SDXL Appendix I), which one an image belongs to, and blocks of one each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Size
from pipelines.preprocess.config import BucketConfig
from pipelines.preprocess.crop import ORDER
from pipelines.preprocess.measure import sizes
from pipelines.preprocess.write import cut
from pipelines.runs import CODE, KEY_BITS, Runs, Work, codes_within, parts
from pipelines.schema import INDEX_SCHEMA, Column, pair_array, pair_column

SDXL_RESOLUTION, SDXL_STEP = 1024, 64
# Appendix I holds every pair of multiples of 64 from 512 to 2048 whose area is 90% to 100% of 1024 x 1024, but for
# one: 1344 x 704 is missing, and its mirror is there.
SDXL_SIDES = range(512, 2048 + 1, SDXL_STEP)
SDXL_LEAST_AREA = 0.90
SDXL_MISSING = (1344, 704)


def bucket_table(config: BucketConfig) -> tuple[Size, ...]:
    """All sizes (height, width) in pixels, from the widest to the tallest."""
    if config.table == "square":
        return ((config.resolution, config.resolution),)
    if config.table != "sdxl":
        return tuple(sorted(config.table, key=lambda size: size[0] / size[1]))
    if config.resolution * SDXL_STEP % SDXL_RESOLUTION:
        raise ValueError(f"buckets.resolution {config.resolution} does not scale the paper's table to whole pixels")
    square = SDXL_RESOLUTION**2
    sides = [
        (height, width)
        for height in SDXL_SIDES
        for width in SDXL_SIDES
        if SDXL_LEAST_AREA * square <= height * width <= square and (height, width) != SDXL_MISSING
    ]
    scaled = [tuple(side * config.resolution // SDXL_RESOLUTION for side in size) for size in sides]
    return tuple(sorted(((height, width) for height, width in scaled), key=lambda size: size[0] / size[1]))


def nearest(size: Size, table: Sequence[Size]) -> Size:
    """The bucket whose aspect ratio is nearest on a log scale; of equals the larger, then the first."""
    aspect = math.log(size[0] / size[1])

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(bucket[0] / bucket[1]) - aspect), -bucket[0] * bucket[1]

    return min(table, key=distance)


def assign_buckets(index: pa.Table, table: Sequence[Size]) -> pa.Table:
    """Index rows with the bucket of each image whose size is known, kept or not."""
    buckets = [size and nearest(size, table) for size in sizes(index)]
    position = index.schema.get_field_index(Column.BUCKET)
    return index.set_column(position, INDEX_SCHEMA.field(Column.BUCKET), pair_column(buckets))


def blocks_by_bucket(
    crops: Iterable[pa.Table], size: int, *, buckets: Sequence[Size], sources: Iterable[str], work: Work
) -> Iterator[pa.Table]:
    """Blocks of one bucket each, all of `size` rows but the last of a bucket, from whatever `sources`.

    So the passes of an encoder are as full as they can be. In a block the rows of each source are a unit of their own,
    because the weight of a source can change later, and a file has rows of one weight. Blocks follow from the set of
    crops alone: buckets in ascending order, sources by name, images by ORDER and crops by their numbers.
    """
    held: pa.Table | None = None
    for rows in _in_order(crops, sorted(buckets), pa.array(sorted(sources), pa.string()), work):
        held = rows if held is None else pa.concat_tables([held, rows])
        codes = _bucket_codes(held)
        ends = np.flatnonzero(codes[1:] != codes[:-1]) + 1
        for start, stop in pairwise([0, *ends]):
            yield from _of_one_bucket(held.slice(start, stop - start), size)
        start = int(ends[-1]) if len(ends) else 0
        whole = (held.num_rows - start) // size * size
        yield from _of_one_bucket(held.slice(start, whole), size)
        held = held.slice(start + whole)
    if held is not None:
        yield from _of_one_bucket(held, size)


def _in_order(crops: Iterable[pa.Table], buckets: Sequence[Size], sources: pa.Array, work: Work) -> Iterator[pa.Table]:
    """The same rows in order: those of a bucket and source together, by their images' keys and the crops' numbers."""
    runs: Runs | None = None
    if len(buckets) * len(sources) >= 1 << 64 - int(KEY_BITS):
        raise ValueError(f"{len(buckets)} buckets of {len(sources)} sources are more than can be told apart")
    known = np.array([height << 32 | width for height, width in buckets], np.int64)
    for rows in crops:
        runs = runs or work.runs(rows.schema)
        of_source = pc.index_in(rows.column(Column.SOURCE), value_set=sources).to_numpy()
        rank = np.searchsorted(known, _bucket_codes(rows)) * len(sources) + of_source
        runs.add(codes_within(rank, rows.column(ORDER)), rows)
    if runs is None:
        return
    for (part,) in parts(runs):
        rank = pa.array(part.column(CODE).to_numpy() >> KEY_BITS)
        keys = [(name, "ascending") for name in (CODE, ORDER, Column.CROP)]
        ranked = part.set_column(part.schema.get_field_index(CODE), CODE, rank)
        yield part.take(pc.sort_indices(ranked, sort_keys=keys)).drop_columns([CODE, ORDER])


def _of_one_bucket(rows: pa.Table, size: int) -> Iterator[pa.Table]:
    for start in range(0, rows.num_rows, size):
        height, width = rows.column(Column.BUCKET)[start].as_py()
        yield pa.concat_tables(_units(rows.slice(start, size), f"{height}x{width}"))


def _units(block: pa.Table, folder: str) -> list[pa.Table]:
    names = block.column(Column.SOURCE)
    parts_of_sources = [block.filter(pc.equal(names, name)) for name in pc.unique(names)]
    return [unit for part in parts_of_sources for unit in cut(part, part.num_rows, folder)]


def _bucket_codes(rows: pa.Table) -> np.ndarray:
    """The bucket of each row as a number, in the order of (height, width)."""
    pairs = pair_array(rows, Column.BUCKET).astype(np.int64)
    return pairs[:, 0] << 32 | pairs[:, 1]
