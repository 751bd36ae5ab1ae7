"""Find the inputs of all sources. A container is listed once, with their keys, and again when it changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.originals import ABSOLUTE, source_folder
from pipelines.preprocess.sources.folder import list_folder, passed_over
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA, MISSING, NO_IMAGE, PROBLEM, STAMP, keyed, listed
from pipelines.preprocess.sources.survey import LISTINGS, Container, Survey, where_is
from pipelines.preprocess.sources.tables import list_arrow, list_parquet
from pipelines.preprocess.sources.tar import list_tar
from pipelines.schema import ROWS_AT_A_TIME, Column
from pipelines.storage import Storage, StorageOptions

LISTERS = {"parquet": list_parquet, "webdataset": list_tar, "huggingface": list_arrow}
LIST_SCHEMA = pa.schema([field.with_nullable(True) for field in INPUT_SCHEMA])  # a key may yet have to be made
LISTS_AHEAD, PIECES_AHEAD = 16, 4  # that are read before they are asked for: keys alone, and whole rows
NUMBER, ERROR = "number", "error"  # columns of what `write_listings` takes and gives


def list_inputs(surveys: Sequence[Survey], options: StorageOptions) -> Iterator[pa.Table]:
    """Every input, table by table, in the order of sources, and there of files and rows.

    Raises FileNotFoundError where a source has no image, ValueError for what `list_container` or metadata raise.
    """
    for found in surveys:
        if found.kind == "folder":
            yield from _of_folder(found, options, Counter())
        else:
            lists = (list_container(container, options) for container in found.containers)
            yield from _checked(found, (_completed(rows, found) for rows in lists))


@dataclass(frozen=True)
class _Piece:
    """Inputs that are in memory at a time: a row group of a container's list, or some images of a folder."""

    found: Survey
    rows: int
    listing: str = ""
    group: int = 0
    kept: pa.Table | None = None


class Inputs:
    """Every input, to be read twice: the keys of all first, and then the rows that are missing."""

    def __init__(self, surveys: Sequence[Survey], dataset: Storage, keep: Callable[[pa.Table], pa.Table]) -> None:
        """`dataset` has the lists of containers; `keep` takes a table and gives it from where it is not in memory."""
        self._surveys, self._dataset, self._keep = surveys, dataset, keep
        self._pieces: list[_Piece] = []
        self.passed_over: Counter[str] = Counter()
        """Files of folders that are no input and tell of none, by suffix, once `keys` has gone through all."""

    def keys(self) -> Iterator[pa.ChunkedArray]:
        """The keys of all, in order. Raises as `list_inputs`."""
        self._pieces, self.passed_over = [], Counter()
        for found in self._surveys:
            tables = self._of_folder(found) if found.kind == "folder" else _checked(found, self._of_containers(found))
            for table in tables:
                yield table.column(Column.KEY)

    def rows(self, wanted: np.ndarray) -> Iterator[pa.Table]:
        """Those inputs that are wanted [inputs], once `keys` has gone through all."""
        masks = np.split(wanted, np.cumsum([piece.rows for piece in self._pieces]))
        asked = [(piece, mask) for piece, mask in zip(self._pieces, masks, strict=False) if mask.any()]
        with ThreadPoolExecutor(PIECES_AHEAD) as pool:
            for start in range(0, len(asked), PIECES_AHEAD):
                some = asked[start : start + PIECES_AHEAD]
                for rows, (piece, mask) in zip(pool.map(self._read, (p for p, _ in some)), some, strict=True):
                    yield _completed(rows, piece.found).filter(pa.array(mask))

    def _read(self, piece: _Piece) -> pa.Table:
        return self._dataset.read_group(piece.listing, piece.group)[0] if piece.kept is None else piece.kept

    def _of_folder(self, found: Survey) -> Iterator[pa.Table]:
        for rows in _of_folder(found, self._dataset.options, self.passed_over):
            self._pieces.append(_Piece(found, rows.num_rows, kept=self._keep(rows)))
            yield rows

    def _of_containers(self, found: Survey) -> Iterator[pa.Table]:
        """Keys and problems, of each list a row group at a time; the first ones of several lists are read ahead."""
        names = [container.listing for container in found.containers]
        read = partial(self._dataset.read_group, columns=[Column.KEY, PROBLEM])
        with ThreadPoolExecutor(LISTS_AHEAD) as pool:
            for start in range(0, len(names), LISTS_AHEAD):
                some = names[start : start + LISTS_AHEAD]
                for name, (first, groups) in zip(some, pool.map(lambda one: read(one, 0), some), strict=True):
                    for group in range(groups):
                        rows = read(name, group)[0] if group else first
                        self._pieces.append(_Piece(found, rows.num_rows, name, group))
                        if rows.column(Column.KEY).null_count:
                            rows = _completed(self._dataset.read_group(name, group)[0], found)
                        yield rows


