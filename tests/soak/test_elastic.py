"""A node that is lost for good, on a real cluster: training goes on with the workers that are left.

    python -m pytest tests/soak/test_elastic.py --soak 1

Ray needs a minute to notice, so it is no part of the suite, whose tests of the engine cut steps for any number of
workers.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from safetensors.torch import load_file

from jobs import train_base
from jobs.config import TrainBaseJob
from tests.conftest import BIN, LOGICAL_CPUS, Cluster, Finished, _wait_for, free_port
from tests.test_survival import checkpointed, copy_of, curve


@contextmanager
def second_node(cluster: Cluster, cpus: int) -> Iterator[Callable[[], None]]:
    """A node that has joined the cluster; gives what kills all its processes, with kill -9."""
    before = len(_nodes())
    command = [str(BIN / "ray"), "start", f"--address={cluster.address}", "--block", f"--num-cpus={cpus}"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
    agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    command += [f"--{agent}-port={free_port()}" for agent in agents]  # else the node waits for the agents to choose
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)

    def kill() -> None:
        processes = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    try:
        _wait_for(lambda: len(_nodes()) > before, 120, "the second node did not come up")
        yield kill
    finally:
        if node.poll() is None:
            kill()


def _nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"]]


@pytest.mark.timeout(900)
def test_training_goes_on_with_the_workers_that_are_there(
    finished: Finished, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on a node each, one of which is lost for good: the other one goes on, with the same global batch."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    demo, base = copy_of(finished, tmp_path, "latents", "vae"), tmp_path / "base"
    elastic = ("workers.count=2", "workers.min_count=1", f"workers.cpus={LOGICAL_CPUS - 1}")
    often = ("schedule.images=32", "schedule.checkpoint_images=8", "schedule.keep_checkpoints=9")
    lost: list[float] = []

    def lose(node: Callable[[], None]) -> None:
        while 8 not in checkpointed(base):
            time.sleep(0.05)
        node()
        lost.append(time.monotonic())

    with second_node(cluster, LOGICAL_CPUS - 1) as node:
        look_at_nodes()
        losing = threading.Thread(target=lose, args=(node,), daemon=True)
        losing.start()
        train_base.run(demo.load(TrainBaseJob, "train_base", *often, *elastic))
        losing.join(1)
    assert lost
    progress = [json.loads(path.read_text()) for path in sorted(base.glob("checkpoints/*/progress.json"))]
    assert [p["images_seen"] for p in progress] == [8, 16, 24, 32]
    assert sorted({p["workers"] for p in progress}) == [1, 2]
    assert progress[-1]["workers"] == 1
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (base, finished.root / "base"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
    assert curve(tmp_path, "images_seen") == [8, 16, 24, 32]


def look_at_nodes() -> None:
    """Have Ray Train's scaling policy, which looks every 20 s, look now."""
    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(coordinator.get_reserved_resources.remote("tests", recompute=True))
