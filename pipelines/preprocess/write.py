"""Turn finished rows into a dataset: units that are written whole, and one commit that makes them count.

A run cuts its missing rows into units. Each unit becomes one Parquet file, written by whichever task gets there, and
a file that exists is whole. A run that is killed leaves finished units behind; the next run finds them by the keys
inside, does what is missing, and commits. The commit sees to it that each wanted key counts exactly once, whatever
files there are, and makes manifest.json last. Files that no manifest ever named are deleted after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import Column, DataFile, digest
from pipelines.storage import Storage

UNIT, UNIT_ROWS = "unit", "unit_rows"  # columns that travel with rows until they are written
UNIT_SECONDS = "unit_seconds_"  # and these: a row's share of what each stage took, by the stage's name
UNIT_COUNT = "unit_count_"  # and these: numbers whose sums over all rows are of interest, by name
FAILURE = "failure"  # column of rows on their way: why a row could not be made, or null
PAGE_BYTES = 2**30  # more than any column holds


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


def cut_all(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """As `cut`, of rows that come table by table."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        whole = held.num_rows - held.num_rows % size
        yield from cut(held.slice(0, whole), size)
        held = held.slice(whole)
    if held is not None:
        yield from cut(held, size)


def collect_garbage(dataset: Storage, folder: str, current: Iterable[DataFile]) -> int:
    """Delete data files of `folder` that no manifest names, now or before; returns how many."""
    named = {file.name for file in current}
    for manifest in dataset.list("manifests"):
        named.update(dataset.read_table(dataset.read_json(manifest.name)["files"], ["name"]).column(0).to_pylist())
    unnamed = [file.name for file in dataset.list(folder) if file.name not in named]
    for name in unnamed:
        dataset.delete(name)
    return len(unnamed)
