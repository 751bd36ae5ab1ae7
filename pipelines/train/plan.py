"""Which rows each training step sees: a pure function of (files, seed, step), so that a position is one number.

Each bucket is an endless stream of its rows, one drawn order after another. A step takes the next `global_size` rows
of one bucket's stream; what is left of an order when it is too short for a batch begins the next batch, so nothing is
dropped, and after e epochs a bucket of n rows has given floor(e n / global_size) batches. That closed form is why any
step can be found without replaying those before it, and why the number of workers does not enter.

An order is two-level: files are drawn, and rows are shuffled within a window of files, so that a reader needs one
window at a time. The rows of a batch are sorted by file: workers take slices of a batch, and so read different files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.config import Size
from pipelines.schema import DataFile
from pipelines.train.config import BatchConfig

CACHED_WINDOWS = 16  # shuffled windows kept, over all buckets
CACHED_EPOCHS = 2


@dataclass(frozen=True)
class PlannedBatch:
    """The rows of one step."""

    bucket: Size
    """(height, width) of all its images in pixels."""
    rows: np.ndarray
    """int64 [global_size, 2]: number of the file in the plan's list, and number of the row in the file."""


class Plan:
    """The endless sequence of steps over a dataset's files."""

    def __init__(self, files: Sequence[DataFile], batch: BatchConfig) -> None:
        """`files` in the manifest's order. Raises ValueError where there is no row."""
        self.batch = batch
        self._sizes = np.array([file.rows for file in files], np.int64)
        members: dict[Size, list[int]] = {}
        for number, file in enumerate(files):
            if file.bucket is None:
                raise ValueError(f"{file.name} has no bucket")
            members.setdefault(file.bucket, []).append(number)
        self._buckets = sorted(members)
        self._members = [np.array(members[bucket], np.int64) for bucket in self._buckets]
        self._rows = np.array([self._sizes[numbers].sum() for numbers in self._members], np.int64)
        self.total_rows = int(self._rows.sum())
        if self.total_rows == 0:
            raise ValueError("the dataset has no rows to train on")
        self._labels = lru_cache(CACHED_EPOCHS)(self._epoch_labels)
        self._window = lru_cache(CACHED_WINDOWS)(self._shuffled_window)
        self._order = lru_cache(CACHED_WINDOWS)(self._file_order)

    def step(self, number: int) -> PlannedBatch:
        """The batch of step `number`, counted from 0."""
        epoch = self.epoch_of(number)
        labels = self._labels(epoch)
        place = number - self.steps_before(epoch)
        label = int(labels[place])
        batch = self._batches_before(label, epoch) + int(np.count_nonzero(labels[:place] == label))
        start = batch * self.batch.global_size
        rows = self._stream(label, start, start + self.batch.global_size)
        return PlannedBatch(self._buckets[label], rows[np.lexsort((rows[:, 1], rows[:, 0]))])

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to: once around the dataset each, remainders carried over."""
        low, high = 0, (step + len(self._buckets) + 1) * self.batch.global_size // self.total_rows + 1
        while low < high:  # the last epoch whose first step is not behind `step`
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle - 1)
        return low

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before `epoch`."""
        return int((epoch * self._rows // self.batch.global_size).sum())

    def _batches_before(self, label: int, epoch: int) -> int:
        return epoch * int(self._rows[label]) // self.batch.global_size

    def _epoch_labels(self, epoch: int) -> np.ndarray:
        """The bucket of each step of an epoch, in a drawn order."""
        counts = [
            self._batches_before(label, epoch + 1) - self._batches_before(label, epoch)
            for label in range(len(self._buckets))
        ]
        return self._draws("steps", epoch).permutation(np.repeat(np.arange(len(counts)), counts))

    def _stream(self, label: int, start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, 2] of a bucket's endless stream."""
        parts = []
        while start < stop:
            epoch, offset = divmod(start, int(self._rows[label]))
            _, ends = self._order(label, epoch)
            window = int(np.searchsorted(ends, offset, side="right"))
            first = int(ends[window - 1]) if window else 0
            rows = self._window(label, epoch, window)[offset - first : offset - first + stop - start]
            parts.append(rows)
            start += len(rows)
        return np.concatenate(parts)

    def _file_order(self, label: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The bucket's files in the epoch's order, and the row count at the end of each of its windows."""
        order = self._draws("files", label, epoch).permutation(self._members[label])
        ends = np.cumsum(self._sizes[order])
        window = (ends - 1) // self.batch.shuffle_rows  # files belong to the window that their last row lies in
        last = np.flatnonzero(np.append(window[1:] != window[:-1], True))
        return order, ends[last]

    def _shuffled_window(self, label: int, epoch: int, window: int) -> np.ndarray:
        order, ends = self._order(label, epoch)
        all_ends = np.cumsum(self._sizes[order])
        first = int(np.searchsorted(all_ends, ends[window - 1], side="right")) if window else 0
        last = int(np.searchsorted(all_ends, ends[window], side="right"))
        rows = [
            np.stack([np.full(self._sizes[file], file), np.arange(self._sizes[file])], axis=1)
            for file in order[first:last]
        ]
        return self._draws("rows", label, epoch, window).permutation(np.concatenate(rows))

    def _draws(self, purpose: str, *numbers: int) -> np.random.Generator:
        words = [self.batch.seed, int.from_bytes(purpose.encode()), *numbers]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))
