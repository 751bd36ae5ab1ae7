"""The averaged weights inside a training run's checkpoint, put together from its workers' shards.

Every worker keeps the average of its own part of the weights: under ZeRO 1 and 2 the parameters, in the network's
order, lie end to end in one line, padded at its end, which the workers cut into equal parts. So a checkpoint of any
number of workers is read without them, and without DeepSpeed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.storage import Storage

RUN = "run.json"  # what a run is: stage, settings, pinned dataset, MLflow run; finished_images when it is done
PROGRESS = "progress.json"  # how far the run was; worker 0 writes it
CHECKPOINTS = "checkpoints"  # their folder below a run's output


def ema_file(rank: int) -> str:
    """A worker's part of the average, below the network's folder in a checkpoint."""
    return f"ema_rank_{rank:05}.pt"


def is_checkpoint(folder: Storage) -> bool:
    """Whether the folder is one checkpoint of a run."""
    return folder.exists(PROGRESS)


def newest_checkpoint(run: Storage) -> str | None:
    """The name, below a run's output, of its last checkpoint; None where it has none."""
    found = [
        match[1]
        for file in run.list(CHECKPOINTS)
        if (match := re.fullmatch(rf"({CHECKPOINTS}/[^/]+)/{re.escape(PROGRESS)}", file.name))
    ]
    return max(found, default=None, key=lambda name: int(run.read_json(f"{name}/{PROGRESS}")["images_seen"]))


def run_settings(checkpoint: Storage) -> dict[str, Any]:
    """The settings of the run that a checkpoint belongs to, which lies two folders above it."""
    run = Storage(checkpoint.uri.rstrip("/").rsplit("/", 2)[0], checkpoint.options)
    if not run.exists(RUN):
        raise FileNotFoundError(
            f"{checkpoint.uri}: {run.uri} holds no {RUN}; a checkpoint is read where its run left it"
        )
    return run.read_json(RUN)["settings"]


def averaged_weights(checkpoint: Storage, name: str, network: nn.Module) -> dict[str, Tensor]:
    """The averaged weights, fp32, of the engine `name`, whose network is shaped like `network`, which may be on meta.

    Raises FileNotFoundError where the checkpoint holds no average of that name, and ValueError where its parts are not
    those of such a network.
    """
    pattern = re.compile(rf"{re.escape(name)}/ema_rank_(\d+)\.pt")
    ranks = sorted(int(match[1]) for file in checkpoint.list(name) if (match := pattern.fullmatch(file.name)))
    if not ranks:
        raise FileNotFoundError(f"{checkpoint.uri} holds no averaged weights of {name!r}")
    parts = [_shard(checkpoint, f"{name}/{ema_file(rank)}") for rank in range(len(ranks))]
    parameters = dict(network.named_parameters())
    needed, found = sum(p.numel() for p in parameters.values()), sum(part.numel() for part in parts)
    if ranks != list(range(len(ranks))) or len({part.numel() for part in parts}) > 1 or not needed <= found:
        raise ValueError(
            f"{checkpoint.uri}: the average of {name!r} has {found} elements in the parts of workers {ranks}, and the "
            f"network has {needed}: a part is missing, or it is another network's"
        )
    line = torch.cat(parts)
    del parts
    return _cut(line, parameters, checkpoint.uri)


def _shard(checkpoint: Storage, file: str) -> Tensor:
    state = torch.load(io.BytesIO(checkpoint.read(file)), map_location="cpu", weights_only=True)
    (shard,) = state["shadow"]  # one group of parameters
    return shard.flatten()


def _cut(line: Tensor, parameters: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The parameters out of the line that they lie in."""
    weights, start = {}, 0
    for name, parameter in parameters.items():
        weights[name] = line[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    padding = line[start:]
    if padding.any():
        raise ValueError(f"{where}: {int(padding.count_nonzero())} values behind the last weight: another network's")
    return weights
