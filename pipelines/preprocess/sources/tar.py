"""Tars of samples (WebDataset; img2dataset's output) as a source: members that share a name up to its first dot."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.config import SourceConfig
from pipelines.preprocess.sources.captions import caption_columns, lines_of, text_of
from pipelines.preprocess.sources.columns import Records, check_columns
from pipelines.preprocess.sources.inputs import IMAGE_SUFFIXES, NO_IMAGE, PROBLEM, listed, listed_table
from pipelines.schema import Column
from pipelines.storage import Storage

MOST_TEXT_BYTES = 2**24  # of a .txt or .json member
TEXT, JSON = "txt", "json"


@dataclass(frozen=True)
class Member:
    """An image in a tar, and where it lies."""

    suffix: str  # what follows the first dot of its name, in small letters
    name: str
    offset: int
    size: int


@dataclass
class Sample:
    """What a sample's members hold."""

    images: list[Member] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    """Suffixes of what is neither an image nor text."""
    told: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


Samples = dict[tuple[int, str], Sample]  # by the number of the tar in its file, and what their names share


def list_tar(source: Storage, name: str, size: int, config: SourceConfig) -> pa.Table:
    """The inputs of one file of tars without keys, in the order of its samples. Most files are one tar; those that
    were appended to each other are read to the last, and what two of them call the same is not.

    What breaks off, or is no tar, is an input with its problem. Raises ValueError where a column is missing.
    """
    where = f"{source.uri.rstrip('/')}/{name}"
    samples: Samples = {}
    problem = _read_samples(source, name, size, samples)
    records, rows, captions = Records(config.columns), [], caption_columns(config.columns)
    fields: dict[str, None] = {}
    troubled: Counter[str] = Counter()  # a row with a problem has no place: its path alone tells it from others
    for (_, key), sample in samples.items():
        told = {column: None if _is_nan(value) else value for column, value in sample.told.items()}
        fields |= dict.fromkeys(told)
        if TEXT in told and config.columns.caption_per_line:
            told[TEXT] = lines_of(str(told[TEXT]))
        if TEXT in told and captions and all(told.get(column) is None for column in captions):
            told[next(iter(captions))] = told[TEXT]
        for row in _sample_rows(name, key, sample, config.columns.image):
            records.add(told, f"{where}, {key}")
            if row.get(PROBLEM) is not None:
                troubled[path := row[Column.PATH]] += 1
                row[Column.PATH] += f" ({troubled[path]})" if troubled[path] > 1 else ""
            rows.append(row)
    if TEXT in fields:
        fields["caption"] = None  # the default name stands for the text beside the image too
    known = any(sample.images or sample.told for sample in samples.values())
    if known and problem is None:  # what a part of a tar lacks may be in the rest
        check_columns(fields, config.columns, where)
        if (image := config.columns.image) is not None and image.lower() not in (there := _suffixes(samples)):
            raise ValueError(f"{where}: source.columns.image is {image!r}, and there is only {listed(there)}")
    if problem is not None:
        records.add({}, where)
        rows.append({Column.PATH: name, PROBLEM: problem})
    columns = {key: pa.array([row.get(key) for row in rows]) for key in (Column.PATH, PROBLEM, *_place("", 0, 0))}
    described = records.table()
    return listed_table(len(rows), **columns, **{key: described.column(key) for key in described.column_names})


def _read_samples(source: Storage, name: str, size: int, samples: Samples) -> str | None:
    """Fill `samples` with the members of a file's tars; gives what was wrong, if anything was."""
    file = source.stream(name, size)
    start, number = 0, 0
    while True:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0 or member.offset_data + member.size > size:
                        return f"the tar breaks off in {member.name}, and what follows is unknown"
                    _take(tar, member, number, samples)
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # StorageError is none of these
            return f"the tar cannot be read to its end, and what follows is unknown: {error}"
        file.seek(min(end, size))
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            if number and end == start:
                return f"what follows the tar's end mark, from byte {start} on, is no tar, and unknown"
            return f"the tar breaks off at byte {end}, and what follows is unknown"
        following = _following(file)
        if following is None:
            return None
        start, number = following, number + 1


def _following(file: io.BufferedReader) -> int | None:
    """Where the next block lies that is not all zeros; None where there is none."""
    while block := file.read(tarfile.BLOCKSIZE):
        if block.strip(b"\0"):
            return file.tell() - len(block)
    return None


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, number: int, samples: Samples) -> None:
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    suffix = suffix.lower()
    is_image = f".{suffix}".endswith(IMAGE_SUFFIXES)
    if member.isdir() or base.startswith("__"):  # which WebDataset keeps for what is of no sample
        return
    sample = samples.setdefault((number, f"{folder}{slash}{stem}"), Sample())
    if not (is_image or suffix in (TEXT, JSON)):
        sample.others.add(suffix)
    elif not member.isreg() or member.issparse():
        sample.problem = f"{name} is a link or has holes"
    elif is_image:
        sample.images.append(Member(suffix, name, member.offset_data, member.size))
    elif member.size > MOST_TEXT_BYTES:
        sample.problem = f"{name} has {member.size} bytes"
    else:
        content = tar.extractfile(member)
        assert content is not None  # a regular member
        text = text_of(content.read())
        try:
            found = {TEXT: text} if suffix == TEXT else json.loads(text)
        except (ValueError, RecursionError) as error:
            sample.problem = f"{name} is not JSON: {error}"
            return
        if isinstance(found, dict):
            sample.told |= found


def _sample_rows(name: str, key: str, sample: Sample, suffix: str | None) -> Iterator[dict[str, Any]]:
    """A row for the sample's image; for each, with its problem, where it has several and which is meant is unknown."""
    images = [image for image in sample.images if suffix is None or image.suffix == suffix.lower()]
    there = ", ".join(image.suffix for image in sample.images)
    problem = sample.problem
    if not images:
        missing, there = f"{NO_IMAGE} {suffix or ''}".rstrip(), there or listed(sorted(sample.others))
        problem = problem or (f"{missing}, only {there}" if there else missing)
        yield {Column.PATH: f"{name}/{key}", PROBLEM: problem}
    elif len(images) > 1 and problem is None:
        several = f"the sample {key} has several images"
        if len({image.suffix for image in images}) > 1:
            problem = f"{several}, {there}: name one in columns.image, or let what precedes the first dot differ"
        else:
            problem = f"{several} of the suffix {images[0].suffix}"
    for image in images:
        place = _place(name, image.offset, image.size) if problem is None else {}
        yield {Column.PATH: f"{name}/{image.name}", PROBLEM: problem, **place}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _suffixes(samples: Samples) -> list[str]:
    return list(dict.fromkeys(image.suffix for sample in samples.values() for image in sample.images))


def _place(name: str, offset: int, size: int) -> dict[str, Any]:
    return {Column.FILE: name, Column.OFFSET: offset, Column.LENGTH: size, Column.FILE_SIZE: size}
