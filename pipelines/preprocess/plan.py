"""Units on their way to the tasks that make them: beside the dataset, so that neither driver nor Ray holds them all.

A plan is a folder of files with some units each, as Arrow streams one behind the other, for as long as the run lasts.
What goes through Ray's driver is a ticket for each unit, and of so many units at a time. A plan is of one run and one
lease: what a killed run leaves of one is removed by the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import pyarrow as pa

from pipelines.lease import Lease
from pipelines.schema import ROWS_AT_A_TIME
from pipelines.storage import Storage

PLANS = "plan"  # folder of the dataset
TICKETS = 65_536  # units that Ray knows of at a time
FILE, OFFSET, LENGTH = "file", "offset", "length"  # columns of a ticket


@dataclass
class Plan:
    """The units of a run."""

    folder: str
    """Where they are, below the dataset's folder."""
    lengths: list[np.ndarray] = field(default_factory=list)
    """Of each file the bytes of its units."""
    rows: int = 0

    def name(self, number: int) -> str:
        """Name of a file."""
        return f"{self.folder}/{number:06}"

    def waves(self) -> Iterator[list[pa.Table]]:
        """The tickets of all units, a table each, so many at a time."""
        tickets = (
            pa.table({FILE: [self.name(number)], OFFSET: [end - length], LENGTH: [length]})
            for number, lengths in enumerate(self.lengths)
            for end, length in zip(np.cumsum(lengths).tolist(), lengths.tolist(), strict=True)
        )
        while wave := list(islice(tickets, TICKETS)):
            yield wave


@contextmanager
def planned(units: Iterable[pa.Table], held: Lease) -> Iterator[Plan]:
    """A plan of the units, which is removed when the block ends."""
    plan = Plan(f"{PLANS}/{held.claim.owner}")
    try:
        for some in _together(units):
            packed = [_packed(unit) for unit in some]
            held.dataset.write(plan.name(len(plan.lengths)), b"".join(packed))
            plan.lengths.append(np.array([len(data) for data in packed]))
            plan.rows += sum(unit.num_rows for unit in some)
        yield plan
    finally:
        with suppress(OSError):  # the next run's owner may have removed it, where this one has lost its lease
            held.dataset.delete_folder(plan.folder)


def _packed(unit: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, unit.schema) as writer:
        writer.write_table(unit)
    return sink.getvalue()


def _together(units: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Units of ROWS_AT_A_TIME rows, or few more."""
    held: list[pa.Table] = []
    rows = 0
    for unit in units:
        held.append(unit)
        rows += unit.num_rows
        if rows >= ROWS_AT_A_TIME:
            yield held
            held, rows = [], 0
    if held:
        yield held


def remove_plans(dataset: Storage) -> None:
    """Remove what a run that was killed left of its plan. Only who holds the lease may."""
    for folder in dataset.folders(PLANS):
        with suppress(FileNotFoundError):  # its owner ends at this moment
            dataset.delete_folder(folder)


def read_units(tickets: pa.Table, dataset: Storage) -> pa.Table:
    """The units that a task has tickets of."""
    units = []
    for ticket in tickets.to_pylist():
        data = bytearray(ticket[LENGTH])
        dataset.open(ticket[FILE]).read_into(memoryview(data), ticket[OFFSET])
        with pa.ipc.open_stream(pa.py_buffer(data)) as reader:
            units.append(reader.read_all())
    return pa.concat_tables(units)
