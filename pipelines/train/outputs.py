"""What a run leaves beside its checkpoints: the rows that grids of samples show, and the exported weights."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from model.config import Conditioning
from pipelines.config import Size
from pipelines.schema import DataFile
from pipelines.sources import WEIGHTS_FILE
from pipelines.storage import Storage
from pipelines.train.batches import Batch, LatentBatch
from pipelines.train.plan import Plan
from pipelines.train.tasks import Task

SAMPLED_ROWS = 8  # pictures in a row of the sample grid
ORIGINAL_SIZES = (0.125, 0.25, 0.5, 1.0, 2.0)  # of the bucket's sides


def sample_pictures(
    task: Task, network: torch.nn.Module, sampled: Sequence[tuple[Size, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, picture uint8 [H, W, 3]) of what the network makes: the same rows and noise at every step of a run.

    A grid for each of `sampled_rows`, and of base and refiner one that tells the network other original sizes of one
    image (SDXL's figure 3).
    """
    batches = [task.reader.read(rows, bucket, 0) for bucket, rows in sampled]
    for number, batch in enumerate(batches):
        yield "samples" + (f"_{batch.bucket[0]}x{batch.bucket[1]}" if number else ""), task.samples(network, batch)
    if isinstance(batches[0], LatentBatch):
        yield "samples_by_original_size", task.samples(network, by_original_size(batches[0]), same_noise=True)


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


def by_original_size(batch: LatentBatch) -> LatentBatch:
    """The first row several times, each told another original size: these shares of its bucket."""
    count = len(ORIGINAL_SIZES)

    def repeated(value: torch.Tensor) -> torch.Tensor:
        return value[:1].expand(count, *value.shape[1:])

    conditions = {name: repeated(value) for name, value in batch.conditions.items()}
    shares = torch.tensor(ORIGINAL_SIZES)[:, None]  # [N,1]
    conditions[Conditioning.ORIGINAL_SIZE] = (shares * torch.tensor(batch.bucket)).round()  # [N,2]
    return replace(
        batch,
        mean=repeated(batch.mean),
        std=repeated(batch.std),
        context=repeated(batch.context),
        pooled=repeated(batch.pooled),
        conditions=conditions,
        tokens=None if batch.tokens is None else repeated(batch.tokens),
    )


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
