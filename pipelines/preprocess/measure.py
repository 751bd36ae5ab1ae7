"""Open each image once: what it is, how large it is, what it looks like, and whether it can be read at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import Size
from pipelines.images import DECODE_ERRORS, UNREADABLE_ERRORS, content_id, decode, decode_reduced, header_size
from pipelines.originals import Originals
from pipelines.preprocess.config import MOST_DISTINCT, FilterConfig
from pipelines.preprocess.near import HASH_SIDE, perceptual_hash
from pipelines.preprocess.quarantine import DecoderKilledError, decoding
from pipelines.preprocess.sources.captions import lines_of, text_of
from pipelines.preprocess.sources.inputs import CAPTION_FILE, CAPTION_PER_LINE, PROBLEM
from pipelines.preprocess.write import timed
from pipelines.schema import INDEX_SCHEMA, Column, Reject

LEAST_HASHED_CONTRAST = 1.0  # of 255; below, a hash would be one of rounding
LOOKED_AT = (HASH_SIDE * 3, HASH_SIDE * 3)  # pixels that are enough to see what an image looks like
LONGEST_SIDE = 2**31 - 1  # pixels that the index can write down; a header may claim more
READ_THREADS = 8  # reads in flight per task; decoding releases the interpreter lock


@timed("measure")
def measure(
    inputs: pa.Table, originals: Originals, filters: FilterConfig, attempt: Callable[[], int] | None = None
) -> pa.Table:
    """Inputs -> index rows with id, original size, looks and, for an image that cannot be read, the reason.

    `attempt` says how often this task's process has died before (preprocess/quarantine.py).
    """

    def row(values: dict[str, Any]) -> dict[str, Any]:
        index = {name: values.get(name) for name in INDEX_SCHEMA.names}
        if not values[Column.CAPTIONS]:
            captions = Counter(_read_captions(originals, values))
            index[Column.CAPTIONS], index[Column.CAPTION_WEIGHTS] = list(captions), list(captions.values())
        index[Column.CAPTION_REASONS] = [None] * len(index[Column.CAPTIONS] or ())
        if values[Column.FILE_SIZE] is None:
            index[Column.FILE_SIZE] = -1
        if values[PROBLEM] is not None:
            return index | {Column.REJECT_REASON: Reject.UNREADABLE, Column.REJECT_DETAIL: values[PROBLEM]}
        try:
            data = originals.read(values)
        except UNREADABLE_ERRORS as error:  # any other is the storage's: the job ends, and nothing is recorded
            detail = without_place(error, originals, values[Column.SOURCE])
            return index | {Column.REJECT_REASON: Reject.UNREADABLE, Column.REJECT_DETAIL: detail[:500]}
        index[Column.ID], index[Column.FILE_SIZE] = content_id(data), len(data)
        try:
            return index | call(facts, data, filters.max_pixels)
        except DecoderKilledError as error:
            return index | {Column.REJECT_REASON: Reject.KILLS_DECODER, Column.REJECT_DETAIL: str(error)}

    with decoding(attempt and attempt(), filters.max_pixels) as call:
        measured = map_rows(row, inputs, INDEX_SCHEMA)
    spent = (CAPTION_FILE, CAPTION_PER_LINE, PROBLEM)
    return measured.drop_columns([name for name in spent if name in measured.column_names])


def facts(data: bytes, max_pixels: int) -> dict[str, Any]:
    """What the bytes of an image alone say: original size and looks, or why they cannot be had.

    Raises MemoryError.
    """
    known: dict[str, Any] = {}
    try:
        height, width = header_size(data)
        if max(height, width) <= LONGEST_SIDE:
            known[Column.ORIGINAL_SIZE] = height, width
        if height * width > max_pixels or not known:
            detail = f"the header claims {height} x {width} pixels"
            return known | {Column.REJECT_REASON: Reject.TOO_LARGE, Column.REJECT_DETAIL: detail}
        image, scale = decode_reduced(data, max_pixels, LOOKED_AT)
        # again, because a PNG's orientation may lie behind its pixels
        known[Column.ORIGINAL_SIZE] = image.height * scale, image.width * scale
        seen = looks(image)
        if scale > 1 and seen[Column.DISTINCT_PIXELS] < MOST_DISTINCT:
            seen = looks(decode(data, max_pixels))  # an average may hide what is small
    except MemoryError:  # says something of the image only where its process has a known amount: quarantine.py
        raise
    except DECODE_ERRORS as error:
        detail = f"{type(error).__name__}: {error}"[:500]
        return known | {Column.REJECT_REASON: Reject.UNREADABLE, Column.REJECT_DETAIL: detail}
    return known | seen


def without_place(error: BaseException, originals: Originals, source: str) -> str:
    """What went wrong with a file, in words that do not say where its source lies: a dataset names no place."""
    return f"{type(error).__name__}: {error}".replace(f"{originals.storage(source).root}/", "")


def _read_captions(originals: Originals, values: dict[str, Any]) -> list[str]:
    """The captions in a text file; none where there is no such file, or it went since it was listed."""
    if values[CAPTION_FILE] is None:
        return []
    try:
        data = originals.storage(values[Column.SOURCE]).read(values[CAPTION_FILE])
    except FileNotFoundError:
        return []
    text = text_of(data).strip()
    return lines_of(text) if values[CAPTION_PER_LINE] else [text]


def looks(image: Image.Image) -> dict[str, Any]:
    """What filters can ask about the pixels of an RGB image, without them."""
    colours = image.getcolors(MOST_DISTINCT - 1)  # None where there are more
    thumbnail = image.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX).convert("L")
    luma = np.asarray(thumbnail)
    contrast = float(luma.std())
    return {
        Column.DISTINCT_PIXELS: MOST_DISTINCT if colours is None else len(colours),
        Column.CONTRAST: contrast,
        Column.PERCEPTUAL_HASH: perceptual_hash(luma) if contrast >= LEAST_HASHED_CONTRAST else None,
    }


def map_rows(function: Callable[[dict[str, Any]], dict[str, Any]], table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`function` over the rows of a task's table, several at a time; further columns of the table are kept."""
    rows = table.to_pylist()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        result = pa.Table.from_pylist(list(pool.map(function, rows)), schema)
    for name in table.column_names:
        if name not in schema.names:
            result = result.append_column(table.schema.field(name), table.column(name))
    return result


def sizes(table: pa.Table) -> Sequence[Size | None]:
    """The original sizes of an index table, row by row."""
    return [value and (value[0], value[1]) for value in table.column(Column.ORIGINAL_SIZE).to_pylist()]
