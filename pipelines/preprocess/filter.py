"""Decide what is kept. A filter looks at one index row and returns the reason to reject it, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa

from pipelines.preprocess.config import FilterConfig
from pipelines.schema import INDEX_SCHEMA, Column, Reject

Row = dict[str, Any]
Filter = Callable[[Row, FilterConfig], tuple[Reject, str] | None]


def apply_filters(index: pa.Table, config: FilterConfig) -> pa.Table:
    """Index rows with reject_reason set by the first filter that rejects them; earlier verdicts stand."""
    rows = index.to_pylist()
    for row in rows:
        if row[Column.REJECT_REASON] is None:
            verdict = next(filter(None, (check(row, config) for check in FILTERS)), None)
            if verdict:
                row[Column.REJECT_REASON], row[Column.REJECT_DETAIL] = verdict
    return _with_verdicts(index, rows)


def caption_length(row: Row, config: FilterConfig) -> tuple[Reject, str] | None:
    """An image without a caption, or with too short a one."""
    length = len((row[Column.CAPTION] or "").strip())
    if length >= config.min_caption_characters:
        return None
    return (
        Reject.NO_CAPTION,
        f"{length} characters, and filters.min_caption_characters is {config.min_caption_characters}",
    )


def shortest_side(row: Row, config: FilterConfig) -> tuple[Reject, str] | None:
    """An image with too short a side."""
    side = min(row[Column.ORIGINAL_SIZE])
    return (
        None
        if side >= config.min_side
        else (Reject.TOO_SMALL, f"{side} pixels, and filters.min_side is {config.min_side}")
    )


def aspect(row: Row, config: FilterConfig) -> tuple[Reject, str] | None:
    """An image too long for its width."""
    height, width = row[Column.ORIGINAL_SIZE]
    ratio = max(height, width) / min(height, width)
    if ratio <= config.max_aspect:
        return None
    return Reject.EXTREME_ASPECT, f"{ratio:.2f}, and filters.max_aspect is {config.max_aspect}"


FILTERS: tuple[Filter, ...] = (caption_length, shortest_side, aspect)


def mark_duplicates(rows: pa.Table) -> pa.Table:
    """The verdict on exact duplicates, over all rows of an index: of equal ids the smallest path is kept.

    Takes and returns columns id, path, reject_reason, reject_detail, in the same order. It depends on the set of rows
    alone, not on the order in which they were found: a row that was a duplicate before is judged again.
    """
    columns = rows.to_pydict()
    ids, paths = columns[Column.ID], columns[Column.PATH]
    reasons, details = columns[Column.REJECT_REASON], columns[Column.REJECT_DETAIL]
    judged = [reason in (None, Reject.DUPLICATE) for reason in reasons]
    first: dict[str, str] = {}
    for image, path, candidate in zip(ids, paths, judged, strict=True):
        if candidate and path < first.get(image, "\U0010ffff"):
            first[image] = path
    for row, candidate in enumerate(judged):
        if candidate:
            original = first[ids[row]]
            duplicate = paths[row] != original
            reasons[row] = Reject.DUPLICATE if duplicate else None
            details[row] = f"the same bytes as {original}" if duplicate else None
    return _with_verdicts(
        rows, [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    )


def _with_verdicts(table: pa.Table, rows: list[Row]) -> pa.Table:
    for name in (Column.REJECT_REASON, Column.REJECT_DETAIL):
        position = table.schema.get_field_index(name)
        table = table.set_column(position, INDEX_SCHEMA.field(name), pa.array([row[name] for row in rows], pa.string()))
    return table
