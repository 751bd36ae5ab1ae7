"""Which rows each training step sees: a pure function of (files, seed, step), so that a position is one number.

Each bucket is an endless stream of its rows, one drawn order after another. A step takes the next `global_size` rows
of one bucket's stream; what is left of an order when it is too short for a batch begins the next batch, so nothing is
dropped, and after e epochs a bucket of n rows has given floor(e n / global_size) batches. That closed form is why any
step can be found without replaying those before it, and why the number of workers does not enter.

An order is two-level: files are drawn, and rows are shuffled within a window of files, so that a reader needs one
window at a time. The rows of a batch are sorted by file: workers take slices of a batch, and so read different files.

Files of several weights make several streams in a bucket: in epoch e one of n rows and weight w gives its rows number
floor(e w n) to floor((e + 1) w n), and a drawn order mixes them. So each row of it has been seen floor(e w) or
ceil(e w) times after e epochs, and with one weight of 1 all is as above.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from pipelines.config import Size
from pipelines.schema import DataFile
from pipelines.train.config import BatchConfig

CACHED_WINDOWS = 16  # shuffled windows kept, over all buckets
CACHED_EPOCHS = 2
WHOLE = 1_000_000  # a weight of 1


@dataclass(frozen=True)
class PlannedBatch:
    """The rows of one step."""

    bucket: Size
    """(height, width) of all its images in pixels."""
    rows: np.ndarray
    """int64 [global_size, 2]: number of the file in the plan's list, and number of the row in the file."""


@dataclass(frozen=True)
class _Stream:
    """Files of one bucket and one weight."""

    files: np.ndarray
    """int64 [N]: numbers of the files."""
    rows: int
    """Rows in all of them."""
    weight: int
    """How often each is seen in an epoch, times WHOLE: a whole number, so that positions are exact."""

    def before(self, epoch: int) -> int:
        """Rows that it has given before an epoch."""
        return epoch * self.rows * self.weight // WHOLE


@dataclass(frozen=True)
class Pass:
    """What one worker takes of a step at a time."""

    start: int
    """Its first row, among those of the step."""
    stop: int
    """One past its last."""
    weight: float
    """Its share of the step times passes and workers, over all of which a mean is taken: 1 where all take as many."""


