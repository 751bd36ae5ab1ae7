"""How stages run on Ray Data: units of rows as blocks that stay whole, and what each task or actor is given."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Dataset

from pipelines.config import StageResources


def dataset_of(units: Sequence[pa.Table]) -> Dataset:
    """A Ray dataset with one block per unit. Blocks stay whole on their way, however large pixels make them."""
    # Ray 2.60 warns of the only way there is to limit retries; the project is pinned below the version without it.
    warnings.filterwarnings("ignore", message="`ray_remote_args`")
    context = ray.data.DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False  # ours counts images
    return ray.data.from_arrow(list(units))


def run_on(labels: Mapping[str, str]) -> None:
    """All stages that this process starts from now on run on nodes with these labels, and ask an autoscaler for such.

    Not an argument of each stage: what Ray Data 2.60 itself asks an autoscaler for has the labels of its context alone.
    """
    ray.data.DataContext.get_current().execution_options.label_selector = dict(labels)


def tasks(resources: StageResources) -> dict[str, Any]:
    """How a stage of plain functions runs. A process that dies is replaced a few times, not for ever."""
    return {
        "batch_format": "pyarrow",
        "batch_size": None,
        "num_cpus": resources.cpus,
        "max_retries": resources.max_retries,
    }


def attempt() -> int:
    """How often the process of the task that asks has died: Ray gave it the same rows again.

    Ray tells it by no public name; the project is pinned below the next version, and a test kills such processes.
    """
    from ray._private.worker import global_worker

    return global_worker.core_worker.get_current_task_attempt_number()  # type: ignore[attr-defined]


def actors(resources: StageResources) -> dict[str, Any]:
    """How a stage that keeps networks in memory runs; its actors are started again a few times, not for ever."""
    fewest, most = resources.workers
    return {
        "batch_format": "pyarrow",
        "batch_size": None,
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus or None,
        "compute": ActorPoolStrategy(min_size=fewest, max_size=most),
        "max_restarts": resources.max_retries,
        "max_task_retries": resources.max_retries,
    }
