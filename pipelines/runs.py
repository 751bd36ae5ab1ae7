"""More rows than memory holds: they go to disk in sorted runs, and come back part by part, in order.

Each row has a code, a number: rows that have to meet (of one key, of one content) have equal codes, and parts come in
the order of codes. So a join, a search for equals and a sort each look at one part after another, as they would look at
all rows in memory (the GRACE hash join, Kitsuregawa et al. 1983; external sorting, Knuth 5.4). docs/decisions/0041 has
the reasons.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import DriverConfig
from pipelines.storage import naming_full_disk

CODE = "code"  # column of the rows that come back
SHARES = 16  # a run and a part take so much of the memory that is allowed: several are held, and copied, at a time
SAMPLED = 256  # one of so many codes says where parts may end
CODE_BYTES = 8
SAMPLES = 64  # of each run, by which texts are cut into parts
KEY_BITS = np.uint64(44)  # of a code, for the beginning of a key within a group; the rest is the group's number


class Work:
    """Where rows go that do not fit memory. Its files have no names once they are written: they go with the process."""

    def __init__(self, config: DriverConfig) -> None:
        """Raises FileNotFoundError where the settings name a folder that is not there."""
        self.folder, self.piece_bytes = config.folder or _folder_on_disk(), config.memory_mib * 2**20 // SHARES
        if not os.path.isdir(self.folder):
            raise FileNotFoundError(f"driver.folder: there is no folder {self.folder}; make it, or name another")

    def runs(self, schema: pa.Schema) -> Runs:
        """Runs of rows of this schema, without any yet."""
        return Runs(self, schema)

    def array(self, count: int, dtype: Any, fill: Any = 0) -> np.ndarray:
        """`count` numbers in a file that is mapped to memory, all of them `fill`."""
        size = count * np.dtype(dtype).itemsize
        if not size:
            return np.empty(0, dtype)
        with self._file() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a hole that finds no room later would end the process
            values = np.frombuffer(mmap.mmap(file.fileno(), size), dtype)
        if fill:
            values[:] = fill
        return values

    def keep(self, rows: pa.Table) -> pa.Table:
        """The rows, in a file that is mapped to memory."""
        with self._file() as file:
            with pa.ipc.new_file(file, rows.schema) as writer:
                writer.write_table(rows)
            file.flush()
            with pa.memory_map(f"/proc/self/fd/{file.fileno()}") as mapped:
                return pa.ipc.open_file(mapped).read_all()

    @contextmanager
    def _file(self) -> Iterator[IO[bytes]]:
        """A file without a name."""
        try:
            with naming_full_disk(f"{self.folder}/rows"), tempfile.TemporaryFile(dir=self.folder) as file:
                yield file
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                message = f"{error.strerror}; rows on their way fill driver.folder"
                raise OSError(error.errno, message, self.folder) from error
            raise


def give_memory_back() -> None:
    """Let Arrow take its memory in this process from the system's allocator, to which all that is freed goes back at
    once: Arrow's own keeps more of it the longer a process runs."""
    pa.set_memory_pool(pa.system_memory_pool())


def _folder_on_disk() -> str:
    """The system's folder for temporary files, or /var/tmp where that one is in memory."""
    folder = os.path.realpath(tempfile.gettempdir())
    mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    while folder not in mounts and folder != "/":
        folder = os.path.dirname(folder)
    return "/var/tmp" if mounts.get(folder) in ("tmpfs", "ramfs") else tempfile.gettempdir()


class Runs:
    """Rows that are added in any order and read by `parts`, as often as one likes."""

    def __init__(self, work: Work, schema: pa.Schema) -> None:
        self.schema, self.rows, self._work = schema.append(pa.field(CODE, pa.uint64())), 0, work
        self._waiting: list[pa.Table] = []
        self._waiting_bytes = 0
        self._sorted: list[pa.Table] = []

    def add(self, codes: np.ndarray, rows: pa.Table) -> None:
        """Add rows with their codes, uint64 [N]."""
        coded = rows.append_column(CODE, pa.array(codes, pa.uint64())).cast(self.schema)
        self.rows += coded.num_rows
        self._waiting.append(coded)
        self._waiting_bytes += coded.nbytes
        if self._waiting_bytes >= self._work.piece_bytes:
            self._sorted.append(self._work.keep(self._sort()))

    def sorted(self) -> list[pa.Table]:
        """The runs, each in the order of its codes, and of equal ones as they were added."""
        if self._waiting:
            run = self._sort()
            self._sorted.append(self._work.keep(run) if self._sorted else run)
        return self._sorted

    @property
    def part_bytes(self) -> int:
        """How large a part should be."""
        return self._work.piece_bytes

    def _sort(self) -> pa.Table:
        rows = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._waiting_bytes = [], 0
        order = np.argsort(rows.column(CODE).to_numpy(), kind="stable")
        return rows.take(pa.array(order)).combine_chunks()


