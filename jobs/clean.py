"""List what nothing needs any more, or remove it: python -m jobs.clean CONFIG.toml apply=true"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from jobs.cli import main, sole_writer
from jobs.config import CleanJob
from pipelines.storage import Storage

if TYPE_CHECKING:
    from pipelines.clean import Leftover

SHOWN = 50  # files of a folder; the rest is counted


def run(job: CleanJob) -> None:
    """Remove what is found if the settings say so, each folder under its lease; otherwise list it."""
    from pipelines.clean import remove

    pinned = _pinned(job)
    for folder, kind in _folders(job):
        with sole_writer(folder) if job.apply else nullcontext():
            leftovers = _left(job, folder, kind, pinned)
            if job.apply:
                remove(folder, leftovers)
        _print(folder, leftovers, "removed" if job.apply else "would be removed (apply=true)")


def plan(job: CleanJob) -> None:
    """List what would be removed."""
    run(job.model_copy(update={"apply": False}))


def _folders(job: CleanJob) -> Iterator[tuple[Storage, str]]:
    for kind, folders in (("dataset", job.datasets), ("run", job.runs), ("pictures", job.pictures)):
        for folder in folders:
            yield Storage(folder, job.storage), kind


def _pinned(job: CleanJob) -> set[str]:
    from pipelines.clean import pinned_by, pinned_by_evaluation

    pinned = {pinned_by(Storage(folder, job.storage)) for folder in job.runs}
    return pinned.union(*(pinned_by_evaluation(Storage(folder, job.storage)) for folder in job.evaluations))


def _left(job: CleanJob, folder: Storage, kind: str, pinned: set[str]) -> list[Leftover]:
    from pipelines.clean import left_in_dataset, left_in_pictures, left_in_run

    now_us = time.time_ns() // 1000
    if kind == "dataset":
        return left_in_dataset(folder, job.keep, pinned, now_us)
    return (left_in_run if kind == "run" else left_in_pictures)(folder, job.keep, now_us)


def _print(folder: Storage, leftovers: list[Leftover], what: str) -> None:
    from pipelines.estimate import readable

    for item in leftovers[:SHOWN]:
        print(f"  {item.name}: {item.reason}, {readable(item.size)}")
    if len(leftovers) > SHOWN:
        print(f"  and {len(leftovers) - SHOWN} more")
    size = readable(sum(item.size for item in leftovers))
    print(f"{folder.uri}: {len(leftovers)} files, {size}, {what}" if leftovers else f"{folder.uri}: nothing to remove")


if __name__ == "__main__":
    main(CleanJob, run, plan, needs_ray=False)
