"""Find the inputs of a source folder: image files, their captions and their scores."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

import pyarrow as pa

from pipelines.config import SourceConfig
from pipelines.schema import Column, digest
from pipelines.storage import Storage

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
METADATA = "metadata.jsonl"

INPUT_SCHEMA = pa.schema(
    [
        pa.field(Column.KEY, pa.string(), nullable=False),
        pa.field(Column.PATH, pa.string(), nullable=False),
        pa.field(Column.CAPTION, pa.string()),
        pa.field(Column.AESTHETIC_SCORE, pa.float32()),
        pa.field(Column.FILE_SIZE, pa.int64(), nullable=False),
    ]
)


def list_inputs(source: Storage, config: SourceConfig) -> pa.Table:
    """Every input, sorted by path: the image files below the folder, and what metadata.jsonl names beside them.

    A file's caption is that of metadata.jsonl, or the text of the .txt file of the same name. A row of metadata.jsonl
    whose file is missing is an input too (with file_size -1), so that the index can say so.
    Raises FileNotFoundError where there is no image, ValueError naming the line where metadata.jsonl is wrong.
    """
    files = {file.name: file for file in source.list()}
    described = _read_metadata(source, config) if METADATA in files else {}
    images = {name for name in files if name.lower().endswith(IMAGE_SUFFIXES)}
    if not images:
        raise FileNotFoundError(f"source.path {config.path}: no image with a suffix of {', '.join(IMAGE_SUFFIXES)}")
    rows = []
    for path in sorted(images | described.keys()):
        stat = files.get(path)
        caption, score = described.get(path, (None, None))
        sidecar = path.rpartition(".")[0] + ".txt"
        if caption is None and sidecar in files:
            caption = source.read(sidecar).decode("utf-8", errors="replace").strip()
        identity = [path, stat and [stat.size, stat.modified_us], caption, score]
        rows.append(
            {
                Column.KEY: digest(identity),
                Column.PATH: path,
                Column.CAPTION: caption,
                Column.AESTHETIC_SCORE: score,
                Column.FILE_SIZE: stat.size if stat else -1,
            }
        )
    return pa.Table.from_pylist(rows, INPUT_SCHEMA)


def _read_metadata(source: Storage, config: SourceConfig) -> dict[str, tuple[str | None, float | None]]:
    """(caption, score) of each file that metadata.jsonl names."""
    found: dict[str, tuple[str | None, float | None]] = {}
    for number, line in enumerate(source.read(METADATA).removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{source.uri.rstrip('/')}/{METADATA}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:  # of the encoding, or of the syntax
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{where}: "file_name" is missing')
        if not found and config.caption_column not in row:
            raise ValueError(
                f"{where}: source.caption_column is {config.caption_column!r}, and the row has {', '.join(row)}"
            )
        found[row["file_name"]] = (_text(row, config.caption_column, where), _number(row, config.score_column, where))
    return found


def _text(row: dict[str, Any], column: str, where: str) -> str | None:
    value = row.get(column)
    if value is None:
        return None
    text = str(value).strip()
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {column} holds half of a surrogate pair: {text!r}")
    return text


def _number(row: dict[str, Any], column: str, where: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {column} is {value!r}, and a number was expected")
    return float(value)
