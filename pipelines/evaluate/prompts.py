"""What to make pictures of: prompts from the settings, a text file, a Parquet table, or an index's captions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.captions import likeliest
from pipelines.config import Size
from pipelines.evaluate.config import PromptsConfig
from pipelines.heldout import is_held_out
from pipelines.schema import INDEX_ONLY, INDEX_SCHEMA, Column, data_files, digest, kept, require_manifest
from pipelines.storage import Storage, StorageOptions

SLUG_CHARACTERS = 40
TEXTS = ("prompt", "negative")  # of PromptColumns; the others are whole numbers
FILE_NUMBER, ROW_NUMBER = "file_number", "row_number"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One picture to make. The picture depends on these fields but `path`, and not on its place among others."""

    text: str
    """The prompt."""
    negative: str | None
    """What guidance leads away from; None is no text at all."""
    seed: int
    """Picks the noise, together with the prompt."""
    size: Size
    """(height, width) of the picture in pixels."""
    original_size: Size
    """(height, width) that the networks are told as the original's, pixels."""
    crop_top_left: tuple[int, int]
    """(top, left) that the networks are told as the crop's, pixels."""
    path: str | None = None
    """The image whose caption it is, below the source, where it comes from an index."""

    @property
    def noise_index(self) -> int:
        """The row of the noise: one prompt's pictures begin alike only where they have the same seed."""
        return int(digest(self.text)[:15], 16)

    def picture_name(self, made_by: object) -> str:
        """The picture's file: another name for anything that would make another picture."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.text.lower()).strip("-")[:SLUG_CHARACTERS].rstrip("-") or "picture"
        return f"pictures/{slug}-{digest([asdict(replace(self, path=None)), made_by])[:16]}.png"


def read_prompts(config: PromptsConfig, options: StorageOptions, pinned: str | None = None) -> list[Prompt]:
    """The prompts of a config, in order; each as often as config.per_prompt, with seeds that count up.

    `pinned` is the digest of an index's version to read them from; None is the current one.
    Raises ValueError where there is none, for a table without the columns that the config names or with other values in
    them than text and whole numbers, and FileNotFoundError.
    """
    found = [
        replace(prompt, seed=prompt.seed + offset)
        for prompt in _prompts(config, options, pinned)
        for offset in range(config.per_prompt)
    ]
    if not found:
        raise ValueError("prompts: there is none")
    if wide := [prompt.seed for prompt in found if not -(2**63) <= prompt.seed < 2**63]:
        raise ValueError(f"prompts.seed: {wide[0]} does not fit into 64 bits")
    return found


def _prompts(config: PromptsConfig, options: StorageOptions, pinned: str | None) -> Iterator[Prompt]:
    shared = Prompt(
        text="",
        negative=config.negative,
        seed=config.seed,
        size=config.size,
        original_size=config.original_size or config.size,
        crop_top_left=config.crop_top_left,
    )
    if config.index is not None:
        index = Storage(config.index, options)
        for row in index_rows(index, config.count, config.validation_share, pinned):
            yield replace(
                shared,
                text=likeliest(row[Column.CAPTIONS], row[Column.CAPTION_WEIGHTS]),
                size=tuple(row[Column.BUCKET]),
                original_size=config.original_size or tuple(row[Column.ORIGINAL_SIZE]),
                path=row[Column.PATH],
            )
    elif config.parquet is not None:
        yield from _table_prompts(config, shared, options)
    else:
        texts = config.texts if config.file is None else _lines(config.file, options)
        yield from (replace(shared, text=text) for text in texts[: config.count])


def index_rows(
    index: Storage, count: int | None, validation_share: float, pinned: str | None = None
) -> list[dict[str, Any]]:
    """The first `count` kept rows of an index by source and path; with a share, of those that training holds out.

    `pinned` is the digest of a version of the index, and None the current one. An index may be far larger than its
    reader: it is gone through file by file for a few columns, and of the rows that are chosen alone comes the rest.
    Those of a version are kept, for each checkpoint of a run asks for the same.
    """
    if pinned is None:
        pinned = require_manifest(index, "index").digest
    return _pinned_rows(index.uri, index.options, count, validation_share, pinned)


@lru_cache(maxsize=1)
def _pinned_rows(
    uri: str, options: StorageOptions, count: int | None, validation_share: float, pinned: str
) -> list[dict[str, Any]]:
    index = Storage(uri, options)
    names = [file.name for file in data_files(index, require_manifest(index, "index", pinned))]
    order = [(Column.SOURCE, "ascending"), (Column.PATH, "ascending")]
    told = [Column.SOURCE, Column.PATH, Column.ID, Column.REJECT_REASON]
    chosen: pa.Table | None = None
    for number, rows in enumerate(index.read_tables(names, told)):
        found = _candidates(rows, number, validation_share)
        chosen = found if chosen is None else pa.concat_tables([chosen, found])
        if count is not None and chosen.num_rows > count:
            chosen = chosen.sort_by(order).slice(0, count).combine_chunks()
    if chosen is None:
        return []
    files = sorted(set(chosen.column(FILE_NUMBER).to_pylist()))
    columns = [name for name in INDEX_SCHEMA.names if name not in INDEX_ONLY]
    tables = index.read_tables([names[number] for number in files], columns)
    parts = [
        table.take(chosen.filter(pc.equal(chosen.column(FILE_NUMBER), number)).column(ROW_NUMBER))
        for number, table in zip(files, tables, strict=True)
    ]
    return kept(pa.concat_tables(parts)).sort_by(order).to_pylist() if parts else []


def _candidates(rows: pa.Table, number: int, validation_share: float) -> pa.Table:
    """Source, path and place of a file's rows that may be chosen; the file is the one of that number."""
    wanted = pc.is_null(rows.column(Column.REJECT_REASON))
    if validation_share:
        ids = rows.column(Column.ID).to_pylist()
        held_out = [image_id is not None and is_held_out(image_id, validation_share) for image_id in ids]
        wanted = pc.and_(wanted, pa.array(held_out, pa.bool_()))
    rows = rows.select([Column.SOURCE, Column.PATH])
    rows = rows.append_column(FILE_NUMBER, pa.repeat(pa.scalar(number, pa.int64()), rows.num_rows))
    return rows.append_column(ROW_NUMBER, pa.array(range(rows.num_rows), pa.int64())).filter(wanted)


