"""Inputs: one row for each image that a source has, before anything of the image is read, and the key that it gets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.captions import TEXTS, WEIGHTS
from pipelines.schema import PLACE, SCORES, Column, row_digests

IMAGE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib")
IMAGE_SUFFIXES += (".tif", ".tiff", ".avif")
IMAGE_NAME = r"\.(" + "|".join(suffix[1:] for suffix in IMAGE_SUFFIXES) + ")$"

STAMP = "stamp"  # size and modification time of the files that the row was found in; null: of FILE, yet to be looked up
CAPTION_FILE = "caption_file"  # text file that has the captions, read together with the image
CAPTION_PER_LINE = "caption_per_line"  # whether each line of that file is a caption; null where there is none
PROBLEM = "problem"  # why there is nothing to read; null where there is
MISSING = "there is no such file"
NO_IMAGE = "the sample has no image"  # how such a problem begins

INPUT_SCHEMA = pa.schema(
    [
        pa.field(Column.KEY, pa.string(), nullable=False),
        pa.field(Column.SOURCE, pa.string(), nullable=False),
        pa.field(Column.PATH, pa.string(), nullable=False),
        *PLACE,
        pa.field(Column.CAPTIONS, TEXTS),
        pa.field(Column.CAPTION_WEIGHTS, WEIGHTS),
        pa.field(CAPTION_FILE, pa.string()),
        pa.field(CAPTION_PER_LINE, pa.bool_()),
        pa.field(Column.AESTHETIC_SCORE, pa.float32()),
        pa.field(Column.SCORES, SCORES),
        pa.field(Column.FILE_SIZE, pa.int64()),  # null where it shows only when the image is read
        pa.field(PROBLEM, pa.string()),
    ]
)
LISTED_SCHEMA = pa.schema(  # what is known of an input before it has a key
    [field for field in INPUT_SCHEMA if field.name not in (Column.KEY, Column.SOURCE)] + [pa.field(STAMP, pa.string())]
)


def keyed(rows: pa.Table, source: str) -> pa.Table:
    """Inputs of one source, with STAMP in place of source and key, as INPUT_SCHEMA, in their order.

    A key stands for all that an index row is made of: where the image lies, its file's stamp, captions and scores.
    """
    rows = rows.append_column(Column.SOURCE, pa.repeat(source, rows.num_rows))
    identity = [STAMP, *(name for name in INPUT_SCHEMA.names if name not in (Column.KEY, Column.FILE_SIZE, PROBLEM))]
    rows = rows.append_column(Column.KEY, row_digests(rows.select(identity)))
    return rows.select(INPUT_SCHEMA.names).cast(INPUT_SCHEMA)


def listed_table(rows: int, **columns: Any) -> pa.Table:
    """Columns in the order and types of LISTED_SCHEMA; those that are not given are null."""
    arrays = [columns.get(field.name, pa.nulls(rows)) for field in LISTED_SCHEMA]
    return pa.table(
        [array.cast(field.type) for field, array in zip(LISTED_SCHEMA, arrays, strict=True)], schema=LISTED_SCHEMA
    )


def stamps_of(files: pa.Table) -> pa.ChunkedArray:
    """The stamp of each file of a folder's listing."""
    size, modified = (pc.cast(files.column(name), pa.string()) for name in ("size", "modified_us"))
    return pc.binary_join_element_wise(size, modified, ":")


def scores_column(scores: dict[str, pa.Array], rows: int) -> pa.Array:
    """Columns of float32, by name, as one column of maps; a null is no entry."""
    if not scores:
        return pa.nulls(rows, SCORES)
    names = sorted(scores)
    by_row = np.arange(len(names) * rows).reshape(len(names), rows).T.ravel()
    values = pa.concat_arrays([scores[name] for name in names]).take(pa.array(by_row))
    keys = pa.array(names, pa.string()).take(pa.array(by_row // max(1, rows)))
    there = pc.is_valid(values)
    ends = np.cumsum(there.to_numpy(zero_copy_only=False))[len(names) - 1 :: len(names)]
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())
    return pa.MapArray.from_arrays(offsets, keys.filter(there), values.filter(there)).cast(SCORES)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Some names, for a message."""
    found = list(names)
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def passed_over_words(by_suffix: Mapping[str, int]) -> str:
    """How many files of folders are no inputs, by suffix, for a message."""
    suffixes = listed(f"{count} {suffix or 'without one'}" for suffix, count in by_suffix.items())
    return f"files passed over for their suffix: {suffixes}"
