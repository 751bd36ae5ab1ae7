"""What a run leaves beside its checkpoints: the rows that grids of samples show, and the exported weights."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from model.config import Conditioning
from pipelines.config import Size
from pipelines.pictures import grid
from pipelines.schema import DataFile
from pipelines.sources import WEIGHTS_FILE
from pipelines.storage import Storage
from pipelines.train.batches import Batch, LatentBatch
from pipelines.train.denoiser import DenoiserTask
from pipelines.train.plan import Plan
from pipelines.train.tasks import Task

AnyBatch = TypeVar("AnyBatch", bound=Batch)
SAMPLED_ROWS = 8  # pictures in a row of the sample grid
ORIGINAL_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the bucket's sides


def sample_pictures(
    task: Task,
    network: torch.nn.Module,
    sampled: Sequence[tuple[Size, np.ndarray]],
    *,
    rank: int,
    world: int,
    added: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, np.ndarray]:
    """Pictures uint8 [H, W, 3], by name, of what the network makes: the same rows and noise at every step of a run.

    A grid for each of `sampled_rows`, and of base and refiner one that tells the network other original sizes of one
    image (SDXL's figure 3). All workers call it together: they take turns at the pictures, and `added` gives worker 0
    the sum of all workers' tensors. The others have an empty dictionary.
    """
    task.before_samples()
    drawn: dict[str, torch.Tensor] = {}
    before = 0
    for name, (bucket, rows), by_size in _grids(task, sampled):
        places = [0] * len(ORIGINAL_SIZES) if by_size else list(range(len(rows)))
        mine = shares(len(places), before, rank, world)
        before += len(places)
        cells = torch.zeros(2, len(places), *bucket, 3, dtype=torch.uint8)  # [2,B,H,W,3]
        if mine:
            read = task.reader.read(rows, bucket, 0)
            batch = taken(by_original_size(read) if by_size else read, mine)
            cells[:, mine] = torch.from_numpy(task.samples(network, batch, [places[place] for place in mine]))
        drawn[name] = cells
    together = {name: added(cells) for name, cells in drawn.items()}  # only now: nobody waits between grids
    return {name: grid(list(cells.numpy())) for name, cells in together.items()} if rank == 0 else {}


def shares(count: int, before: int, rank: int, world: int) -> list[int]:
    """Which of a grid's `count` pictures a worker draws, when the grids ahead of it had `before`."""
    return [place for place in range(count) if (before + place) % world == rank]


def _grids(
    task: Task, sampled: Sequence[tuple[Size, np.ndarray]]
) -> Iterator[tuple[str, tuple[Size, np.ndarray], bool]]:
    """(name, bucket and rows, whether original sizes are varied) of each grid."""
    for number, (bucket, rows) in enumerate(sampled):
        yield "samples" + (f"_{bucket[0]}x{bucket[1]}" if number else ""), (bucket, rows), False
    if isinstance(task, DenoiserTask):
        yield "samples_by_original_size", (sampled[0][0], sampled[0][1][:1]), True


def sampled_rows(files: Sequence[DataFile], buckets: int) -> list[tuple[Size, np.ndarray]]:
    """(bucket, rows [B,2]) of each grid: the first rows of the largest file of each of the buckets with the most rows;
    fewer where there are fewer."""
    rows: Counter[Size] = Counter()
    largest: dict[Size, int] = {}
    for number, file in enumerate(files):
        assert file.bucket is not None
        rows[file.bucket] += file.rows
        best = largest.setdefault(file.bucket, number)
        if file.rows > files[best].rows:
            largest[file.bucket] = number
    return [
        (bucket, np.array([[largest[bucket], row] for row in range(count)]))
        for bucket, _ in rows.most_common(buckets)
        if (count := min(SAMPLED_ROWS, files[largest[bucket]].rows))
    ]


def by_original_size(batch: Batch) -> LatentBatch:
    """The first row several times, each told another original size: these shares of its bucket."""
    assert isinstance(batch, LatentBatch)
    repeated = taken(batch, [0] * len(ORIGINAL_SIZES))
    sizes = (torch.tensor(ORIGINAL_SIZES)[:, None] * torch.tensor(batch.bucket)).round()  # [N,2]
    return replace(repeated, conditions=repeated.conditions | {Conditioning.ORIGINAL_SIZE: sizes})


def taken(batch: AnyBatch, places: Sequence[int]) -> AnyBatch:
    """The rows of a batch at `places`."""

    def rows(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rows(part) for name, part in value.items()}
        return value[list(places)] if isinstance(value, torch.Tensor) else value

    return replace(batch, **{field.name: rows(getattr(batch, field.name)) for field in fields(batch)})


def export(task: Task, network: torch.nn.Module, weights: dict[str, torch.Tensor], plan: Plan, output: Storage) -> None:
    """Write the averaged weights, in fp32, into the run's folder; `network` holds them. Worker 0 calls it."""

    def batches() -> Iterator[Batch]:
        for number in itertools.count():
            planned = plan.step(number)
            for start in range(0, len(planned.rows), plan.batch.micro_size):
                rows = planned.rows[start : start + plan.batch.micro_size]
                yield task.reader.read(rows, planned.bucket, number * plan.batch.global_size + start)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, WEIGHTS_FILE)
        task.export(network, weights, batches(), path)
        output.upload(WEIGHTS_FILE, path)
