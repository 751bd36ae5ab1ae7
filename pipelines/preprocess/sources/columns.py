"""Captions and scores out of what a source says about its images, under the names that the settings give them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import pyarrow as pa

from pipelines.config import DEFAULT_SCORE, ColumnsConfig
from pipelines.preprocess.sources.inputs import listed, scores_column
from pipelines.schema import Column


def wanted_columns(config: ColumnsConfig) -> dict[str, str]:
    """The columns that a source has to have, by the setting that names them, without "source.columns."."""
    named = {"caption": config.caption, "aesthetic_score": config.aesthetic_score}
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
        self._config = config
        self._scores = {"": config.aesthetic_score or DEFAULT_SCORE} | dict(config.scores)
        self._captions: list[str | None] = []
        self._numbers: dict[str, list[float | None]] = {name: [] for name in self._scores}

    def add(self, row: Mapping[str, Any], where: str, numbers_are_text: bool = False) -> int:
        """Take one; gives its number. Raises ValueError for a score that is no number, and for half a character."""
        self._captions.append(_text(row.get(self._config.caption), self._config.caption, where))
        for name, column in self._scores.items():
            self._numbers[name].append(_number(row.get(column), column, where, numbers_are_text))
        return len(self._captions) - 1

    def table(self) -> pa.Table:
        """The columns caption, aesthetic_score and scores, in the order in which the images were taken."""
        numbers = {name: pa.array(values, pa.float32()) for name, values in self._numbers.items()}
        aesthetic = numbers.pop("")
        return pa.table(
            {
                Column.CAPTION: pa.array(self._captions, pa.string()),
                Column.AESTHETIC_SCORE: aesthetic,
                Column.SCORES: scores_column(numbers, len(aesthetic)),
            }
        )


def _text(value: Any, column: str, where: str) -> str | None:
    if value is None:
        return None
    text = str(value).strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {column} holds half of a surrogate pair: {text!r}")
    return text


def _number(value: Any, column: str, where: str, is_text: bool) -> float | None:
    if value is None:
        return None
    if is_text:
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {column} is {value!r}, and a number was expected")
    return float(value)