def list_container(container: Container, options: StorageOptions) -> pa.Table:
    """The inputs of a container, as LIST_SCHEMA: without keys where they are of files that have a stamp of their own.

    Raises ValueError where its columns are not those that are asked for.
    """
    storage, _ = source_folder(container.source.path, options)
    rows = LISTERS[container.kind](storage, container.name, container.size, container.source)
    own = pc.or_(pc.is_valid(rows.column(Column.OFFSET)), pc.is_valid(rows.column(PROBLEM)))
    own = pc.or_(own, pc.fill_null(pc.match_substring_regex(rows.column(Column.FILE), ABSOLUTE), False))
    stamped = rows.set_column(
        rows.schema.get_field_index(STAMP), STAMP, pc.if_else(own, container.stamp, pa.scalar(None, pa.string()))
    )
    inputs = keyed(stamped, container.source.name)
    if pc.all(own).as_py():
        return inputs.cast(LIST_SCHEMA)
    return _with(inputs.cast(LIST_SCHEMA), Column.KEY, pc.if_else(own, inputs.column(Column.KEY), None))


def unlisted(surveys: Sequence[Survey], dataset: Storage) -> list[Container]:
    """The containers of which the index's folder has no list yet."""
    there = {file.name for file in dataset.list(LISTINGS)}
    return [container for survey in surveys for container in survey.containers if container.listing not in there]


def write_listings(rows: pa.Table, containers: Sequence[Container], dataset: Storage) -> pa.Table:
    """List the containers whose numbers are in `rows` into the index's folder; gives what was wrong with each."""
    errors: list[str | None] = []
    for number in rows.column(NUMBER).to_pylist():
        container = containers[number]
        try:
            listing = list_container(container, dataset.options)
        except ValueError as error:  # of the settings: it is told once, in its own words
            errors.append(str(error))
        else:
            dataset.write_table(container.listing, listing, compression="zstd", row_group_size=ROWS_AT_A_TIME)
            errors.append(None)
    return pa.table({ERROR: pa.array(errors, pa.string())})


def forget_listings(surveys: Sequence[Survey], dataset: Storage) -> None:
    """Delete the lists of containers that are not there any more, or have changed."""
    wanted = {container.listing for survey in surveys for container in survey.containers}
    for file in dataset.list(LISTINGS):
        if file.name not in wanted:
            dataset.delete(file.name)


def _of_folder(found: Survey, options: StorageOptions, rest: Counter[str]) -> Iterator[pa.Table]:
    """Inputs of a folder with their keys; to `rest` is added what files it has besides, by suffix."""
    storage, _ = source_folder(found.source.path, options)
    rows = list_folder(storage, found.files, found.source)
    rest.update(passed_over(found.files, rows))
    for start in range(0, rows.num_rows, ROWS_AT_A_TIME):
        yield keyed(rows.slice(start, ROWS_AT_A_TIME), found.source.name)


def _checked(found: Survey, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Raise FileNotFoundError, after the last, where no container has an image."""
    images = 0
    for table in tables:
        images += table.num_rows - (pc.sum(pc.starts_with(table.column(PROBLEM), NO_IMAGE)).as_py() or 0)
        yield table
    if not images:
        raise FileNotFoundError(f"{where_is(found.source)}: no image in {listed(c.name for c in found.containers)}")


def _completed(rows: pa.Table, found: Survey) -> pa.Table:
    """Listed inputs, each with its key. A key has a stamp: the container's for what lies in it, for a file below the
    source's folder its own.

    Files elsewhere are not looked at before they are read. They have the container's: touching it reads them again.
    """
    return (_with_stamps_of_files(rows, found) if rows.column(Column.KEY).null_count else rows).cast(INPUT_SCHEMA)


def _with_stamps_of_files(rows: pa.Table, found: Survey) -> pa.Table:
    without = pc.is_null(rows.column(Column.KEY))
    known = found.stamps.take(pc.index_in(rows.column(Column.FILE), found.files.column("name")))
    gone = pc.and_(without, pc.is_null(known))
    rows = _with(rows, PROBLEM, pc.if_else(gone, MISSING, rows.column(PROBLEM)))
    stamped = rows.filter(without).append_column(STAMP, known.filter(without).cast(pa.string()))
    keys = keyed(stamped.drop_columns([Column.KEY, Column.SOURCE]), found.source.name).column(Column.KEY)
    places = np.cumsum(without.to_numpy()) - 1
    made = keys.take(pa.array(np.maximum(places, 0)))
    return _with(rows, Column.KEY, pc.if_else(without, made, rows.column(Column.KEY)))


def _with(rows: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), LIST_SCHEMA.field(name), values)
