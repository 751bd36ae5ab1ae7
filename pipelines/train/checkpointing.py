"""Checkpoints while training goes on: state is copied to the host, and a thread writes it.

A checkpoint is committed by its last file, which worker 0 writes when every worker has told it that its own part is
whole. Until then the one before is the newest, and older ones are deleted only afterwards: whatever dies, at whatever
moment, leaves a whole checkpoint. Ray Train's own would be committed by its controller's next poll, and not at all if a
worker dies before.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch

from pipelines.checkpoints import (
    CHECKPOINTS,
    FORMAT,
    PROGRESS,
    Shards,
    list_checkpoints,
    newest_checkpoint,
    read_progress,
    shard_file,
    write_shard,
)
from pipelines.storage import Storage
from pipelines.train.engine import Engine
from pipelines.train.sharded import Part

SLOWEST_WORKER = timedelta(hours=2)  # that the others wait for at the end of a checkpoint


class Checkpointer:
    """Writes and reads the checkpoints of one attempt. All workers call its methods, in the same order."""

    def __init__(self, run: Storage, keep: int, check: Callable[[], None]) -> None:
        """`run` is the run's output, whose newest `keep` checkpoints stay; `check` raises where another job has it."""
        self._run, self._keep, self._check = run, keep, check
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._group: Any = torch.distributed.new_group(backend="gloo", timeout=SLOWEST_WORKER)  # not training's
        self._attempt = self._from_worker_0(uuid.uuid4().hex[:8])
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._buffers: dict[str, dict[str, torch.Tensor]] = {}
        self._waited = 0.0

    def restore(self, engines: Mapping[str, Engine]) -> int:
        """Take up the newest checkpoint; gives the number of steps that are behind it, 0 where there is none.

        Raises ValueError where a file of it is missing or short: training never starts afresh unnoticed.
        """
        name = self._from_worker_0(newest_checkpoint(self._run) if self._rank == 0 else None)
        if self._rank == 0:
            self._check()
            self._delete_unfinished()
        if name is None:
            return 0
        checkpoint = self._run.folder(name)
        progress = read_progress(checkpoint)
        for network, engine in engines.items():
            engine.load(Shards(checkpoint, network), progress["networks"][network])
        return int(progress["step"])

    def save(self, engines: Mapping[str, Engine], step: int, images_seen: int) -> None:
        """Copy the state, and return while it is written; waits for the checkpoint before, if that is not whole yet."""
        begun = time.perf_counter()
        self.finish()
        parts = {name: engine.snapshot(self._buffers.setdefault(name, {})) for name, engine in engines.items()}
        progress = {
            "format": FORMAT,
            "step": step,
            "images_seen": images_seen,
            "workers": self._world,
            "networks": {name: engine.numbers() for name, engine in engines.items()},
        }
        folder = self._run.folder(f"{CHECKPOINTS}/checkpoint_{images_seen:012}_{self._attempt}")
        self._writing = self._thread.submit(self._write, folder, parts, progress)
        self._waited += time.perf_counter() - begun

    def waited(self) -> float:
        """Seconds that training has stood still for checkpoints since this was last asked."""
        waited, self._waited = self._waited, 0.0
        return waited

    def finish(self) -> None:
        """Wait until what is being written is whole. Raises what went wrong, on whichever worker."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, checkpoint: Storage, parts: Mapping[str, Part], progress: dict[str, Any]) -> None:
        sizes: dict[str, int] = {}
        failure: str | None = None
        try:
            for network, part in parts.items():
                file = shard_file(network, self._rank)
                sizes[file] = write_shard(checkpoint, file, part.runs, part.parameters, part.tensors)
        except Exception as error:
            failure = f"worker {self._rank}: {type(error).__name__}: {error}"
        told: list[Any] = [None] * self._world
        torch.distributed.all_gather_object(told, (sizes, failure), group=self._group)
        failures = [failure for _, failure in told if failure]
        if failures:
            raise RuntimeError(f"{checkpoint.uri} could not be written: {'; '.join(failures)}")
        if self._rank == 0:
            files = {file: size for sizes, _ in told for file, size in sizes.items()}
            self._check()
            checkpoint.write_json(PROGRESS, progress | {"files": files})
            for name in list_checkpoints(self._run)[: -self._keep]:
                _delete(self._run, name)
            self._delete_unfinished()  # workers whose driver was killed go on for a while, into folders of their own

    def _from_worker_0(self, value: Any) -> Any:
        """Worker 0's value, on all workers."""
        values = [value]
        torch.distributed.broadcast_object_list(values, group=self._group, device=torch.device("cpu"))
        return values[0]

    def _delete_unfinished(self) -> None:
        """Delete what attempts that died left of checkpoints that are none; not what others write of this attempt's."""
        for name in self._run.folders(CHECKPOINTS) - set(list_checkpoints(self._run)):
            if not name.endswith(f"_{self._attempt}"):
                _delete(self._run, name)


def _delete(run: Storage, name: str) -> None:
    """Delete a checkpoint, what makes it one first."""
    if run.exists(f"{name}/{PROGRESS}"):
        run.delete(f"{name}/{PROGRESS}")
    run.delete_folder(name)
