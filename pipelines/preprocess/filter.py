"""Decide what is kept: pure functions of the measured facts of rows and the filter settings.

Nothing here reads an image. What could not be measured (unreadable, claimed too many pixels, killed its decoder) is a
fact and stands; every other verdict is decided again at each commit, so a changed threshold costs no pixels. Of rows
more than fit memory: preprocess/verdicts.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.captions import in_lists, out_of_lists
from pipelines.preprocess.config import FilterConfig, ScoreLimits
from pipelines.preprocess.near import HASH_BITS
from pipelines.schema import INDEX_SCHEMA, ROWS_AT_A_TIME, Column, Reject

# reasons that measuring gives; the rest are decided here
MEASURED = (Reject.UNREADABLE, Reject.TOO_LARGE, Reject.KILLS_DECODER)
NO_TEXT = "\ufffd"  # stands in a text for bytes that are none in its encoding
NEVER = np.iinfo(np.int64).max
Finding = tuple[pa.ChunkedArray, pa.ChunkedArray]  # which rows are rejected (null: not), and in detail why
Verdict = tuple[Reject, pa.ChunkedArray, pa.ChunkedArray]  # the reason, and its finding
SAME_BYTES, NEAR = "the same bytes as ", f" of {HASH_BITS} bits from "  # a detail names the image that is kept instead
Filter = Callable[[pa.Table, FilterConfig], Verdict]


def judge(index: pa.Table, config: FilterConfig) -> pa.Table:
    """Index rows with the verdict on each and on its captions, whatever was decided before, as far as it follows from
    the row alone. Whether it is the duplicate of another is for `mark_duplicates` and alike.py to say."""
    reasons, details = index.column(Column.REJECT_REASON), index.column(Column.REJECT_DETAIL)
    measured = pc.is_in(reasons, value_set=pa.array(MEASURED, pa.string()))
    cleared = _with_verdicts(index, _where(measured, reasons), _where(measured, details))
    return apply_filters(drop_captions(cleared, config), config)


def apply_filters(index: pa.Table, config: FilterConfig) -> pa.Table:
    """Index rows with reject_reason set by the first filter that rejects them; earlier verdicts stand."""
    parts = [index.slice(start, ROWS_AT_A_TIME) for start in range(0, max(1, index.num_rows), ROWS_AT_A_TIME)]
    return pa.concat_tables(_filtered(part, config) for part in parts)


def _filtered(index: pa.Table, config: FilterConfig) -> pa.Table:
    """The same for a few rows: a filter has a detail ready for each of them."""
    reasons, details = index.column(Column.REJECT_REASON), index.column(Column.REJECT_DETAIL)
    for check in FILTERS:
        reason, rejected, detail = check(index, config)
        hit = pc.and_(pc.is_null(reasons), pc.fill_null(rejected, False))
        reasons = pc.if_else(hit, str(reason), reasons)
        details = pc.if_else(hit, detail, details)
    return _with_verdicts(index, reasons, details)


def no_caption(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image without a caption, or with too short ones alone; the detail tells of the longest."""
    longest, least = np.zeros(index.num_rows, np.int64), config.min_caption_characters
    places, lengths = _caption_lengths(index)
    np.maximum.at(longest, places, lengths)
    detail = _text(_column(longest), f" characters, and filters.min_caption_characters is {least}")
    return Reject.NO_CAPTION, _column(longest < least), detail


