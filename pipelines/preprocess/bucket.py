"""Aspect buckets: which sizes there are (SDXL Appendix I), which one an image belongs to, and blocks of one each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Size
from pipelines.preprocess.config import BucketConfig
from pipelines.preprocess.measure import sizes
from pipelines.preprocess.write import cut
from pipelines.schema import INDEX_SCHEMA, Column, masks_of_pairs, pair_column

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


def blocks_by_bucket(rows: pa.Table, size: int) -> list[pa.Table]:
    """Blocks of one bucket each, all of `size` rows but the last of a bucket, from whatever sources.

    So the passes of an encoder are as full as they can be. In a block the rows of each source are a unit of their own,
    because the weight of a source can change later, and a file has rows of one weight.
    """
    blocks = []
    for (height, width), mask in masks_of_pairs(rows, Column.BUCKET).items():
        members = _by_source(rows.filter(mask))
        for start in range(0, members.num_rows, size):
            blocks.append(pa.concat_tables(_units(members.slice(start, size), f"{height}x{width}")))
    return blocks


def _by_source(rows: pa.Table) -> pa.Table:
    """Rows in the order of their sources' names, within each as they were."""
    names = rows.column(Column.SOURCE)
    return pa.concat_tables(rows.filter(pc.equal(names, name)) for name in sorted(pc.unique(names).to_pylist()))


def _units(block: pa.Table, folder: str) -> list[pa.Table]:
    names = block.column(Column.SOURCE)
    parts = [block.filter(pc.equal(names, name)) for name in pc.unique(names)]
    return [unit for part in parts for unit in cut(part, part.num_rows, folder)]
