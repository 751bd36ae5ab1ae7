"""Which wanted rows are stored, and in which files: keys are matched on disk, and a row is a number from there on.

A wanted key's number is its place among the wanted ones; a stored row's place counts through all files in the order of
their names. Some ten bytes a row are kept, in files that are mapped to memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preprocess.write import write_rows
from pipelines.runs import Runs, Work, codes_of, parts
from pipelines.schema import ROWS_AT_A_TIME, Column, digest
from pipelines.storage import Storage

NUMBER, PLACE = "number", "place"
KEYED = pa.schema([pa.field(Column.KEY, pa.string()), pa.field(NUMBER, pa.int64())])
REWRITERS = 4  # files that are written again at a time
# What is decided again for rows that are written.
AMENDED = (Column.CAPTION_REASONS, Column.REJECT_REASON, Column.REJECT_DETAIL)

Change = Callable[[pa.Table, np.ndarray], pa.Table]
"""Rows of a file and their places -> the rows with AMENDED as it should be."""


class Amend(Protocol):
    """What is to be changed in stored rows."""

    def differs(self, file: int) -> bool:
        """Whether something is, in a file."""

    def of(self, start: int, stop: int) -> Change:
        """The change of the rows with these places, which is asked for in ascending order."""


@dataclass(frozen=True)
class Wanted:
    """Keys, numbered in their order."""

    runs: Runs
    count: int
    """How many, with those that come again."""


@dataclass(frozen=True)
class Stored:
    """The whole data files below a folder, sorted by name, and what of them is wanted."""

    dataset: Storage
    work: Work
    names: Sequence[str]
    starts: np.ndarray
    """Place of each file's first row, and at last the count of all: int64 [files + 1]."""
    numbers: np.ndarray
    """The number of each row's key among the wanted ones, or -1: int64 [rows]."""
    there: np.ndarray
    """Which numbers are stored, or come again and are no rows of their own: bool [wanted]."""
    distinct: int
    """Wanted keys."""

    def of(self, file: int) -> np.ndarray:
        """The numbers of a file's rows."""
        return self.numbers[self.starts[file] : self.starts[file + 1]]

    @property
    def missing(self) -> int:
        """How many wanted rows are not stored."""
        return len(self.there) - int(np.count_nonzero(self.there))

    def read(self, columns: Sequence[str]) -> Iterator[tuple[range, pa.Table]]:
        """Some files at a time, with columns of their rows."""
        held: list[pa.Table] = []
        first = 0
        for number, rows in enumerate(self.dataset.read_tables(self.names, columns)):
            held.append(rows)
            if self.starts[number + 1] - self.starts[first] >= ROWS_AT_A_TIME or number == len(self.names) - 1:
                yield range(first, number + 1), pa.concat_tables(held)
                held, first = [], number + 1

    def read_wanted(self, columns: Sequence[str], mask: np.ndarray) -> Iterator[pa.Table]:
        """Columns of the stored rows of those wanted keys that `mask` [wanted] has, each key once.

        Files may hold one twice, when a run was killed between two plans; measured again, it is the same row.
        """
        seen, asked = self.work.array(len(self.there), bool), []
        for file, name in enumerate(self.names):
            take = first_ones(self.of(file), seen)
            take[take] = mask[self.of(file)[take]]
            if take.any():
                asked.append((name, take))
        tables = self.dataset.read_tables([name for name, _ in asked], columns)
        for rows, (_, take) in zip(tables, asked, strict=True):
            yield rows.filter(pa.array(take))


def want(keys: Iterable[pa.ChunkedArray], work: Work) -> Wanted:
    """Number keys in the order in which they come."""
    runs, count = work.runs(KEYED), 0
    for some in keys:
        numbers = np.arange(count, count + len(some))
        runs.add(codes_of(some), pa.table([some, pa.array(numbers)], schema=KEYED))
        count += len(some)
    return Wanted(runs, count)


