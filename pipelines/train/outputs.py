"""What a run leaves beside its checkpoints: the rows that grids of samples show, and the exported weights."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipelines.sources import WEIGHTS_FILE
from pipelines.storage import Storage
from pipelines.train.batches import Batch
from pipelines.train.plan import Plan
from pipelines.train.tasks import Task

SAMPLED_ROWS = 8  # pictures in a row of the sample grid


def sample_batch(task: Task) -> Batch:
    """The first rows of the largest file: the same ones at every step of a run."""
    file = max(range(len(task.reader.files)), key=lambda number: task.reader.files[number].rows)
    count = min(SAMPLED_ROWS, task.reader.files[file].rows)
    bucket = task.reader.files[file].bucket
    assert bucket is not None
    return task.reader.read(np.array([[file, row] for row in range(count)]), bucket, 0)


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
