"""Checkpoints of a training run: what they hold, when they are whole, and how they are read by any number of workers.

Each worker writes one safetensors file for each network: fp32 weights, both moments and the average of the values that
it holds, end to end, and in the file's metadata which values of which parameter these are. `progress.json` comes last:
it lists every file with its size, and a folder without it is no checkpoint. Reading asks for values by parameter, so
neither the number of workers nor the ZeRO stage matters, nor does DeepSpeed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.tensors import Stored, check_keys, raw, shapes, stored, write_stream
from pipelines.ranges import RangeReader
from pipelines.storage import Storage

RUN = "run.json"  # what a run is: stage, settings, pinned dataset, MLflow run; finished_images when it is done
PROGRESS = "progress.json"  # a checkpoint's last file: how far the run was, and the names and sizes of the others
CHECKPOINTS = "checkpoints"  # their folder below a run's output
FORMAT = 2  # 1 were DeepSpeed's own files
WEIGHTS, MOMENTS, AVERAGE = "weights", ("exp_avg", "exp_avg_sq"), "average"


@dataclass(frozen=True)
class Run:
    """Some of one parameter's values: those from `start` on in the flattened parameter."""

    name: str
    start: int
    length: int


def shard_file(network: str, rank: int) -> str:
    """A worker's part of a network's state, below the checkpoint."""
    return f"{network}/rank_{rank:05}.safetensors"


def is_checkpoint(folder: Storage) -> bool:
    """Whether the folder is one checkpoint of a run."""
    return folder.exists(PROGRESS)


def list_checkpoints(run: Storage) -> list[str]:
    """The names, below a run's output, of its checkpoints; the one that has seen most images last."""
    names = [
        match[1]
        for file in run.list(CHECKPOINTS)
        if (match := re.fullmatch(rf"({CHECKPOINTS}/[^/]+)/{re.escape(PROGRESS)}", file.name))
    ]
    return sorted(names, key=lambda name: int(run.read_json(f"{name}/{PROGRESS}")["images_seen"]))


def newest_checkpoint(run: Storage) -> str | None:
    """The name, below a run's output, of its last checkpoint; None where it has none."""
    return next(reversed(list_checkpoints(run)), None)


def run_settings(checkpoint: Storage) -> dict[str, Any]:
    """The settings of the run that a checkpoint belongs to, which lies two folders above it."""
    run = Storage(checkpoint.uri.rstrip("/").rsplit("/", 2)[0], checkpoint.options)
    if not run.exists(RUN):
        raise FileNotFoundError(
            f"{checkpoint.uri}: {run.uri} holds no {RUN}; a checkpoint is read where its run left it"
        )
    return run.read_json(RUN)["settings"]


def write_shard(
    checkpoint: Storage,
    file: str,
    runs: Sequence[Run],
    parameters: Mapping[str, Sequence[int]],
    tensors: Mapping[str, Tensor],
) -> int:
    """Write a worker's part of a network; gives its size in bytes.

    `tensors` are flat, by what they hold, with the values of `runs` end to end; `parameters` are the shapes of all.
    """
    metadata = {
        "runs": json.dumps([[run.name, run.start, run.length] for run in runs]),
        "parameters": json.dumps({name: list(shape) for name, shape in parameters.items()}),
    }
    with checkpoint.output(file) as stream:
        return write_stream(stream, stored(tensors), metadata)


def read_progress(checkpoint: Storage) -> dict[str, Any]:
    """How far the run was. Raises ValueError unless every file of the checkpoint is there, and whole."""
    progress = checkpoint.read_json(PROGRESS)
    if progress.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint.uri} has format {progress.get('format', 1)}, and this version reads {FORMAT}; go on with the "
            "version that wrote it, or start from its exported weights in another output"
        )
    there = {file.name: file.size for file in checkpoint.list()}
    wrong = [
        f"{name} is missing" if name not in there else f"{name} has {there[name]} of {size} bytes"
        for name, size in progress["files"].items()
        if there.get(name) != size
    ]
    if wrong:
        raise ValueError(f"{checkpoint.uri} is not whole: {'; '.join(wrong)}; delete it to go on from the one before")
    return progress


class Shards:
    """One network's state in a checkpoint, read by parameter."""

    def __init__(self, checkpoint: Storage, network: str) -> None:
        """Raises FileNotFoundError where the checkpoint has no such network, and ValueError where it is not whole."""
        files = [name for name in read_progress(checkpoint)["files"] if name.startswith(f"{network}/")]
        if not files:
            raise FileNotFoundError(f"{checkpoint.uri} holds no network {network!r}")
        self.uri, self.network = checkpoint.uri, network
        self.parameters: dict[str, tuple[int, ...]] = {}
        self.roles: frozenset[str] = frozenset()
        self._runs: dict[str, list[tuple[Run, RangeReader, dict[str, int]]]] = {}
        for file in files:
            self._open(checkpoint.open(file))
        for name, shape in self.parameters.items():
            place = 0
            for run, _, _ in sorted(self._runs.get(name, []), key=lambda part: part[0].start):
                if run.start != place:
                    break
                place += run.length
            if place != math.prod(shape):
                raise ValueError(f"{self.uri}: {network} has no value {place} of {name}, which has {math.prod(shape)}")

    def read(self, role: str, run: Run) -> Tensor:
        """The values [length] of a run, fp32, on the CPU. `role` is one of "weights", "exp_avg", "average" ..."""
        values = torch.empty(run.length, dtype=torch.float32)
        view = raw(values)
        for part, reader, begins in self._runs[run.name]:
            first, last = max(part.start, run.start), min(part.start + part.length, run.start + run.length)
            if first < last:
                target = view[4 * (first - run.start) : 4 * (last - run.start)]
                reader.read_into(target, begins[role] + 4 * (first - part.start))
        return values

    def _open(self, reader: RangeReader) -> None:
        size = bytearray(8)
        reader.read_into(memoryview(size), 0)
        text = bytearray(int.from_bytes(size, "little"))
        reader.read_into(memoryview(text), 8)
        header = json.loads(text)
        metadata = header.pop("__metadata__")
        self.roles = frozenset(header)
        self.parameters = {name: tuple(shape) for name, shape in json.loads(metadata["parameters"]).items()}
        place = 8 + len(text)
        begins = {role: place + entry["data_offsets"][0] for role, entry in header.items()}
        for run in (Run(*values) for values in json.loads(metadata["runs"])):
            self._runs.setdefault(run.name, []).append((run, reader, begins))
            begins = {role: begin + 4 * run.length for role, begin in begins.items()}


def averaged_weights(checkpoint: Storage, name: str, network: nn.Module) -> dict[str, Stored]:
    """The averaged weights, fp32, of the network `name`, which is shaped like `network`, which may be on meta: each is
    read when it is asked for.

    Raises FileNotFoundError where the checkpoint holds no average of that name, and ValueError where it is not whole or
    is of another network.
    """
    shards = Shards(checkpoint, name)
    if AVERAGE not in shards.roles:
        raise FileNotFoundError(f"{checkpoint.uri} holds no averaged weights of {name!r}")
    check_keys(f"{checkpoint.uri}: {name}", shards.parameters, shapes(dict(network.named_parameters())))

    def of(key: str, shape: tuple[int, ...]) -> Stored:
        return Stored(shape, torch.float32, lambda: shards.read(AVERAGE, Run(key, 0, math.prod(shape))).view(shape))

    return {key: of(key, shape) for key, shape in shards.parameters.items()}