def parts(*several: Runs) -> Iterator[tuple[pa.Table, ...]]:
    """All rows, of each of `several` those with codes of one range at a time; ranges ascend.

    In a part, rows of equal codes are as they were added. At least one part is given.
    """
    runs = [one.sorted() for one in several]
    codes = [[run.column(CODE).to_numpy() for run in of_one] for of_one in runs]
    begun = [[0] * len(of_one) for of_one in runs]
    for end in [*_ends(several, [found for of_one in codes for found in of_one]), None]:
        found = []
        for number, one in enumerate(several):
            stops = [len(c) if end is None else int(np.searchsorted(c, np.uint64(end))) for c in codes[number]]
            slices = [
                run.slice(start, stop - start)
                for run, start, stop in zip(runs[number], begun[number], stops, strict=True)
                if stop > start
            ]
            begun[number] = stops
            found.append(pa.concat_tables(slices).combine_chunks() if slices else one.schema.empty_table())
        yield tuple(found)


def _ends(several: Sequence[Runs], codes: Sequence[np.ndarray]) -> Iterable[int]:
    """Codes below which a part ends, so that its rows are as many as fit."""
    size = sum(run.nbytes for one in several for run in one.sorted())
    count = -(-size // several[0].part_bytes)
    if count < 2:
        return []
    samples = np.sort(np.concatenate([found[::SAMPLED] for found in codes]))
    return np.unique(samples[len(samples) // count :: max(1, len(samples) // count)]).tolist() if len(samples) else []


class InOrder:
    """The rows of runs in the order of their codes, as one goes along them."""

    def __init__(self, runs: Runs) -> None:
        self._parts = (part for (part,) in parts(runs))
        self._held, self._over = runs.schema.empty_table(), False

    def skip(self, code: int) -> None:
        """Leave out the rows of codes below `code`."""
        while not self._over and (not self._held.num_rows or self._held.column(CODE)[-1].as_py() < code):
            self._held = self._next()
        self._held = self._held.slice(self._below(code))

    def upto(self, code: int) -> pa.Table:
        """The rows of codes below `code` that were not given yet, in order."""
        while not self._over and (not self._held.num_rows or self._held.column(CODE)[-1].as_py() < code):
            self._held = pa.concat_tables([self._held, self._next()]).combine_chunks()
        stop = self._below(code)
        given, self._held = self._held.slice(0, stop), self._held.slice(stop)
        return given

    def _below(self, code: int) -> int:
        return int(np.searchsorted(self._held.column(CODE).to_numpy(), np.uint64(code)))

    def _next(self) -> pa.Table:
        """The next part, in order."""
        part = next(self._parts, None)
        if part is None:
            self._over = True
            return self._held.slice(0, 0)
        return part.take(pc.sort_indices(part, sort_keys=[(CODE, "ascending")])).combine_chunks()


def in_order_of(column: str, tables: Iterable[pa.Table], work: Work) -> Iterator[pa.Table]:
    """The rows of tables in the order of a column of texts, byte by byte, a part at a time."""
    runs = [work.keep(_sorted(some, column)) for some in _pieces(tables, work.piece_bytes)]
    texts = [run.column(column).chunk(0) for run in runs]
    steps = (range(0, len(some), -(-len(some) // SAMPLES)) for some in texts)
    samples = sorted(some[place].as_py() for some, step in zip(texts, steps, strict=True) for place in step)
    count = -(-sum(run.nbytes for run in runs) // work.piece_bytes)
    begun = [0] * len(runs)
    for end in [*sorted({samples[len(samples) * part // count] for part in range(1, count)}), None]:
        stops = [
            len(some) if end is None else bisect_left(range(len(some)), end, key=lambda place: some[place].as_py())
            for some in texts
        ]
        slices = [run.slice(start, stop - start) for run, start, stop in zip(runs, begun, stops, strict=True)]
        begun = stops
        if any(some.num_rows for some in slices):
            yield _sorted(slices, column)


def _pieces(tables: Iterable[pa.Table], size: int) -> Iterator[list[pa.Table]]:
    """Tables that together have so many bytes, or few more."""
    held: list[pa.Table] = []
    held_bytes = 0
    for table in tables:
        if table.num_rows:
            held.append(table)
            held_bytes += table.nbytes
        if held_bytes >= size:
            yield held
            held, held_bytes = [], 0
    if held:
        yield held


def _sorted(tables: Sequence[pa.Table], column: str) -> pa.Table:
    rows = pa.concat_tables(tables).combine_chunks()
    return rows.take(pc.sort_indices(rows, sort_keys=[(column, "ascending")])).combine_chunks()


def codes_of(texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The first bytes of each text as a number, uint64 [N]: in the order of texts. Null is as no text."""
    column = pc.fill_null(texts, "")
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string())
    _, offsets, data = column.buffers()
    codes = np.zeros(len(column), np.uint64)
    if not len(column) or data is None:
        return codes
    ends = np.frombuffer(offsets, np.int32, len(column) + 1, 4 * column.offset)
    values = np.frombuffer(data, np.uint8)
    starts, lengths = ends[:-1], np.diff(ends)
    for place in range(CODE_BYTES):
        there = lengths > place
        codes[there] |= values[starts[there] + place].astype(np.uint64) << np.uint64(8 * (CODE_BYTES - 1 - place))
    return codes


def codes_within(groups: np.ndarray, texts: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Codes in the order of groups, numbers [N] below 2^20, and within one in that of the texts: uint64 [N]."""
    return groups.astype(np.uint64) << KEY_BITS | codes_of(texts) >> (np.uint64(64) - KEY_BITS)
