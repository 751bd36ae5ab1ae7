"""Turn finished rows into a dataset: units that are written whole, and one commit that makes them count.

A run cuts its missing rows into units. Each unit becomes one Parquet file, written by whichever task gets there, and
a file that exists is whole. A run that is killed leaves finished units behind; the next run finds them by the keys
inside, does what is missing, and commits. The commit sees to it that each wanted key counts exactly once, whatever
files there are, and makes manifest.json last. Files that no manifest ever named are deleted after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import INDEX_SCHEMA, Column, DataFile, digest
from pipelines.storage import TABLE_READERS, Storage

UNIT, UNIT_ROWS = "unit", "unit_rows"  # columns that travel with rows until they are written
UNIT_SECONDS = "unit_seconds_"  # and these: a row's share of what each stage took, by the stage's name
UNIT_COUNT = "unit_count_"  # and these: numbers whose sums over all rows are of interest, by name
FAILURE = "failure"  # column of rows on their way: why a row could not be made, or null
PAGE_BYTES = 2**30  # more than any column holds
REWRITERS = 4  # files that are written again at a time
# What is decided again for rows that are written.
AMENDED = (Column.CAPTION_REASONS, Column.REJECT_REASON, Column.REJECT_DETAIL)

Amend = Callable[[pa.Table, np.ndarray], pa.Table | None]
"""Rows of a file, with AMENDED among their columns, and where each row's key is among the wanted ones -> the rows with
AMENDED as it should be; None where it is."""


@dataclass(frozen=True)
class Stored:
    """One file of rows, with their keys in its order."""

    name: str
    keys: pa.Array


def cut(rows: pa.Table, size: int, folder: str = "all") -> list[pa.Table]:
    """Rows cut into units of at most `size`, whose files will lie in `folder`."""
    units = []
    for start in range(0, rows.num_rows, size):
        unit = rows.slice(start, size)
        name = f"{folder}/{digest(unit.column(Column.KEY).to_pylist())}"
        count = unit.num_rows
        unit = unit.append_column(UNIT, pa.array([name] * count, pa.string()))
        units.append(unit.append_column(UNIT_ROWS, pa.array([count] * count, pa.int64())))
    return units


def timed(stage: str) -> Callable[[Callable[..., pa.Table]], Callable[..., pa.Table]]:
    """A decorator of a function of tables: the rows of units get a column with their shares of the seconds it took."""

    def decorate(function: Callable[..., pa.Table]) -> Callable[..., pa.Table]:
        @wraps(function)
        def run(*arguments: Any, **named: Any) -> pa.Table:
            begun = time.perf_counter()
            rows = function(*arguments, **named)
            if UNIT not in rows.column_names:
                return rows
            share = (time.perf_counter() - begun) / max(1, rows.num_rows)
            seconds = pa.array([share] * rows.num_rows, pa.float64())
            return rows.append_column(f"{UNIT_SECONDS}{stage}", seconds)

        return run

    return decorate


def write_units(rows: pa.Table, dataset: Storage, folder: str, compression: str | None) -> pa.Table:
    """Write the units that a task holds; one row per unit: its name, rows written, which failed, seconds, counts."""
    report = []
    travelling = [name for name in rows.column_names if name.startswith(UNIT)]
    for name in pc.unique(rows.column(UNIT)).to_pylist():
        begun = time.perf_counter()
        unit = rows.filter(pc.equal(rows.column(UNIT), name))
        expected = unit.column(UNIT_ROWS)[0].as_py()
        if unit.num_rows != expected:
            raise RuntimeError(f"unit {name} reached its writer with {unit.num_rows} of {expected} rows")
        seconds, counts = (
            {
                column.removeprefix(prefix): pc.sum(unit.column(column)).as_py()
                for column in travelling
                if column.startswith(prefix)
            }
            for prefix in (UNIT_SECONDS, UNIT_COUNT)
        )
        failures: list[dict[str, Any]] = []
        if FAILURE in unit.column_names:
            failed = unit.filter(pc.is_valid(unit.column(FAILURE)))
            failures = failed.select([field.name for field in FAILED if field.name in failed.column_names]).to_pylist()
            unit = unit.filter(pc.is_null(unit.column(FAILURE))).drop_columns([FAILURE, Column.SOURCE, Column.PATH])
        if unit.num_rows:
            write_rows(unit.drop_columns(travelling), dataset, f"{folder}/{name}.parquet", compression)
        seconds["write"] = time.perf_counter() - begun
        told = {"failures": failures, "seconds": list(seconds.items()), "counts": list(counts.items())}
        report.append({UNIT: name, "rows": unit.num_rows, **told})
    return pa.Table.from_pylist(report, REPORT_SCHEMA)


FAILED = pa.struct(
    [
        (Column.SOURCE, pa.string()),
        (Column.PATH, pa.string()),
        (Column.CROP, pa.int32()),
        (FAILURE, pa.string()),
    ]
)
REPORT_SCHEMA = pa.schema(
    [
        (UNIT, pa.string()),
        ("rows", pa.int64()),
        ("failures", pa.list_(FAILED)),
        ("seconds", pa.map_(pa.string(), pa.float64())),
        ("counts", pa.map_(pa.string(), pa.int64())),
    ]
)


def write_rows(rows: pa.Table, dataset: Storage, name: str, compression: str | None) -> None:
    """Write one data file. Tensor bytes do not compress by value, so they get no dictionary and no statistics.

    A column is one page, so that where it is not compressed its values lie side by side (pipelines/latents.py).
    """
    text = [field.name for field in rows.schema if not pa.types.is_fixed_size_binary(field.type)]
    dataset.write_table(
        name, rows, compression=compression, use_dictionary=False, write_statistics=text, data_page_size=PAGE_BYTES
    )


def stored(dataset: Storage, folder: str) -> list[Stored]:
    """The whole data files below `folder` and the keys in them, sorted by name."""
    names = [file.name for file in dataset.list(folder)]
    tables = dataset.read_tables(names, [Column.KEY])
    return [Stored(name, keys.column(0).combine_chunks()) for name, keys in zip(names, tables, strict=True)]


def keys_of(files: Iterable[Stored]) -> pa.ChunkedArray:
    """The keys of all files, one after another."""
    return pa.chunked_array([file.keys for file in files], pa.string())


def missing(rows: pa.Table, have: Iterable[Stored]) -> pa.Table:
    """Those wanted rows whose keys are in no file yet."""
    return rows.filter(pc.invert(pc.is_in(rows.column(Column.KEY), value_set=keys_of(have))))


def rows_of(dataset: Storage, have: Sequence[Stored], wanted: pa.ChunkedArray, columns: Sequence[str]) -> pa.Table:
    """Columns of the stored index rows that have wanted keys, each key once. Files may hold one twice, when a run was
    killed between two plans; measured again, it is the same row."""
    places = pc.fill_null(pc.index_in(keys_of(have), value_set=wanted), -1).to_numpy()
    first = np.zeros(len(places), bool)
    first[np.unique(places, return_index=True)[1]] = True
    first &= places >= 0
    ends = np.cumsum([len(file.keys) for file in have], dtype=np.int64)
    parts = zip(have, np.split(first, ends[:-1]), strict=False)  # without a file there is one part, of nothing
    taken = [(file.name, take) for file, take in parts if take.any()]
    tables = dataset.read_tables([name for name, _ in taken], columns)
    found = [rows if take.all() else rows.filter(pa.array(take)) for rows, (_, take) in zip(tables, taken, strict=True)]
    return pa.concat_tables(found) if found else INDEX_SCHEMA.empty_table().select(columns)


def select(
    dataset: Storage,
    have: Sequence[Stored],
    wanted: pa.ChunkedArray,
    change: Amend | None,
    compression: str | None,
) -> list[tuple[str, int]]:
    """The files (name, rows) that together hold each wanted key once; the others' keys are left out.

    A file that holds more than is wanted of it, or whose rows `change` alters, is written again under a new name.
    Files that serve as they are come first: settings that go back to what they were find the files that they had, and
    the dataset is the same again.
    """
    places = pc.fill_null(pc.index_in(keys_of(have), value_set=wanted), -1).to_numpy()
    ends = np.cumsum([len(file.keys) for file in have], dtype=np.int64)
    mine = np.split(places, ends[:-1]) if have else []
    with ThreadPoolExecutor(TABLE_READERS) as pool:
        serves = list(pool.map(lambda file, at: _serves(dataset, file.name, at, change), have, mine))
    left = np.append(np.ones(len(wanted), bool), False)  # the last is for keys that nobody wants
    chosen, others = [], []
    for file, at, fits in zip(have, mine, serves, strict=True):
        if fits and left[at].all():
            chosen.append((file.name, len(at)))
            left[at] = False
        else:
            others.append((file.name, at))
    parts = []
    for name, at in others:
        take = np.zeros(len(at), bool)
        take[np.unique(at, return_index=True)[1]] = True
        take &= left[at]
        left[at] = False
        if take.any():
            parts.append((name, take, at[take]))
    again = partial(_write_again, dataset=dataset, change=change, compression=compression)
    with ThreadPoolExecutor(REWRITERS) as pool:
        return [*chosen, *pool.map(lambda part: again(*part), parts)]


def _serves(dataset: Storage, name: str, places: np.ndarray, change: Amend | None) -> bool:
    """Whether all that a file holds is wanted, once each, and as it is."""
    if not len(places) or places.min() < 0 or len(np.unique(places)) < len(places):
        return False
    return change is None or change(dataset.read_table(name, AMENDED), places) is None


def _write_again(
    old: str,
    take: np.ndarray,
    places: np.ndarray,
    *,
    dataset: Storage,
    change: Amend | None,
    compression: str | None,
) -> tuple[str, int]:
    """Write the rows of a file that `take` tells, as they should be, under another name; gives (name, rows)."""
    kept = dataset.read_table(old).filter(pa.array(take))
    changed = change(kept, places) if change is not None else None
    table = changed if changed is not None else kept
    content = digest([old, table.column(Column.KEY).to_pylist(), _verdicts(table)])
    name = f"{old.rpartition('/')[0]}/{content}.parquet"
    write_rows(table, dataset, name, compression)
    return name, table.num_rows


def _verdicts(table: pa.Table) -> list[list[Any]]:
    """What `change` may have altered; part of the new file's name, because a name must mean one content."""
    return [table.column(name).to_pylist() for name in AMENDED if name in table.column_names]


def collect_garbage(dataset: Storage, folder: str, current: Iterable[DataFile]) -> int:
    """Delete data files of `folder` that no manifest names, now or before; returns how many."""
    named = {file.name for file in current}
    for manifest in dataset.list("manifests"):
        named.update(dataset.read_table(dataset.read_json(manifest.name)["files"], ["name"]).column(0).to_pylist())
    unnamed = [file.name for file in dataset.list(folder) if file.name not in named]
    for name in unnamed:
        dataset.delete(name)
    return len(unnamed)
