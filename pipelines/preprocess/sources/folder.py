"""A folder of images as a source: captions beside them as .txt, or in metadata files (the imagefolder convention)."""

from __future__ import annotations

import codecs
import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import SourceConfig
from pipelines.preprocess.sources.columns import Records, check_columns
from pipelines.preprocess.sources.inputs import (
    CAPTION_FILE,
    CAPTION_PER_LINE,
    IMAGE_NAME,
    IMAGE_SUFFIXES,
    MISSING,
    PROBLEM,
    STAMP,
    listed_table,
    stamps_of,
)
from pipelines.schema import Column
from pipelines.storage import Storage

METADATA_NAME = r"(^|/)metadata\.(jsonl|csv)$"
SUFFIX = r"\.[^./]*$"
TEXT_SUFFIXES = (".txt", ".TXT")  # the first counts, where both are there
FILE_NAME = "file_name"  # the column that the convention gives the image's place, below the metadata file's folder


def list_folder(source: Storage, files: pa.Table, config: SourceConfig) -> pa.Table:
    """Inputs without keys, sorted by path: the image files among `files`, and what metadata files name.

    A metadata file describes images in its folder and below; the nearest goes before. Where it gives no caption, the
    text file of the image's name does. An image that is described and not there is an input too, with its problem.
    Raises FileNotFoundError where there is no image, ValueError naming the line where a metadata file is wrong.
    """
    names = files.column("name")
    images = names.filter(pc.match_substring_regex(names, IMAGE_NAME, ignore_case=True))
    if not len(images):
        raise FileNotFoundError(
            f"source {config.name!r}, {config.path}: no image with a suffix of {', '.join(IMAGE_SUFFIXES)}"
        )
    described, records = _read_metadata(source, names, config)
    paths = pc.unique(pa.chunked_array([*images.chunks, pa.array(described, pa.string())]))
    paths = paths.take(pc.sort_indices(paths))
    told = records.table().take(pc.index_in(paths, pa.array(described, pa.string())))
    place = pc.index_in(paths, names)
    stems = pc.replace_substring_regex(paths, SUFFIX, "")
    texts = (pc.index_in(pc.binary_join_element_wise(stems, suffix, ""), names) for suffix in TEXT_SUFFIXES)
    beside = pc.coalesce(*texts)
    untold = pc.equal(pc.fill_null(pc.list_value_length(told.column(Column.CAPTIONS)), 0), 0)
    beside = pc.if_else(untold, beside, None)
    stamps = stamps_of(files)
    both = pc.binary_join_element_wise(
        stamps.take(place), stamps.take(beside), " ", null_handling="replace", null_replacement="-"
    )
    found = {name: told.column(name) for name in told.column_names}
    return listed_table(
        len(paths),
        **found,
        **{
            Column.PATH: paths,
            CAPTION_FILE: names.take(beside),
            CAPTION_PER_LINE: pc.if_else(pc.is_valid(beside), config.columns.caption_per_line, None),
            Column.FILE_SIZE: pc.fill_null(files.column("size").take(place), -1),
            PROBLEM: pc.if_else(pc.is_null(place), MISSING, None),
            STAMP: both,
        },
    )


def passed_over(files: pa.Table, rows: pa.Table) -> Counter[str]:
    """How many of a folder's files are neither among its inputs, `rows`, nor tell of them, by suffix in small letters;
    none, and one that is longer than such are, is the empty one."""
    names = files.column("name")
    paths = rows.column(Column.PATH)
    stems = pc.unique(pc.replace_substring_regex(paths, SUFFIX, ""))
    texts = pc.and_(
        pc.match_substring_regex(names, r"\.txt$", ignore_case=True),
        pc.is_in(pc.replace_substring_regex(names, SUFFIX, ""), stems),
    )
    taken = pc.or_(pc.is_in(names, pc.unique(paths)), pc.match_substring_regex(names, METADATA_NAME))
    rest = names.filter(pc.invert(pc.or_(taken, texts)))
    suffixes = pc.utf8_lower(pc.replace_substring_regex(rest, r"^.*?(\.[^./ ]{1,8})?$", r"\1"))
    return Counter({count["values"]: count["counts"] for count in pc.value_counts(suffixes).to_pylist()})


def _read_metadata(source: Storage, names: pa.ChunkedArray, config: SourceConfig) -> tuple[list[str], Records]:
    """The paths that metadata files describe, and what they say of each."""
    found = names.filter(pc.match_substring_regex(names, METADATA_NAME))
    files = sorted(found.to_pylist(), key=lambda name: (-name.count("/"), name))  # the nearest to the images first
    folders = [name.rpartition("/")[0] for name in files]
    for one, other in pairwise(files):
        if one.rpartition("/")[0] == other.rpartition("/")[0]:
            raise ValueError(f"{source.uri}: {one} and {other} both describe the images of one folder; keep one")
    records = Records(config.columns)
    described: dict[str, int] = {}  # in which line; lines count on from file to file
    before = 0
    for name, folder in zip(files, folders, strict=True):
        where, is_csv = f"{source.uri.rstrip('/')}/{name}", name.endswith(".csv")
        fields: dict[str, None] = {}
        number = 0
        for number, row in (_csv_rows if is_csv else _json_rows)(_without_mark(source.read(name)), where):
            line = f"{where}, line {number}"
            if not isinstance(row.get(FILE_NAME), str):
                raise ValueError(f'{line}: "{FILE_NAME}" is missing')
            path = row[FILE_NAME] and posixpath.normpath(posixpath.join(folder, row[FILE_NAME]))
            if described.get(path, 0) > before:
                raise ValueError(f"{line}: line {described[path] - before} describes {row[FILE_NAME]} already")
            fields |= dict.fromkeys(row)
            if path not in described:
                described[path] = before + number
                records.add(row, line, numbers_are_text=is_csv)
        if fields:
            check_columns(fields, config.columns, where)
        before += number
    return list(described), records


def _without_mark(data: bytes) -> bytes:
    return data.removeprefix(codecs.BOM_UTF8)


def _json_rows(data: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of each row."""
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # of the encoding, of the syntax, or nested too deep
            raise ValueError(f"{where}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}, line {number}: "{FILE_NAME}" is missing')
        yield number, row


def _csv_rows(data: bytes, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and fields of each row; an empty field is none, and one that is a JSON list is a list."""
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}, line {1 + data[: error.start].count(10)}: not UTF-8: {error}") from error
    head: list[str] | None = None
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{where}, line {reader.line_num}: not CSV: {error}") from error
        if fields is None:
            return
        if not fields:
            continue
        if head is None:
            head = fields
            continue
        if len(fields) != len(head):
            raise ValueError(f"{where}, line {reader.line_num}: {len(fields)} fields, and the head has {len(head)}")
        yield reader.line_num, {name: _csv_value(value) for name, value in zip(head, fields, strict=True)}


def _csv_value(field: str) -> Any:
    if field.startswith("["):
        with suppress(ValueError, RecursionError):
            return json.loads(field)
    return field or None
