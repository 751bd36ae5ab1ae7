"""What a source says of its images' captions: one or several columns, each of texts or of lists of texts."""

from __future__ import annotations

import codecs
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.captions import merged, out_of_lists
from pipelines.config import ColumnsConfig


def caption_columns(config: ColumnsConfig) -> Mapping[str, float]:
    """The columns that have captions, with the weight of each."""
    named = config.caption
    return named if isinstance(named, Mapping) else {named: 1.0} if named else {}


def lines_of(text: str) -> list[str]:
    """The captions of a text in which each line is one; lines without words are none."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def text_of(data: bytes) -> str:
    """The text of a file, by its byte order mark, which is no part of it, or else by UTF-8."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig", errors="replace")


class ToldCaptions:
    """The captions of images that are described one at a time."""

    def __init__(self, config: ColumnsConfig) -> None:
        self._columns, self._weights_column = caption_columns(config), config.caption_weights
        self._count = 0
        self._places: list[int] = []
        self._texts: list[str | None] = []
        self._weights: list[float] = []

    def add(self, row: Mapping[str, Any], where: str, numbers_are_text: bool) -> None:
        """Take one image's. Raises ValueError for what is no text, and for weights that do not fit."""
        for column, weight in self._columns.items():
            texts = [_text(value, column, where) for value in _several(row.get(column))]
            weights = [weight / max(1, len(texts) - texts.count(None))] * len(texts)
            if texts and self._weights_column and (given := _several(row.get(self._weights_column))):
                weights = [_weight(value, self._weights_column, where, numbers_are_text) for value in given]
            if len(weights) != len(texts):
                raise ValueError(f"{where}: {column} has {len(texts)}, and {self._weights_column} {len(weights)}")
            self._places += [self._count] * len(texts)
            self._texts += texts
            self._weights += weights
        self._count += 1

    def columns(self) -> tuple[pa.ListArray, pa.ListArray]:
        """Captions and weights of all images, in their order."""
        texts = pa.array(self._texts, pa.string())
        return merged(self._count, np.array(self._places, np.int64), texts, np.array(self._weights, np.float64))


def told_captions(table: pa.Table, config: ColumnsConfig, where: str) -> tuple[pa.ListArray, pa.ListArray]:
    """Captions and weights of a table's rows. Raises ValueError for what is no text, and weights that do not fit."""
    rows = table.num_rows
    parts: list[tuple[np.ndarray, pa.Array, np.ndarray]] = []
    for column, weight in caption_columns(config).items():
        places, texts = flat(table.column(column), pa.string(), column, where)
        there = pc.is_valid(texts).to_numpy(zero_copy_only=False)
        weights = weight / np.maximum(1, np.bincount(places[there], minlength=rows))[places]
        if config.caption_weights is not None:
            counts = np.bincount(places, minlength=rows)
            told, numbers = _given_weights(table, config.caption_weights, counts, column, where)
            weights[told[places] > 0] = numbers
        parts.append((places, pc.utf8_trim_whitespace(texts), weights))
    if not parts:
        return merged(rows, np.empty(0, np.int64), pa.array([], pa.string()), np.empty(0))
    all_places, all_texts, all_weights = zip(*parts, strict=True)
    return merged(rows, np.concatenate(all_places), pa.concat_arrays(all_texts), np.concatenate(all_weights))


def flat(column: pa.ChunkedArray, kind: pa.DataType, name: str, where: str) -> tuple[np.ndarray, pa.Array]:
    """(row [N], value [N]) of a column of `kind` or of lists of it. Raises ValueError for another."""
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if lists or pa.types.is_fixed_size_list(column.type):
        places, found = out_of_lists(column.cast(pa.large_list(column.type.value_type)))
        return places, cast(pa.chunked_array([found]), kind, name, where)
    return np.arange(len(column)), cast(column, kind, name, where)


def cast(column: pa.ChunkedArray, kind: pa.DataType, name: str, where: str) -> pa.Array:
    """A column as another type. Raises ValueError, naming it, where it is of no such kind."""
    if pa.types.is_nested(column.type) or pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        raise ValueError(f"{where}: {name} is of type {column.type}, and {kind} was expected")
    try:
        changed = column.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{where}: {name} is of type {column.type}, and {kind} was expected: {error}") from error
    return changed.combine_chunks() if changed.num_chunks != 1 else changed.chunk(0)


def _given_weights(
    table: pa.Table, name: str, counts: np.ndarray, column: str, where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(how many each row has [N], all of them [M]) of the weights in a column, for `counts` captions of each row.

    Rows without captions, and single numbers that are null, have none.
    """
    places, values = flat(table.column(name), pa.float64(), name, where)
    there = pc.is_valid(values).to_numpy(zero_copy_only=False) & (counts[places] > 0)
    places, numbers = places[there], values.to_numpy(zero_copy_only=False)[there]
    told = np.bincount(places, minlength=len(counts))
    if len(bad := np.flatnonzero((told != counts) & (told > 0))):
        raise ValueError(f"{where}, row {bad[0]}: {column} has {counts[bad[0]]}, and {name} {told[bad[0]]}")
    if len(bad := np.flatnonzero(~((numbers >= 0) & (numbers < np.inf)))):
        wrong = f"{name} holds {numbers[bad[0]]}, and weights are numbers, 0 or more"
        raise ValueError(f"{where}, row {places[bad[0]]}: {wrong}")
    return told, numbers


def _several(value: Any) -> Sequence[Any]:
    """A value that may be a list, as one; None has nothing in it."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: Any, column: str, where: str) -> str | None:
    if isinstance(value, list | dict):
        raise ValueError(f"{where}: {column} holds {value!r}, and texts were expected")
    text = None if value is None else str(value).strip()
    if text and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {column} holds half of a surrogate pair: {text!r}")
    return text


def _weight(value: Any, column: str, where: str, is_text: bool) -> float:
    if is_text and isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{where}: {column} holds {value!r}, and weights are numbers, 0 or more")
    return float(value)
