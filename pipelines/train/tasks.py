"""What the loop asks of what it trains: losses per sample of a batch, and pictures of averaged weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.train.batches import Batch, Reader
from pipelines.train.engine import Engine
from pipelines.train.lost import LostImages
from pipelines.train.operations import Operations


@dataclass(frozen=True)
class Loss:
    """One network's loss on a micro-batch."""

    engine: str
    """Name of the network that learns from it."""
    per_sample: Tensor  # [B]
    terms: Mapping[str, Tensor]
    """Parts of it, per sample or scalar, for the curves."""
    shares: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Curves over some of the samples: values [B], and which of them count [B]."""


class Task(Protocol):
    """What the loop asks of VAE, base and refiner."""

    reader: Reader
    """What reads the task's dataset."""
    lost: LostImages | None
    """What it could not read; None where nothing can be lost."""

    def networks(self) -> dict[str, nn.Module]:
        """The networks that learn, by name."""
        ...

    def prepare(self, engines: Mapping[str, Engine], passes: Sequence[tuple[Batch, float]]) -> Tensor | None:
        """What `losses` has to know of all passes of a step: this worker's micro-batches, and their weights in the mean
        over them and the workers."""
        ...

    def losses(self, engines: Mapping[str, Engine], batch: Batch, prepared: Tensor | None = None) -> Iterator[Loss]:
        """The losses of a micro-batch, one after another: each is learnt from before the next is made."""
        ...

    def validate(self, network: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        """What the averaged weights make of held-out rows, by curve: values [B] that depend on nothing but the rows'
        numbers and the seed."""
        ...

    def before_samples(self) -> None:
        """Get ready what one worker makes for all that sample. All workers call it together."""
        ...

    def samples(self, network: nn.Module, batch: Batch, numbers: Sequence[int]) -> np.ndarray:
        """The rows' images and what the averaged weights make of them, uint8 [2, B, H, W, 3]. Noise is drawn by
        `numbers`, one for each row."""
        ...

    def operations(self) -> Operations:
        """What training of the averaged network costs."""
        ...

    def export(self, network: nn.Module, weights: Mapping[str, Tensor], batches: Iterator[Batch], path: Path) -> None:
        """Write the averaged `weights`, in fp32; `network` computes with them, `batches` are there to measure on."""
        ...


def workers_there() -> int:
    """How many workers train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def mean_over_workers(value: Tensor) -> Tensor:
    """The mean of a tensor over all workers."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
        value /= workers_there()
    return value


def from_worker_0(make: Callable[[], Any]) -> Any:
    """What `make` gives on worker 0, on all workers."""
    if not torch.distributed.is_initialized():
        return make()
    values = [make() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(values)
    return values[0]
