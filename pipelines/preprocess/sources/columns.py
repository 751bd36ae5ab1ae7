"""Captions and scores out of what a source says about its images, under the names that the settings give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import DEFAULT_SCORE, ColumnsConfig
from pipelines.preprocess.sources.captions import ToldCaptions, caption_columns, cast, told_captions
from pipelines.preprocess.sources.inputs import listed, scores_column
from pipelines.schema import Column


def wanted_columns(config: ColumnsConfig) -> dict[str, str]:
    """The columns that a source has to have, by the setting that names them, without "source.columns."."""
    captions, several = caption_columns(config), isinstance(config.caption, Mapping)
    named: dict[str, str | None] = {f"caption.{name}" if several else "caption": name for name in captions}
    named |= {"caption_weights": config.caption_weights, "aesthetic_score": config.aesthetic_score}
    named |= {f"scores.{name}": column for name, column in config.scores.items()}
    return {setting: column for setting, column in named.items() if column}


def check_columns(there: Iterable[str], config: ColumnsConfig, where: str) -> None:
    """Raise ValueError, with what there is, where a named column is missing."""
    names = list(there)
    for setting, column in wanted_columns(config).items():
        if column not in names:
            raise ValueError(f"{where}: source.columns.{setting} is {column!r}, and there is only {listed(names, 30)}")


class Records:
    """Captions and scores of images that are described one at a time, by mappings: JSON objects or lines of CSV."""

    def __init__(self, config: ColumnsConfig) -> None:
        self._scores = {"": config.aesthetic_score or DEFAULT_SCORE} | dict(config.scores)
        self._captions = ToldCaptions(config)
        self._numbers: dict[str, list[float | None]] = {name: [] for name in self._scores}

    def add(self, row: Mapping[str, Any], where: str, numbers_are_text: bool = False) -> None:
        """Take one. A score that is NaN is none. Raises ValueError for one that is no number, and for what is no
        caption."""
        self._captions.add(row, where, numbers_are_text)
        for name, column in self._scores.items():
            self._numbers[name].append(_number(row.get(column), column, where, numbers_are_text))

    def table(self) -> pa.Table:
        """The columns of captions and scores, in the order in which the images were taken."""
        captions, weights = self._captions.columns()
        numbers = {name: pa.array(values, pa.float32()) for name, values in self._numbers.items()}
        aesthetic = numbers.pop("")
        return pa.table(
            {
                Column.CAPTIONS: captions,
                Column.CAPTION_WEIGHTS: weights,
                Column.AESTHETIC_SCORE: aesthetic,
                Column.SCORES: scores_column(numbers, len(aesthetic)),
            }
        )


def told(table: pa.Table, config: ColumnsConfig, where: str) -> pa.Table:
    """The columns of captions and scores of a table's rows. A score that is NaN is none.

    Raises ValueError where a column is missing, or is of a type that it cannot be read from.
    """
    check_columns(table.column_names, config, where)
    names = table.column_names
    scores = {name: _number_column(table, column, where) for name, column in config.scores.items()}
    score = config.aesthetic_score or (DEFAULT_SCORE if DEFAULT_SCORE in names else None)
    none = pa.nulls(table.num_rows, pa.float32())
    captions, weights = told_captions(table, config, where)
    return pa.table(
        {
            Column.CAPTIONS: captions,
            Column.CAPTION_WEIGHTS: weights,
            Column.AESTHETIC_SCORE: _number_column(table, score, where) if score else none,
            Column.SCORES: scores_column(scores, table.num_rows),
        }
    )


def told_columns(there: Iterable[str], config: ColumnsConfig) -> list[str]:
    """Those columns of a table that `told` asks for."""
    named = {*wanted_columns(config).values(), config.aesthetic_score or DEFAULT_SCORE}
    return [name for name in there if name in named]


def _number_column(table: pa.Table, name: str, where: str) -> pa.Array:
    numbers = cast(table.column(name), pa.float64(), name, where)
    if pc.any(pc.is_inf(numbers)).as_py():
        raise ValueError(f"{where}: {name} is infinite in row {pc.index(pc.is_inf(numbers), True).as_py()}")
    return pc.cast(pc.if_else(pc.is_nan(numbers), None, numbers), pa.float32())


def _number(value: Any, column: str, where: str, is_text: bool) -> float | None:
    if value is None:
        return None
    if is_text:
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {column} is {value!r}, and a number was expected")
    return float(value)
