"""Rows to tensors: the part of each planned batch that one worker trains on, read ahead of the training step."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.config import Conditioning
from model.diffusion import generator
from pipelines.config import CropConfig, Size
from pipelines.heldout import is_held_out
from pipelines.images import content_id, read_crop
from pipelines.latents import LatentFile
from pipelines.originals import Originals
from pipelines.ranges import RangeReader
from pipelines.schema import Column, DataFile, Manifest, data_files
from pipelines.storage import Storage
from pipelines.train.listed import ListedImages
from pipelines.train.lost import NEIGHBOURS, LostImage, LostImages
from pipelines.train.plan import Plan, PlannedBatch, cut_step

PREFETCHED_STEPS, STEPS_AT_A_TIME = 2, 2  # a step's last files are waited for while the next one's are read
OPEN_FILES, KNOWN_FILES = 256, 4096  # latents files that each worker holds open, and knows the layout of
REMOTE_READERS = 32  # parts of latents files that are fetched at a time; a disk's are read one after the other
DECODERS = 4  # images decoded at a time; they are fetched as parts of latents files are


@dataclass(frozen=True)
class LatentBatch:
    """Rows of a latents dataset, of one bucket."""

    first: int
    """Number of its first image in the run, over all workers."""
    bucket: Size
    """(height, width) in pixels."""
    mean: Tensor  # [B,4,h,w] unscaled, fp16 as stored
    std: Tensor  # [B,4,h,w]
    context: Tensor  # [B,77,D]
    pooled: Tensor  # [B,P]
    conditions: dict[Conditioning, Tensor]  # [B,2] each, aesthetic_score [B,1]
    tokens: Tensor | None = None  # int64 [B,2,77] of CLIP-L and bigG, of a dataset without context and pooled [B,0]

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.mean)


@dataclass(frozen=True)
class ImageBatch:
    """Cropped images of one bucket."""

    first: int
    """Number of its first image in the run, over all workers."""
    bucket: Size
    """(height, width) in pixels."""
    image: Tensor  # [B,3,H,W] in [-1, 1]

    @property
    def count(self) -> int:
        """Images."""
        return len(self.image)


Batch = LatentBatch | ImageBatch


class Reader(Protocol):
    """What turns planned rows into a batch."""

    files: list[DataFile]
    """The files that the plan is made over."""

    def read(self, rows: np.ndarray, bucket: Size, first: int) -> Batch:
        """The batch of rows [B, 2] (file, row), whose first image is number `first` of the run."""
        ...

    def names(self, rows: np.ndarray) -> list[str]:
        """What the dataset calls rows [B, 2]."""
        ...


@dataclass
class Slices:
    """A worker's part of each step, as an endless iterator of lists of micro-batches and their weights in the step's
    mean, read ahead by a thread."""

    reader: Reader
    plan: Plan
    rank: int
    world: int
    step: int
    """The step to begin with."""
    waited_seconds: float = field(default=0.0, init=False)
    """Time that the training step has waited for data."""

    def __iter__(self) -> Iterator[list[tuple[Batch, float]]]:
        ready: queue.Queue[list[tuple[Batch, float]] | BaseException] = queue.Queue(PREFETCHED_STEPS)
        stopped = threading.Event()

        def work() -> None:
            reads: deque[Future[list[tuple[Batch, float]]]] = deque()
            with ThreadPoolExecutor(STEPS_AT_A_TIME) as pool:
                try:
                    for step in itertools.count(self.step):
                        if stopped.is_set():
                            break
                        reads.append(pool.submit(self._read, step, self.plan.step(step)))
                        if len(reads) == STEPS_AT_A_TIME:
                            _put(ready, reads.popleft().result(), stopped)
                except BaseException as error:
                    _put(ready, error, stopped)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)

        thread = threading.Thread(target=work, daemon=True, name="read-ahead")
        thread.start()
        try:
            while True:
                begun = time.perf_counter()
                item = ready.get()
                self.waited_seconds += time.perf_counter() - begun
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()

    def _read(self, step: int, planned: PlannedBatch) -> list[tuple[Batch, float]]:
        batch = self.plan.batch
        micro_batches = []
        for part in cut_step(batch, self.rank, self.world):
            first = step * batch.global_size + part.start
            rows = planned.rows[part.start : part.stop]
            micro_batches.append((self.reader.read(rows, planned.bucket, first), part.weight))
        return micro_batches


def _put(target: queue.Queue, item: object, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            target.put(item, timeout=0.1)
        except queue.Full:
            continue
        return


class LatentReader:
    """Reads latents rows: of each file only the rows that are asked for, straight into the batch."""

    def __init__(self, dataset: Storage, manifest: Manifest, seed: int, pin: bool = False) -> None:
        """`seed` draws captions; `pin` puts tensors where a GPU fetches them without waiting for the CPU."""
        self.files = data_files(dataset, manifest)
        self._dataset, self._seed, self._pin = dataset, seed, pin
        self._known: OrderedDict[int, LatentFile] = OrderedDict()
        self._open: OrderedDict[int, RangeReader] = OrderedDict()
        self._lock = threading.Lock()  # sample grids read beside the read-ahead thread
        # Parts on a disk are copied faster by the thread that asks for them than a pool hands them out; the read-ahead
        # has two steps of them under way.
        self._readers = 1 if dataset.is_local else REMOTE_READERS
        self._map = map if dataset.is_local else ThreadPoolExecutor(REMOTE_READERS).map

    def read(self, rows: np.ndarray, bucket: Size, first: int) -> LatentBatch:
        """Rows [B, 2] as tensors in fp16, each with the text of one of its captions, drawn by its number in the run."""
        opened = self._files(np.unique(rows[:, 0]).tolist())
        files = {number: file for number, (file, _) in opened.items()}
        shapes = next(iter(files.values())).shapes
        tensors = {
            name: torch.empty(
                (len(rows), *shape),
                dtype=torch.int16 if name == Column.TOKENS else torch.float16,
                pin_memory=self._pin,
            )
            for name, shape in shapes.items()
        }

        targets = {name: tensor.view(torch.uint8).reshape(len(rows), -1).numpy() for name, tensor in tensors.items()}
        places = list(enumerate(rows.tolist()))
        drawn = [draw_caption(files[file].chances(row), self._seed, first + place) for place, (file, row) in places]

        def read(part: list[tuple[Column, tuple[int, list[int]]]]) -> None:
            for name, (place, (file, row)) in part:
                files[file].read_into(opened[file][1], name, row, drawn[place], targets[name][place])

        wanted = list(product(tensors, places))  # a task for each would cost as much as its copy in memory
        list(self._map(read, (wanted[reader :: self._readers] for reader in range(self._readers))))
        conditions = {
            name: torch.from_numpy(np.stack([files[file].conditions[name][row] for _, (file, row) in places])).float()
            for name in Conditioning
        }
        none = torch.empty(len(rows), 0)
        tokens = tensors.get(Column.TOKENS)
        return LatentBatch(
            first=first,
            bucket=bucket,
            mean=tensors[Column.LATENT_MEAN],
            std=tensors[Column.LATENT_STD],
            context=tensors.get(Column.CONTEXT, none),
            pooled=tensors.get(Column.POOLED, none),
            conditions=conditions,
            tokens=None if tokens is None else tokens.long() & 0xFFFF,  # torch has no unsigned ones of two bytes
        )

    def names(self, rows: np.ndarray) -> list[str]:
        """The keys of rows [B, 2]."""
        keys = {
            number: self._dataset.read_table(self.files[number].name, [Column.KEY]).column(Column.KEY)
            for number in np.unique(rows[:, 0]).tolist()
        }
        return [keys[file][row].as_py() for file, row in rows.tolist()]

    def _files(self, numbers: list[int]) -> dict[int, tuple[LatentFile, RangeReader]]:
        """Files by number. What is known of one outlives its being open: a footer takes as long as several rows."""

        def make(number: int) -> tuple[LatentFile, RangeReader]:
            known, reader = found[number]
            reader = reader or self._dataset.open(self.files[number].name)
            return known or LatentFile(reader), reader

        with self._lock:
            found = {number: (self._known.get(number), self._open.get(number)) for number in numbers}
        new = [number for number, parts in found.items() if None in parts]
        made = dict(zip(new, self._map(make, new), strict=True))  # another thread may make one too: no harm
        whole = {number: made[number] if number in made else make(number) for number in numbers}
        with self._lock:
            for number, (known, reader) in whole.items():
                self._known[number], self._open[number] = known, reader
                self._known.move_to_end(number)
                self._open.move_to_end(number)
            _forget_oldest(self._known, KNOWN_FILES)
            _forget_oldest(self._open, OPEN_FILES)
        return whole


def _forget_oldest(kept: OrderedDict, most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


def draw_caption(chances: np.ndarray, seed: int, number: int) -> int:
    """Which of its captions image `number` of a run is seen with. No other draw, and no other image, changes it."""
    if len(chances) == 1:
        return 0
    drawn = torch.rand((), generator=generator("caption choice", seed, number), dtype=torch.float64)
    ends = np.cumsum(chances, dtype=np.float64)
    return int(np.searchsorted(ends[:-1], float(drawn) * ends[-1], side="right"))


class ImageReader:
    """Reads the images that an index keeps, each cropped anew every time it is seen."""

    def __init__(
        self,
        output: Storage,
        originals: Originals,
        crop: CropConfig,
        max_pixels: int,
        *,
        lost: LostImages | None = None,
        decoders: int = DECODERS,
    ) -> None:
        """`output` is the run's folder, in which its images are listed. `lost` says how many of them may be lost, and
        keeps which; None is none. `decoders` images are decoded at a time, while others are waited for.

        Raises ValueError where `originals` lacks a source of the index.
        """
        self._images = ListedImages(output, originals)
        self.files = self._images.files
        self._originals, self._crop, self._max_pixels = originals, crop, max_pixels
        self._lost = lost or LostImages()
        self._pool = ThreadPoolExecutor(max(REMOTE_READERS, 2 * decoders))  # most of them wait, for storage or below
        self._decoders = threading.BoundedSemaphore(decoders)

    def read(self, rows: np.ndarray, bucket: Size, first: int) -> ImageBatch:
        """Rows [B, 2] as images; the crop is drawn from the image's number in the run."""
        numbers = range(first, first + len(rows))
        self._lost.saw(len(rows))
        known = self._images.rows(rows, self._pool)
        crops = list(self._pool.map(self._read_crop, rows.tolist(), known, [bucket] * len(rows), numbers))
        image = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return ImageBatch(first=first, bucket=bucket, image=image.contiguous())

    def names(self, rows: np.ndarray) -> list[str]:
        """The names of rows [B, 2]: source:path."""
        return [_name(known) for known in self._images.rows(rows, self._pool)]

    def _read_crop(self, row: Sequence[int], known: dict[str, Any], bucket: Size, number: int) -> np.ndarray:
        try:
            return self._crop_of(known, bucket, number)
        except LostError as error:
            crop, instead = self._neighbour(row, known, bucket, number, error)
            self._lost.add(LostImage(known[Column.ID], _name(known), str(error), _name(instead)))
            return crop

    def _neighbour(
        self, row: Sequence[int], lost: dict[str, Any], bucket: Size, number: int, why: LostError
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """The crop of the image that stands for a lost one, and its row."""
        share, count = self._lost.held_out_share, self.files[row[0]].rows
        held_out = is_held_out(lost[Column.ID], share)
        for step in range(1, min(NEIGHBOURS, count - 1) + 1):
            known = self._images.row(row[0], (row[1] + step) % count)
            if is_held_out(known[Column.ID], share) != held_out:
                continue
            with suppress(LostError):  # it is told of when it is its own turn
                return self._crop_of(known, bucket, number), known
        raise RuntimeError(
            f"{_name(lost)}: the index keeps it, and it cannot be used now, nor can one of the images beside it: {why}"
        ) from why

    def _crop_of(self, known: dict[str, Any], bucket: Size, number: int) -> np.ndarray:
        """The image's crop [H, W, 3]. LostError where what is there is not the image; OSError where storage fails."""
        image_id = known[Column.ID]
        try:
            data = self._originals.read(known)
        except FileNotFoundError as error:
            raise LostError("its file is gone") from error
        except OSError as error:
            raise RuntimeError(f"{_name(known)}: the index keeps it, and it cannot be read: {error}") from error
        except Exception as error:  # what was packed is no more what the index says
            raise LostError(f"its bytes have changed: {error}") from error
        with self._decoders:
            if content_id(data) != image_id:
                raise LostError("its bytes have changed")
            try:
                draw_id = f"{image_id}:{number}"
                return np.ascontiguousarray(read_crop(data, bucket, self._crop, draw_id, self._max_pixels)[0])
            except Exception as error:
                raise LostError(f"it cannot be decoded here: {error}") from error


class LostError(Exception):
    """An image that the index keeps is not there any more."""


def _name(known: dict[str, Any]) -> str:
    return f"{known[Column.SOURCE]}:{known[Column.PATH]}"