def long_caption(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image whose captions are all too long, or too short; the detail tells of the shortest that is too long."""
    least, most = config.min_caption_characters, config.max_caption_characters
    places, lengths = _caption_lengths(index)
    shortest, fitting = np.full(index.num_rows, NEVER), np.zeros(index.num_rows, bool)
    np.minimum.at(shortest, places[lengths > most], lengths[lengths > most])
    fitting[places[(lengths >= least) & (lengths <= most)]] = True
    detail = _text(_column(shortest), f" characters, and filters.max_caption_characters is {most}")
    return Reject.LONG_CAPTION, _column((shortest < NEVER) & ~fitting), detail


def drop_captions(index: pa.Table, config: FilterConfig) -> pa.Table:
    """Index rows with caption_reasons: which of an image's captions are left out, be it kept or not, and why."""
    places, lengths = _caption_lengths(index)
    reasons = np.full(len(lengths), None, object)
    reasons[lengths > config.max_caption_characters] = str(Reject.LONG_CAPTION)
    reasons[lengths < config.min_caption_characters] = str(Reject.NO_CAPTION)
    lists = in_lists(index.num_rows, places, pa.array(reasons, pa.string()))
    position = index.schema.get_field_index(Column.CAPTION_REASONS)
    return index.set_column(position, INDEX_SCHEMA.field(Column.CAPTION_REASONS), lists)


def caption_counts(index: pa.Table) -> dict[str, int]:
    """The captions of kept images: how many are kept, and how many are left out for each reason."""
    kept = index.filter(pc.is_null(index.column(Column.REJECT_REASON))).column(Column.CAPTION_REASONS)
    counts = pc.value_counts(pc.list_flatten(kept)).to_pylist()
    return dict(sorted((count["values"] or "kept", count["counts"]) for count in counts))


def garbled(index: pa.Table) -> pa.ChunkedArray:
    """Which rows have a caption of which bytes were no text."""
    found, before = np.zeros(index.num_rows, bool), 0
    for chunk in index.column(Column.CAPTIONS).chunks:
        rows, texts = out_of_lists(chunk)
        found[before + rows[pc.match_substring(texts, NO_TEXT).to_numpy(zero_copy_only=False)]] = True
        before += len(chunk)
    return _column(found)


def shortest_side(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image with too short a side."""
    side = pc.min_element_wise(*sides(index), skip_nulls=False)
    detail = _text(side, f" pixels, and filters.min_side is {config.min_side}")
    return Reject.TOO_SMALL, pc.less(side, config.min_side), detail


def aspect(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image too long for its width."""
    both = [pc.cast(side, pa.float64()) for side in sides(index)]
    ratio = pc.divide(pc.max_element_wise(*both, skip_nulls=False), pc.min_element_wise(*both, skip_nulls=False))
    detail = _text(pc.round(ratio, 2), f", and filters.max_aspect is {config.max_aspect}")
    return Reject.EXTREME_ASPECT, pc.greater(ratio, config.max_aspect), detail


def few_distinct_pixels(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image of one colour, or of too few."""
    count, least = index.column(Column.DISTINCT_PIXELS), config.min_distinct_pixels
    detail = _text(count, f" distinct pixel values, and filters.min_distinct_pixels is {least}")
    return Reject.BLANK, pc.less(count, least), detail


def low_contrast(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image that is nearly of one brightness."""
    contrast = index.column(Column.CONTRAST)
    detail = _text(pc.round(contrast, 2), f" of contrast, and filters.min_contrast is {config.min_contrast}")
    return Reject.BLANK, pc.less(contrast, pa.scalar(config.min_contrast, pa.float32())), detail


def no_score(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image without a score that the settings ask for."""

    def check(score: pa.ChunkedArray, limits: ScoreLimits, setting: str) -> Finding:
        return pc.and_(pc.is_null(score), limits.required), pa.scalar(f"{setting}.required is true")

    return Reject.NO_SCORE, *_first_score(index, config, check)


def low_score(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image with too low a score. Scores are compared as they are stored, in float32."""

    def check(score: pa.ChunkedArray, limits: ScoreLimits, setting: str) -> Finding:
        detail = _text(score, f", and {setting}.min is {limits.min}")
        return pc.less(score, pa.scalar(limits.min, pa.float32())), detail

    return Reject.LOW_SCORE, *_first_score(index, config, check)


def high_score(index: pa.Table, config: FilterConfig) -> Verdict:
    """An image with too high a score."""

    def check(score: pa.ChunkedArray, limits: ScoreLimits, setting: str) -> Finding:
        detail = _text(score, f", and {setting}.max is {limits.max}")
        return pc.greater(score, pa.scalar(limits.max, pa.float32())), detail

    return Reject.HIGH_SCORE, *_first_score(index, config, check)


FILTERS: tuple[Filter, ...] = (
    no_caption,
    long_caption,
    shortest_side,
    aspect,
    few_distinct_pixels,
    low_contrast,
    no_score,
    low_score,
    high_score,
)


def _first_score(
    index: pa.Table, config: FilterConfig, check: Callable[[pa.ChunkedArray, ScoreLimits, str], Finding]
) -> Finding:
    """What `check` finds of each score that has limits; the first that rejects a row gives the detail."""
    rejected: pa.ChunkedArray = pa.chunked_array([pa.repeat(False, index.num_rows)])
    detail: pa.ChunkedArray | pa.Scalar = pa.scalar(None, pa.string())
    for name, limits in config.scores.items():
        own = name in {Column.AESTHETIC_SCORE, Column.CLIP_SIMILARITY}
        score = index.column(name) if own else pc.map_lookup(index.column(Column.SCORES), pa.scalar(name), "first")
        found, words = check(score, limits, f"filters.scores.{name}")
        detail = pc.if_else(rejected, detail, words)
        rejected = pc.or_(rejected, pc.fill_null(found, False))
    return rejected, detail


def mark_duplicates(rows: pa.Table) -> pa.Table:
    """The verdict on exact duplicates: of equal ids the smallest (source, path) is kept. All rows of an id are there.

    Takes and returns columns id, source, path, reject_reason, reject_detail, in the same order. It depends on the set
    of rows alone, not on the order in which they were found: a row that was a duplicate before is judged again.
    """
    reasons, details = rows.column(Column.REJECT_REASON), rows.column(Column.REJECT_DETAIL)
    judged = pc.fill_null(pc.equal(reasons, str(Reject.DUPLICATE)), True).to_numpy()
    places = np.flatnonzero(judged)
    if not len(places):
        return rows
    wishes = [(Column.ID, "ascending"), (Column.SOURCE, "ascending"), (Column.PATH, "ascending")]
    found = rows.select([name for name, _ in wishes]).take(places)
    order = pc.sort_indices(found, sort_keys=wishes).to_numpy()
    codes = found.column(Column.ID).combine_chunks().dictionary_encode("encode").indices.to_numpy()[order]
    first = np.concatenate([[True], codes[1:] != codes[:-1]])
    origin = np.arange(rows.num_rows)  # of each row, the row that is kept for it
    origin[places[order]] = places[order][np.flatnonzero(first)[np.cumsum(first) - 1]]
    duplicates = np.flatnonzero(origin != np.arange(rows.num_rows))
    named = rows.select([Column.SOURCE, Column.PATH])
    detail = _text(SAME_BYTES, _names(named.take(pa.array(duplicates)), named.take(pa.array(origin[duplicates]))))
    standing = pa.array(~judged)
    cleared = _with_verdicts(rows, _where(standing, reasons), _where(standing, details))
    return _rejected(cleared, duplicates, Reject.DUPLICATE, detail)


def _rejected(rows: pa.Table, which: np.ndarray, reason: Reject, detail: pa.ChunkedArray) -> pa.Table:
    """Rows with a verdict on those at the places `which`, in ascending order."""
    hit = np.zeros(rows.num_rows, bool)
    hit[which] = True
    number = pa.array(np.cumsum(hit) - 1, mask=~hit)
    reasons = pc.if_else(hit, str(reason), rows.column(Column.REJECT_REASON))
    return _with_verdicts(rows, reasons, pc.if_else(hit, detail.take(number), rows.column(Column.REJECT_DETAIL)))


def near_detail(bits: pa.ChunkedArray, rows: pa.Table, kept: pa.Table) -> pa.ChunkedArray:
    """The details of rows whose hashes are so many bits from those of the `kept` ones beside them."""
    return _text(bits, NEAR, _names(rows, kept))


def _names(rows: pa.Table, kept: pa.Table) -> pa.ChunkedArray:
    """For each of the rows the path of the one that is kept for it, with its source before it where that is another."""
    source, path = kept.column(Column.SOURCE), kept.column(Column.PATH)
    return pc.if_else(pc.equal(source, rows.column(Column.SOURCE)), path, _text(source, ":", path))


def kept_instead(detail: str) -> str:
    """The name of the kept image in the detail of a duplicate: path, or source:path where the source is another."""
    return detail.removeprefix(SAME_BYTES) if detail.startswith(SAME_BYTES) else detail.partition(NEAR)[2]


def _caption_lengths(index: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(row [N], characters without the white space around them [N]) of all captions."""
    places, lengths, before = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for chunk in index.column(Column.CAPTIONS).chunks:  # as one, the texts of many rows would not fit Arrow's offsets
        rows, texts = out_of_lists(chunk)
        places.append(rows + before)
        lengths.append(pc.utf8_length(pc.utf8_trim_whitespace(texts)).to_numpy().astype(np.int64))
        before += len(chunk)
    return np.concatenate(places), np.concatenate(lengths)


def _column(values: np.ndarray) -> pa.ChunkedArray:
    return pa.chunked_array([values])


def sides(index: pa.Table) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Heights and widths of originals in pixels; null where they are not known."""
    size = index.column(Column.ORIGINAL_SIZE)
    return pc.list_element(size, 0), pc.list_element(size, 1)


def _text(*parts: pa.ChunkedArray | str) -> pa.ChunkedArray:
    """Columns and words, row by row, as one column of text."""
    words = [part if isinstance(part, str) else pc.cast(part, pa.string()) for part in parts]
    return pc.binary_join_element_wise(*words, "")


def _where(mask: pa.ChunkedArray | pa.Array, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, null where the mask is false."""
    return pc.if_else(mask, column, pa.scalar(None, pa.string()))


def _with_verdicts(table: pa.Table, reasons: pa.ChunkedArray, details: pa.ChunkedArray) -> pa.Table:
    for name, values in ((Column.REJECT_REASON, reasons), (Column.REJECT_DETAIL, details)):
        table = table.set_column(table.schema.get_field_index(name), INDEX_SCHEMA.field(name), values)
    return table
