"""Kept images -> crops of their buckets: one or several of each image, decoded and resized on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import CropConfig
from pipelines.images import DECODE_ERRORS, UNREADABLE_ERRORS, content_id, read_crops
from pipelines.originals import Originals
from pipelines.preprocess.measure import READ_THREADS, without_place
from pipelines.preprocess.quarantine import decoding
from pipelines.preprocess.write import FAILURE, timed
from pipelines.schema import PAIR, Column, row_digests

ORDER = "order"  # the key of a crop's image, until crops are in blocks
PIXELS = "pixels"  # uint8 [height, width, 3] of the bucket, as fixed-size bytes


def rows_of_crops(kept: pa.Table, crops: int, keys: pa.Array | None = None) -> pa.Table:
    """A row for each crop of each kept image, side by side, with its number, a key of its own, and ORDER.

    The first crop has its image's key, so that more crops leave those that there are as they are. `keys` are the keys
    of all these rows, where they were made before.
    """
    kept = kept.append_column(ORDER, kept.column(Column.KEY))
    numbers = pa.chunked_array([np.tile(np.arange(crops, dtype=np.int32), kept.num_rows)])
    if crops == 1:
        return kept.append_column(Column.CROP, numbers)
    rows = kept.take(pa.array(np.repeat(np.arange(kept.num_rows), crops))).append_column(Column.CROP, numbers)
    if keys is None:
        of_crop = row_digests(rows.select([Column.KEY, Column.CROP]))
        keys = pc.if_else(pc.equal(numbers, 0), rows.column(Column.KEY), of_crop)
    return rows.set_column(rows.schema.get_field_index(Column.KEY), rows.schema.field(Column.KEY), keys)


@timed("crop")
def crop_images(
    rows: pa.Table,
    originals: Originals,
    crop: CropConfig,
    max_pixels: int,
    attempt: Callable[[], int] | None = None,
) -> pa.Table:
    """Crops of one bucket, with pixels, crop_top_left, target_size and flip, or the failure.

    An image whose crops lie side by side is read, decoded and resized once. `attempt` says how often this task's
    process has died before (preprocess/quarantine.py).
    """
    height, width = rows.column(Column.BUCKET)[0].as_py()
    schema = rows.schema
    for field in (
        pa.field(Column.CROP_TOP_LEFT, PAIR),
        pa.field(Column.TARGET_SIZE, PAIR),
        pa.field(Column.FLIP, pa.bool_()),
        pa.field(PIXELS, pa.binary(height * width * 3)),
        pa.field(FAILURE, pa.string()),
    ):
        schema = schema.append(field)

    def crops_of(image: list[dict[str, Any]]) -> list[dict[str, Any]]:
        known = image[0]
        try:
            data = originals.read(known)
        except UNREADABLE_ERRORS as error:  # any other is the storage's, and ends the job
            return _failed(image, without_place(error, originals, known[Column.SOURCE]))
        if content_id(data) != known[Column.ID]:
            return _failed(image, "the file has changed since it was indexed")
        try:
            draws = [_draw_id(values) for values in image]
            found = call(read_crops, data, (height, width), crop, draws, max_pixels)
        except DECODE_ERRORS as error:
            return _failed(image, f"{type(error).__name__}: {error}")
        made = []
        for values, (pixels, top_left, flip) in zip(image, found, strict=True):
            told = {Column.CROP_TOP_LEFT: top_left, Column.TARGET_SIZE: (height, width), Column.FLIP: flip}
            made.append(values | told | {PIXELS: pixels.tobytes()})
        return made

    images = [list(crops) for _, crops in groupby(rows.to_pylist(), itemgetter(Column.SOURCE, Column.PATH))]
    with decoding(attempt and attempt(), max_pixels) as call, ThreadPoolExecutor(READ_THREADS) as pool:
        cropped = [values for image in pool.map(crops_of, images) for values in image]
    return pa.Table.from_pylist(cropped, schema)


def _failed(image: list[dict[str, Any]], reason: str) -> list[dict[str, Any]]:
    return [values | {FAILURE: reason} for values in image]


def _draw_id(values: dict[str, Any]) -> str:
    """What a crop's place and flip are drawn from, beside the seed."""
    number = values[Column.CROP]
    return f"{values[Column.ID]} crop {number}" if number else values[Column.ID]