def cut_step(batch: BatchConfig, rank: int, world: int) -> list[Pass]:
    """A worker's passes over one step, at most batch.micro_size rows each, the same number on every worker.

    Shares of workers, and the passes of each, differ by a row at most. A worker that is a row short of its passes runs
    its last row once more, for nothing: all run as often, because they sum gradients together.
    """
    most = -(-batch.global_size // world)
    passes = -(-most // batch.micro_size)
    edges = [batch.global_size * number // world for number in (rank, rank + 1)]
    share = edges[1] - edges[0]
    cuts = [edges[0] + share * number // passes for number in range(passes + 1)]
    return [
        Pass(start, stop, (stop - start) * passes * world / batch.global_size)
        if start < stop
        else Pass(edges[1] - 1, edges[1], 0.0)
        for start, stop in pairwise(cuts)
    ]


class Plan:
    """The endless sequence of steps over a dataset's files."""

    def __init__(self, files: Sequence[DataFile], batch: BatchConfig) -> None:
        """`files` in the manifest's order. Raises ValueError where there is no row."""
        self.batch = batch
        self._sizes = np.array([file.rows for file in files], np.int64)
        members: dict[Size, dict[int, list[int]]] = {}
        for number, file in enumerate(files):
            if file.bucket is None:
                raise ValueError(f"{file.name} has no bucket")
            weight = round(file.weight * WHOLE)
            members.setdefault(file.bucket, {}).setdefault(weight, []).append(number)
        self._buckets = sorted(members)
        self._streams = [
            [self._stream_of(weight, weights[weight]) for weight in sorted(weights)]
            for weights in (members[bucket] for bucket in self._buckets)
        ]
        self.total_rows = int(self._sizes.sum())
        if not any(stream.rows * stream.weight for streams in self._streams for stream in streams):
            raise ValueError("the dataset has no rows to train on")
        self._labels = lru_cache(CACHED_EPOCHS)(self._epoch_labels)
        self._mixture = lru_cache(CACHED_WINDOWS)(self._epoch_mixture)
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
        rows = self._rows(label, start, start + self.batch.global_size)
        return PlannedBatch(self._buckets[label], rows[np.lexsort((rows[:, 1], rows[:, 0]))])

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to: once around the dataset each, remainders carried over."""
        return _last(self.steps_before, step)

    def steps_before(self, epoch: int) -> int:
        """Steps of all epochs before `epoch`."""
        return sum(self._batches_before(label, epoch) for label in range(len(self._buckets)))

    def _batches_before(self, label: int, epoch: int) -> int:
        return self._rows_before(label, epoch) // self.batch.global_size

    def _rows_before(self, label: int, epoch: int) -> int:
        return sum(stream.before(epoch) for stream in self._streams[label])

    def _stream_of(self, weight: int, numbers: list[int]) -> _Stream:
        return _Stream(np.array(numbers, np.int64), int(self._sizes[numbers].sum()), weight)

    def _epoch_labels(self, epoch: int) -> np.ndarray:
        """The bucket of each step of an epoch, in a drawn order."""
        counts = [
            self._batches_before(label, epoch + 1) - self._batches_before(label, epoch)
            for label in range(len(self._buckets))
        ]
        return self._draws("steps", epoch).permutation(np.repeat(np.arange(len(counts)), counts))

    def _rows(self, label: int, start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, 2] of all that a bucket gives, one epoch after another."""
        parts = []
        while start < stop:
            epoch = _last(lambda epoch: self._rows_before(label, epoch), start)
            first, end = (self._rows_before(label, number) for number in (epoch, epoch + 1))
            parts.append(self._epoch_rows(label, epoch, start - first, min(stop, end) - first))
            start = min(stop, end)
        return np.concatenate(parts)

    def _epoch_rows(self, label: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of those that a bucket gives in an epoch."""
        streams = self._streams[label]
        if len(streams) == 1:
            before = streams[0].before(epoch)
            return self._stream_rows(label, 0, before + start, before + stop)
        mixture = self._mixture(label, epoch)
        chosen = mixture[start:stop]
        rows = np.empty((stop - start, 2), np.int64)
        for number in np.unique(chosen).tolist():
            first = streams[number].before(epoch) + int(np.count_nonzero(mixture[:start] == number))
            mine = chosen == number
            rows[mine] = self._stream_rows(label, number, first, first + int(np.count_nonzero(mine)))
        return rows

    def _epoch_mixture(self, label: int, epoch: int) -> np.ndarray:
        """The stream of each row that a bucket gives in an epoch, in a drawn order."""
        counts = [stream.before(epoch + 1) - stream.before(epoch) for stream in self._streams[label]]
        return self._draws("mixture", label, epoch).permutation(
            np.repeat(np.arange(len(counts), dtype=np.int16), counts)
        )

    def _stream_rows(self, label: int, number: int, start: int, stop: int) -> np.ndarray:
        """Rows [stop - start, 2] of an endless stream, which goes around its files again and again."""
        parts = []
        while start < stop:
            turn, offset = divmod(start, self._streams[label][number].rows)
            _, ends = self._order(label, number, turn)
            window = int(np.searchsorted(ends, offset, side="right"))
            first = int(ends[window - 1]) if window else 0
            rows = self._window(label, number, turn, window)[offset - first : offset - first + stop - start]
            parts.append(rows)
            start += len(rows)
        return np.concatenate(parts)

    def _file_order(self, label: int, number: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
        """A stream's files in the turn's order, and the row count at the end of each of its windows."""
        order = self._draws(_named("files", number), label, turn).permutation(self._streams[label][number].files)
        ends = np.cumsum(self._sizes[order])
        window = (ends - 1) // self.batch.shuffle_rows  # files belong to the window that their last row lies in
        last = np.flatnonzero(np.append(window[1:] != window[:-1], True))
        return order, ends[last]

    def _shuffled_window(self, label: int, number: int, turn: int, window: int) -> np.ndarray:
        order, ends = self._order(label, number, turn)
        all_ends = np.cumsum(self._sizes[order])
        first = int(np.searchsorted(all_ends, ends[window - 1], side="right")) if window else 0
        last = int(np.searchsorted(all_ends, ends[window], side="right"))
        rows = [
            np.stack([np.full(self._sizes[file], file), np.arange(self._sizes[file])], axis=1)
            for file in order[first:last]
        ]
        return self._draws(_named("rows", number), label, turn, window).permutation(np.concatenate(rows))

    def _draws(self, purpose: str, *numbers: int) -> np.random.Generator:
        words = [self.batch.seed, int.from_bytes(purpose.encode()), *numbers]
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def _named(purpose: str, stream: int) -> str:
    return f"{purpose} of {stream}" if stream else purpose


def _last(before: Callable[[int], int], value: int) -> int:
    """The last number, from 0 up, for which `before`, which never falls and grows without end, is not above `value`."""
    low, high = 0, 1
    while before(high) <= value:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if before(middle) <= value else (low, middle)
    return low