def _table_prompts(config: PromptsConfig, shared: Prompt, options: StorageOptions) -> Iterator[Prompt]:
    """One prompt per row, files in the order of their names."""
    assert config.parquet is not None
    columns = config.columns
    named = {field: column for field, column in asdict(columns).items() if column is not None}
    left = config.count
    for where, storage, name in _tables(config.parquet, options):
        try:
            there = storage.table_columns(name)
        except pa.ArrowInvalid as error:
            raise ValueError(f"prompts.parquet: {where} is no Parquet file: {error}") from error
        if missing := sorted(set(named.values()) - set(there)):
            raise ValueError(f"prompts.columns: {where} has no column {missing}; it has {there}")
        table = storage.read_table(name, sorted(set(named.values())))
        for number, row in enumerate(table.slice(0, left).to_pylist()):
            values = {field: row[column] for field, column in named.items()}
            empty = [named[field] for field, value in values.items() if value is None and field != "negative"]
            if empty:
                raise ValueError(f"prompts.parquet: {where}: row {number} has nothing in {empty}")
            for field, value in values.items():
                kind = str if field in TEXTS else int
                whole = isinstance(value, float) and value.is_integer()  # as pandas has a column with nulls
                if not (value is None or isinstance(value, kind) or (kind is int and whole)):
                    expected = "text" if kind is str else "a whole number"
                    raise ValueError(
                        f"prompts.parquet: {where}: row {number} has {value!r} in {named[field]!r}; expected {expected}"
                    )
            height = int(values.get("height", shared.size[0]))
            width = int(values.get("width", shared.size[1]))
            yield replace(
                shared,
                text=values["prompt"],
                negative=values.get("negative", shared.negative),
                seed=int(values.get("seed", shared.seed)),
                size=(height, width),
                original_size=config.original_size or (height, width),
            )
        if left is not None:
            left = max(0, left - table.num_rows)


def _tables(path: str, options: StorageOptions) -> Iterator[tuple[str, Storage, str]]:
    """(for messages, storage, name) of a Parquet file, or of all of a folder."""
    if path.endswith(".parquet"):
        folder, _, name = path.rpartition("/")
        storage = Storage(folder or ".", options)
        if not storage.exists(name):
            raise FileNotFoundError(f"prompts.parquet: there is no {path}")
        yield path, storage, name
        return
    folder_storage = Storage(path, options)
    names = sorted(file.name for file in folder_storage.list() if file.name.endswith(".parquet"))
    if not names:
        raise FileNotFoundError(f"prompts.parquet: {path} is no Parquet file and holds none")
    yield from ((f"{path}/{name}", folder_storage, name) for name in names)


def _lines(path: str, options: StorageOptions) -> list[str]:
    """The lines of a UTF-8 text file that are not empty."""
    folder, _, name = path.rpartition("/")
    try:
        lines = Storage(folder or ".", options).read(name).decode("utf-8-sig").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"prompts.file: {path} is no file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts.file: {path} is no text in UTF-8: {error.reason}, byte {error.start}") from error
    return [line.strip() for line in lines if line.strip()]


def batches(prompts: list[Prompt], names: list[str], size: int) -> list[pa.Table]:
    """Tables of at most `size` prompts with the names of their pictures, all of one picture size."""
    groups: dict[Size, list[dict[str, object]]] = {}
    for prompt, name in zip(prompts, names, strict=True):
        groups.setdefault(prompt.size, []).append(asdict(prompt) | {"name": name})
    return [
        pa.Table.from_pylist(group[start : start + size], schema=SCHEMA)
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


PAIR = pa.list_(pa.int64())
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "negative": pa.string(),
        "seed": pa.int64(),
        "size": PAIR,
        "original_size": PAIR,
        "crop_top_left": PAIR,
        "path": pa.string(),
        "name": pa.string(),
    }
)
