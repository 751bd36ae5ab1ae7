"""Rows that training never sees, and what the averaged weights make of them: the validation curves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from pipelines.config import Size
from pipelines.heldout import is_held_out
from pipelines.schema import Column, DataFile, Manifest, data_files
from pipelines.storage import Storage
from pipelines.train.batches import REMOTE_READERS, Batch, Reader
from pipelines.train.config import BatchConfig, ScheduleConfig
from pipelines.train.listed import listed_ids
from pipelines.train.meter import Means
from pipelines.train.tasks import Task

HELD_OUT = "validation.parquet"  # in the run's folder: file and row of each held-out row, and its image's id


def hold_out(output: Storage, dataset: Storage, manifest: Manifest, share: float) -> int:
    """Write the run's list of held-out rows; gives their number. Raises ValueError where they are none, or all.

    Of an index they are rows of the run's list of images, which is there before.
    """
    names, rows, ids = [], [], []
    for file, image_ids in _images(output, dataset, manifest):
        for row, image_id in enumerate(image_ids):
            if is_held_out(image_id, share):
                names.append(file)
                rows.append(row)
                ids.append(image_id)
    total = manifest.rows if manifest.kind == "latents" else manifest.counts.get("kept", 0)
    if not 0 < len(ids) < total:
        raise ValueError(f"batch.validation_share: {share} holds out {len(ids)} of the {total} rows of {dataset.uri}")
    output.write_table(HELD_OUT, pa.table({"file": names, "row": pa.array(rows, pa.int64()), Column.ID: ids}))
    return len(ids)


def hide(
    task: Task, output: Storage, batch: BatchConfig, schedule: ScheduleConfig, *, rank: int = 0, world: int = 1
) -> Validation | None:
    """Take the run's held-out rows from the task's reader; gives what measures on them, None where it has none."""
    if not batch.validation_share:
        return None
    table = output.read_table(HELD_OUT)
    numbers = {file.name: number for number, file in enumerate(task.reader.files)}
    rows = np.stack([[numbers[name] for name in table.column("file").to_pylist()], table.column("row").to_numpy()], 1)
    order = np.argsort(table.column(Column.ID).to_numpy(zero_copy_only=False), kind="stable")  # ids are hashes
    validation = Validation(task.reader, rows[order[: schedule.validation_rows]], batch, rank, world)
    task.reader = TrainingRows(task.reader, rows)
    return validation


class TrainingRows:
    """A reader without some of its rows, whose files and rows are numbered anew."""

    def __init__(self, reader: Reader, hidden: np.ndarray) -> None:
        """`hidden` is int [N,2]: number of the file, and number of the row in the file."""
        self._reader = reader
        self._jumps: dict[int, np.ndarray] = {}
        order = hidden[np.lexsort((hidden[:, 1], hidden[:, 0]))]
        files, starts = np.unique(order[:, 0], return_index=True)
        for file, rows in zip(files.tolist(), np.split(order[:, 1], starts[1:]), strict=True):
            # The k-th row that is left lies behind as many hidden ones as have k or fewer left before them.
            self._jumps[file] = rows - np.arange(len(rows))
        left = [file.rows - len(self._jumps.get(number, ())) for number, file in enumerate(reader.files)]
        self._numbers = np.flatnonzero(left)
        self.files = [replace(reader.files[n], rows=left[n]) for n in self._numbers.tolist()]

    def read(self, rows: np.ndarray, bucket: Size, first: int) -> Batch:
        """The batch of rows [B,2] (file, row), as numbered here."""
        return self._reader.read(self._there(rows), bucket, first)

    def names(self, rows: np.ndarray) -> list[str]:
        """What a person finds rows [B,2] by."""
        return self._reader.names(self._there(rows))

    def _there(self, rows: np.ndarray) -> np.ndarray:
        """Rows [B,2] as the reader numbers them."""
        there = np.stack([self._numbers[rows[:, 0]], rows[:, 1]], axis=1)
        for place, (file, row) in enumerate(there.tolist()):
            if file in self._jumps:
                there[place, 1] = row + np.searchsorted(self._jumps[file], row, side="right")
        return there


class Validation:
    """Measures on held-out rows: the same ones, at the same draws, at every point of a run."""

    def __init__(self, reader: Reader, rows: np.ndarray, batch: BatchConfig, rank: int, world: int) -> None:
        self._reader = reader
        buckets: dict[Size, list[np.ndarray]] = {}
        for row in rows:
            bucket = reader.files[row[0]].bucket
            assert bucket is not None
            buckets.setdefault(bucket, []).append(row)
        self._batches: list[tuple[np.ndarray, Size, int]] = []
        first = 0  # a row's number, and with it its draws, is its place among all rows by bucket
        for bucket in sorted(buckets):
            members = np.stack(buckets[bucket])
            for start in range(0, len(members), batch.micro_size):
                part = members[start : start + batch.micro_size]
                self._batches.append((part, bucket, first))
                first += len(part)
        self._rank, self._world = rank, world

    def measure(self, task: Task, network: nn.Module) -> dict[str, float]:
        """The validation curves' next point. All workers call it together, and each reads its share of the rows."""
        means = Means()
        for counts, (rows, bucket, first) in self._share():
            measured = task.validate(network, self._reader.read(rows, bucket, first))
            for name, values in measured.items():
                means.add(name, values, torch.full_like(values, counts, dtype=torch.bool))
        return means.read()

    def _share(self) -> Iterator[tuple[bool, tuple[np.ndarray, Size, int]]]:
        """(whether it counts, batch): every worker runs as often, for under ZeRO 3 they run the network together."""
        for start in range(0, len(self._batches), self._world):
            mine = start + self._rank
            counts = mine < len(self._batches)
            yield counts, self._batches[mine if counts else 0]


def _images(output: Storage, dataset: Storage, manifest: Manifest) -> Iterator[tuple[str, Sequence[str]]]:
    """(file, ids of its rows' images) of each file that a task's reader has, in its order."""
    if manifest.kind == "index":
        yield from listed_ids(output)
        return
    files = data_files(dataset, manifest)

    def ids(file: DataFile) -> tuple[str, Sequence[str]]:
        return file.name, dataset.read_table(file.name, [Column.ID]).column(Column.ID).to_pylist()

    with ThreadPoolExecutor(1 if dataset.is_local else REMOTE_READERS) as pool:
        yield from pool.map(ids, files)
