"""Two workers on two cores beside one: steps of one global batch through the engine, over gloo.

The one worker is this process; the two are processes that wait for their turn. So the sides take turns, though they
are not in one process. Seconds are the clock's, and those of computing: of the two, the one's that computes longer,
which other programs lengthen far less. The first step is checked to move the weights alike.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from multiprocessing.connection import Connection

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import UNET_PRESETS
from model.unet import UNet
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.engine import Engine
from tests.benchmarks.gpu_networks import fill, inputs_of

UNET, BATCH, SIDE, ROUNDS = UNET_PRESETS["tiny-base"], 8, 32, 5


class Worker:
    """One of `world` workers, with its slice of the batch."""

    def __init__(self, rank: int, world: int, port: int) -> None:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
        os.environ["WORLD_SIZE"] = str(world)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
        size = BATCH // world
        self.inputs = [
            tensor[rank * size : (rank + 1) * size]
            for tensor in inputs_of(UNET, BATCH, (SIDE, SIDE), "cpu", torch.float32)
        ]
        self.seen = 0
        network = fill(UNet(UNET))
        self.start = {name: value.clone() for name, value in network.state_dict().items()}
        self.engine = Engine(
            "unet",
            network.train(),
            optimizer=OptimizerConfig(),
            schedule=ScheduleConfig(images=10**9, checkpoint_images=1),
            batch=BatchConfig(global_size=BATCH, micro_size=size),
            workers=WorkersConfig(count=world),
            ema=EMAConfig(),
        )

    def step(self) -> None:
        """A step of the global batch."""
        self.seen += BATCH
        self.engine.backward(F.mse_loss(self.engine(*self.inputs), self.inputs[0]))
        self.engine.step(self.seen)

    def moved(self) -> Tensor:
        """How far the weights are from where they began."""
        weights = self.engine.network.state_dict()
        return torch.cat([(weights[name] - value).flatten() for name, value in self.start.items()])


def serve(rank: int, port: int, pipe: Connection) -> None:
    """A step at each message, and what it moved when it is asked; None ends the worker."""
    worker = Worker(rank, 2, port)
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        if request == "step":
            begun = time.process_time()
            worker.step()
            pipe.send(time.process_time() - begun)
        else:
            pipe.send(worker.moved().numpy())


@pytest.mark.timeout(1200)
def test_two_workers() -> None:
    context, (port, own_port) = multiprocessing.get_context("spawn"), _free_ports()
    pipes, processes = [], []
    for rank in range(2):
        here, there = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, port, there), daemon=True))
        processes[-1].start()
        pipes.append(here)
    one = Worker(0, 1, own_port)
    try:
        assert [pipe.recv() for pipe in pipes] == ["ready", "ready"]

        def two() -> tuple[float, float]:
            begun = time.perf_counter()
            for pipe in pipes:
                pipe.send("step")
            computing = max(pipe.recv() for pipe in pipes)
            return time.perf_counter() - begun, computing

        def alone() -> tuple[float, float]:
            begun, computed = time.perf_counter(), time.process_time()
            one.step()
            return time.perf_counter() - begun, time.process_time() - computed

        two()
        alone()
        pipes[0].send("moved")
        theirs, ours = torch.from_numpy(pipes[0].recv()), one.moved()
        error = float((ours - theirs).norm() / ours.norm())
        assert error < 0.05, f"the first step differs by {error:.1e}"
        rounds = [(two(), alone()) for _ in range(ROUNDS)]
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(30)
        torch.distributed.destroy_process_group()
    print(f"\na step of {BATCH} at {SIDE} x {SIDE} latents; the first step differs by {error:.1e}")
    for place, what in enumerate(("clock", "computing")):
        for side, name in enumerate(("two workers", "one worker")):
            values = [both[side][place] for both in rounds]
            print(f"  {what:<10} {name:<12} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})")
        ratios = [ours[place] / theirs[place] for theirs, ours in rounds]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"  {what:<10} two are {spread} times as fast")


def _free_ports() -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
