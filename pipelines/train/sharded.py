"""A network's fp32 weights, and all that is cut like them, as DeepSpeed's optimizer shards them over the workers.

Moments and average lie where the fp32 weights lie. Here they are written, read and put together by parameter, so that
nothing else knows of stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.tensors import check_keys
from pipelines.checkpoints import AVERAGE, MOMENTS, WEIGHTS, Run, Shards
from pipelines.train.optimizers import moments, set_updates, take_up, updates
from pipelines.train.partition import Piece, each, line, share, whole

GATHERED_VALUES = 2**26  # that workers put together at a time, 256 MiB
READERS = 16  # parts of a checkpoint read at a time


@dataclass(frozen=True)
class Part:
    """What one worker writes of a network's state."""

    runs: list[Run]
    parameters: dict[str, tuple[int, ...]]
    """Shapes of all parameters."""
    tensors: dict[str, Tensor]
    """The values of `runs` end to end, on the CPU, by what they are."""


class Sharded:
    """This worker's shards. All workers call the methods that put together or spread, in the same order."""

    def __init__(self, engine: Any, network: nn.Module, parameters: Mapping[str, tuple[int, ...]], stage: int) -> None:
        """`engine` is DeepSpeed's; `parameters` are the shapes of the network's, before stage 3 has taken them away."""
        self._engine, self._network, self._stage = engine, network, stage
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.parameters = dict(parameters)
        self.weights = self._find_weights()
        """The fp32 weights that this worker's optimizer updates."""
        self.average: list[Tensor] | None = None
        """Their average, where there is one."""
        self._pieces = self._find_pieces()
        self._optimizer = engine.basic_optimizer
        for weights in self.weights:
            moments(self._optimizer, weights)

    def all(self) -> dict[str, Sequence[Tensor]]:
        """All that a checkpoint keeps, each cut like the fp32 weights; in place, but for moments of 8 bits."""
        found: dict[str, Sequence[Tensor]] = {WEIGHTS: self.weights}
        both = [moments(self._optimizer, weights) for weights in self.weights]
        found |= {moment: [one[moment] for one in both] for moment in MOMENTS}
        return found | ({AVERAGE: self.average} if self.average is not None else {})

    @property
    def updates(self) -> int:
        """Updates that the optimizer has made."""
        return updates(self._optimizer, self.weights[0])

    def set_weights(self, exact: Mapping[str, Tensor]) -> None:
        """Take the fp32 weights from whole ones on the CPU, by parameter."""
        for piece in self._pieces:
            piece.of(self.weights).copy_(exact[piece.name].view(-1)[piece.start : piece.start + piece.length])

    def snapshot(self, buffers: dict[str, Tensor]) -> Part:
        """A copy of what this worker writes into a checkpoint, in `buffers`, which it may have filled before.

        Training goes on with what was written, to the bit, where moments of 8 bits are not what their values say.
        """
        pieces = share(self._pieces, self._rank, self._world) if self._stage == 0 else self._pieces
        length, cuda = sum(piece.length for piece in pieces), self._engine.device.type == "cuda"
        state = self.all()
        for role, tensors in state.items():
            if role not in buffers:  # pinned memory is written by a GPU several times as fast
                buffers[role] = torch.empty(length, dtype=torch.float32, pin_memory=cuda)
            place = 0
            for piece in pieces:
                buffers[role][place : place + piece.length].copy_(piece.of(tensors), non_blocking=True)
                place += piece.length
        if cuda:
            torch.cuda.synchronize()
        self._take_up(state)
        return Part([Run(piece.name, piece.start, piece.length) for piece in pieces], self.parameters, buffers)

    def load(self, shards: Shards, count: int) -> None:
        """Take up what any number of workers wrote under any stage. Raises ValueError where it is another network's."""
        check_keys(f"{shards.uri}: {shards.network}", shards.parameters, self.parameters)
        state = self.all()
        wanted = [(role, piece) for role in state for piece in self._pieces]

        def fill(role: str, piece: Piece) -> None:
            piece.of(state[role]).copy_(shards.read(role, Run(piece.name, piece.start, piece.length)))

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(fill, *zip(*wanted, strict=True)))
        self._take_up(state)
        for weights in self.weights:
            set_updates(self._optimizer, weights, count)
        self._spread()

    def gathered(self, tensors: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Each parameter in full, fp32, on the worker's device, from tensors that are cut like the fp32 weights.

        The values are valid until the next is asked for. Every worker puts its own bits into a line of zeros, and the
        lines are added as integers, which loses none.
        """
        pieces = {piece.name: piece for piece in self._pieces}
        for names in _buckets(self.parameters):
            sizes = [math.prod(self.parameters[name]) for name in names]
            together = torch.zeros(sum(sizes), dtype=torch.float32, device=self._engine.device)
            for name, values in zip(names, together.split(sizes), strict=True):
                if name in pieces:
                    piece = pieces[name]
                    values[piece.start : piece.start + piece.length].copy_(piece.of(tensors))
            if self._stage > 0:
                torch.distributed.all_reduce(together.view(torch.int32))
            for name, values in zip(names, together.split(sizes), strict=True):
                yield name, values.view(self.parameters[name])

    def _take_up(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        for number, weights in enumerate(self.weights):
            take_up(self._optimizer, weights, {moment: state[moment][number] for moment in MOMENTS})

    def _find_weights(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [weights for group in self._engine.basic_optimizer.param_groups for weights in group["params"]]

    def _find_pieces(self) -> list[Piece]:
        """Which values of which parameter lie where in the fp32 weights."""
        sizes = {name: math.prod(shape) for name, shape in self.parameters.items()}
        if self._stage == 0:
            return whole(sizes)
        if self._stage in (1, 2):
            (weights,) = self.weights
            return line(sizes, self._rank, weights.numel())
        names = {id(parameter): name for name, parameter in self._network.named_parameters()}
        groups = [
            {names[id(parameter)]: sizes[names[id(parameter)]] for parameter in group}
            for group in self._engine.optimizer.fp16_groups
        ]
        return each(groups, self._rank, self._world)

    @torch.no_grad()
    def _spread(self) -> None:
        """Give the network that learns the fp32 weights."""
        optimizer = self._engine.optimizer
        if self._stage == 3:  # as at the end of a step
            optimizer._partition_all_parameters()
            for group in range(len(self.weights)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self._stage > 0:
            optimizer.update_lp_params()
        else:
            for parameter, weights in zip(self._network.parameters(), self.weights, strict=True):
                parameter.copy_(weights)


def _buckets(parameters: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names in order, in groups of some GATHERED_VALUES values."""
    names: list[str] = []
    values = 0
    for name, shape in parameters.items():
        names.append(name)
        values += math.prod(shape)
        if values >= GATHERED_VALUES:
            yield names
            names, values = [], 0
    if names:
        yield names