def stored(dataset: Storage, folder: str, wanted: Wanted, work: Work) -> Stored:
    """The data files below `folder`, and which of the wanted keys are in them."""
    names = [file.name for file in dataset.list(folder)]
    have, starts = work.runs(KEYED), [0]
    for keys in _together(dataset.read_tables(names, [Column.KEY]), starts):
        places = np.arange(starts[-1] - len(keys), starts[-1])
        have.add(codes_of(keys), pa.table([keys, pa.array(places)], schema=KEYED))
    numbers, there = work.array(starts[-1], np.int64), work.array(wanted.count, bool)
    distinct = 0
    for ours, theirs in parts(wanted.runs, have):
        known, number = ours.column(Column.KEY), ours.column(NUMBER).to_numpy()
        once = np.unique(pc.index_in(known, value_set=known).to_numpy())
        distinct += len(once)
        again = np.ones(len(number), bool)
        again[once] = False
        there[number[again]] = True
        at = pc.index_in(theirs.column(Column.KEY), value_set=known)
        found = pc.fill_null(ours.column(NUMBER).take(at), -1).to_numpy()
        numbers[theirs.column(NUMBER).to_numpy()] = found
        there[found[found >= 0]] = True
    return Stored(dataset, work, names, np.array(starts), numbers, there, distinct)


def _together(tables: Iterable[pa.Table], starts: list[int]) -> Iterator[pa.ChunkedArray]:
    """The keys of several files at a time; where the files end is added to `starts`."""
    held: list[pa.Array] = []
    count = 0
    for table in tables:
        held += table.column(Column.KEY).chunks
        count += table.num_rows
        starts.append(starts[-1] + table.num_rows)
        if count >= ROWS_AT_A_TIME:
            yield pa.chunked_array(held, pa.string())
            held, count = [], 0
    if count:
        yield pa.chunked_array(held, pa.string())


def first_ones(numbers: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Which of some rows' numbers are wanted, come first among them and were not `seen`, where they are noted."""
    first = np.zeros(len(numbers), bool)
    first[np.unique(numbers, return_index=True)[1]] = True
    first &= numbers >= 0
    first[first] = ~seen[numbers[first]]
    seen[numbers[first]] = True
    return first


def select(
    have: Stored, only: np.ndarray | None, amend: Amend | None, compression: str | None
) -> list[tuple[str, int]]:
    """The files (name, rows) that together hold each wanted key once, or of these `only` some [wanted].

    A file that holds more than is wanted of it, or whose rows `amend` changes, is written again under a new name.
    Files that serve as they are come first: settings that go back to what they were find the files that they had, and
    the dataset is the same again.
    """
    left = have.work.array(len(have.there), bool, fill=True)
    if only is not None:
        left[:] = only
    chosen, others = [], []
    for file, name in enumerate(have.names):
        at = have.of(file)
        fits = len(at) and at.min() >= 0 and left[at].all() and len(np.unique(at)) == len(at)
        if fits and not (amend is not None and amend.differs(file)):
            chosen.append((name, len(at)))
            left[at] = False
        else:
            others.append(file)
    write = partial(_write_again, have.dataset, compression)
    with ThreadPoolExecutor(REWRITERS) as pool:
        waiting: deque[Future[tuple[str, int]]] = deque()
        for file in others:
            take = _leftover(have.of(file), left)
            if not take.any():
                continue
            start = int(have.starts[file])
            change = None if amend is None else amend.of(start, start + len(take))
            waiting.append(pool.submit(write, have.names[file], take, start=start, change=change))
            if len(waiting) > REWRITERS:
                chosen.append(waiting.popleft().result())
        return [*chosen, *(written.result() for written in waiting)]


def _leftover(numbers: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Which of a file's rows are to be had of it; they are not left to others then."""
    take = numbers >= 0
    take[take] = left[numbers[take]]
    once = np.zeros(len(take), bool)
    once[np.unique(np.where(take, numbers, -1), return_index=True)[1]] = True
    take &= once
    left[numbers[take]] = False
    return take


def _write_again(
    dataset: Storage,
    compression: str | None,
    old: str,
    take: np.ndarray,
    *,
    start: int,
    change: Change | None,
) -> tuple[str, int]:
    """Write the rows of a file that `take` tells, as they should be, under another name; gives (name, rows)."""
    table = dataset.read_table(old).filter(pa.array(take))
    if change is not None:
        table = change(table, start + np.flatnonzero(take))
    content = digest([old, table.column(Column.KEY).to_pylist(), _verdicts(table)])
    name = f"{old.rpartition('/')[0]}/{content}.parquet"
    write_rows(table, dataset, name, compression)
    return name, table.num_rows


def _verdicts(table: pa.Table) -> list[list[Any]]:
    """What a change may have altered; part of the new file's name, because a name must mean one content."""
    return [table.column(name).to_pylist() for name in AMENDED if name in table.column_names]
