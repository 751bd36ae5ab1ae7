"""Aspect buckets: which sizes there are (SDXL Appendix I), and which one an image belongs to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from pipelines.config import Size
from pipelines.preprocess.config import BucketConfig
from pipelines.preprocess.measure import sizes
from pipelines.schema import INDEX_SCHEMA, Column, pair_column

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
