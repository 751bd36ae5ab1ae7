"""A tar of samples (WebDataset; img2dataset's output) as a source: members that share a name up to its first dot."""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.config import SourceConfig
from pipelines.preprocess.sources.captions import caption_columns, lines_of, text_of
from pipelines.preprocess.sources.columns import Records, check_columns
from pipelines.preprocess.sources.inputs import IMAGE_SUFFIXES, PROBLEM, listed, listed_table
from pipelines.schema import Column
from pipelines.storage import Storage

MOST_TEXT_BYTES = 2**24  # of a .txt or .json member
TEXT, JSON = "txt", "json"


@dataclass
class Sample:
    """The members of one sample, by what follows the first dot of their names."""

    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)  # name, offset, bytes
    told: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def list_tar(source: Storage, name: str, size: int, config: SourceConfig) -> pa.Table:
    """The inputs of one tar without keys, in the order of its samples.

    What breaks off, or is no tar, is an input with its problem. Raises ValueError where a column is missing.
    """
    where = f"{source.uri.rstrip('/')}/{name}"
    samples: dict[str, Sample] = {}
    problem = _read_samples(source, name, size, samples)
    records, rows, captions = Records(config.columns), [], caption_columns(config.columns)
    fields: dict[str, None] = {}
    for key, sample in samples.items():
        told = {column: None if _is_nan(value) else value for column, value in sample.told.items()}
        fields |= dict.fromkeys(told)
        if TEXT in told and config.columns.caption_per_line:
            told[TEXT] = lines_of(str(told[TEXT]))
        if TEXT in told and captions and all(told.get(column) is None for column in captions):
            told[next(iter(captions))] = told[TEXT]
        image, wrong = _choose(sample, config.columns.image)
        path = f"{name}/{image[0] if image else key}"
        records.add(told, f"{where}, {key}")
        rows.append({Column.PATH: path, PROBLEM: wrong, **(_place(name, *image[1:]) if image and not wrong else {})})
    if TEXT in fields:
        fields["caption"] = None  # the default name stands for the text beside the image too
    if samples and problem is None:  # what a part of a tar lacks may be in the rest
        check_columns(fields, config.columns, where)
        if config.columns.image is not None and config.columns.image not in (there := _suffixes(samples)):
            raise ValueError(
                f"{where}: source.columns.image is {config.columns.image!r}, and there is only {listed(there)}"
            )
    if problem is not None:
        records.add({}, where)
        rows.append({Column.PATH: name, PROBLEM: problem})
    columns = {key: pa.array([row.get(key) for row in rows]) for key in (Column.PATH, PROBLEM, *_place("", 0, 0))}
    described = records.table()
    return listed_table(len(rows), **columns, **{key: described.column(key) for key in described.column_names})


def _read_samples(source: Storage, name: str, size: int, samples: dict[str, Sample]) -> str | None:
    """Fill `samples` with a tar's members; gives what was wrong with the tar, if anything was."""
    file = source.stream(name, size)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.offset_data + member.size > size:
                    return f"the tar breaks off in {member.name}, and what follows is unknown"
                _take(tar, member, samples)
                tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:  # StorageError is none of these
        return f"the tar cannot be read to its end, and what follows is unknown: {error}"
    file.seek(min(end, size))
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        return f"the tar breaks off at byte {end}, and what follows is unknown"
    return None


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, Sample]) -> None:
    name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    is_image = f".{suffix.lower()}".endswith(IMAGE_SUFFIXES)
    if member.isdir() or not (is_image or suffix in (TEXT, JSON)):
        return
    key = f"{folder}{slash}{stem}"
    sample = samples.setdefault(key, Sample())
    if not member.isreg() or member.issparse():
        sample.problem = f"{name} is a link or has holes"
    elif is_image and suffix in sample.images:
        sample.problem = f"{name} is there twice"
    elif is_image:
        sample.images[suffix] = (name, member.offset_data, member.size)
    elif member.size > MOST_TEXT_BYTES:
        sample.problem = f"{name} has {member.size} bytes"
    else:
        content = tar.extractfile(member)
        assert content is not None  # a regular member
        text = text_of(content.read())
        try:
            found = {TEXT: text} if suffix == TEXT else json.loads(text)
        except ValueError as error:
            sample.problem = f"{name} is not JSON: {error}"
            return
        if isinstance(found, dict):
            sample.told |= found


def _choose(sample: Sample, suffix: str | None) -> tuple[tuple[str, int, int] | None, str | None]:
    """The sample's image (name, offset, bytes), and what is wrong, if anything is."""
    images = sample.images
    chosen = images.get(suffix) if suffix else next(iter(images.values()), None)
    if sample.problem:
        return chosen, sample.problem
    if chosen is None:
        return None, f"the sample has no image {suffix or ''}".rstrip()
    if suffix is None and len(images) > 1:
        return chosen, f"the sample has several images, {', '.join(images)}: name one in columns.image"
    return chosen, None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _suffixes(samples: dict[str, Sample]) -> list[str]:
    return list(dict.fromkeys(suffix for sample in samples.values() for suffix in sample.images))


def _place(name: str, offset: int, size: int) -> dict[str, Any]:
    return {Column.FILE: name, Column.OFFSET: offset, Column.LENGTH: size, Column.FILE_SIZE: size}
