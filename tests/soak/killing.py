"""What the loops that kill share: a Ray cluster that the test's own process stays out of, and a table of what fell.

A process that has joined a cluster dies with it. So these loops start the cluster and each job as processes of their
own, and kill only what is below one of these, by its pid.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import psutil
import torch

from tests.conftest import BIN, ROOT, _start_head, _wait_for, free_port

UP, PATIENCE = "Ray runtime started.", 120.0
NOTICED = {  # deaths are noticed in some 10 s and not in a minute, by jobs as well; a busy machine answers within 10
    "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
}


class OwnCluster:
    """A Ray cluster of a head, and of further nodes on this machine, that may die and is started again."""

    def __init__(self) -> None:
        self.address = ""
        self.nodes: list[Node] = []

    def __enter__(self) -> OwnCluster:
        os.environ.update({"PYTHONUNBUFFERED": "1", **NOTICED})
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def environment(self) -> dict[str, str]:
        """What a job needs to reach it."""
        return os.environ | {"RAY_ADDRESS": self.address}

    def start(self) -> None:
        """Start the head, at a new address. Ray gives a node 30 s, too few at times on a busy machine."""
        for last in (False, False, True):
            folder, port = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp")), free_port()  # sockets need a short path
            self.address = f"127.0.0.1:{port}"
            head = Node(_start_head(port, free_port(), folder), folder, "head.log")
            self.nodes = [head]
            if head.comes_up():
                return
            self.kill()
            assert not last, "the head did not come up three times"

    def add_node(self, cpus: int) -> Node:
        """Start a further node, without waiting for it; it is started again where Ray's 30 s were too few."""
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        command = [str(BIN / "ray"), "start", f"--address={self.address}", "--block", f"--num-cpus={cpus}"]
        command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000", "--disable-usage-stats"]
        agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
        command += [f"--{agent}-port={free_port()}" for agent in agents]  # else it waits for the agents to choose
        node = Node(_start_node(command, folder), folder, "node.log")
        threading.Thread(target=node.keep_up, args=(command,), daemon=True).start()
        self.nodes.append(node)
        return node

    def workers(self, title: str) -> list[psutil.Process]:
        """Its workers at work whose title holds `title`, whichever node they are on."""
        return [process for node in self.nodes for process in node.below() if title in _title(process)]

    def kill(self) -> None:
        """Kill all of it."""
        for node in self.nodes:
            node.kill()
        self.nodes = []


@dataclass
class Node:
    """A node of the cluster: what `ray start --block` has started."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: str
    wanted: bool = True

    def keep_up(self, command: Sequence[str]) -> None:
        """Start it again each time that it ends before it is killed."""
        while self.process.wait() is not None and self.wanted:
            self.process = _start_node(command, self.folder)

    def comes_up(self) -> bool:
        """Wait until it is up; False where it has ended instead."""
        seen = lambda: UP in (self.folder / self.log).read_text(errors="replace")  # noqa: E731
        _wait_for(lambda: self.process.poll() is not None or seen(), PATIENCE, f"{self.folder}: did not come up")
        return seen()

    def below(self) -> list[psutil.Process]:
        """All its processes but `ray start` itself."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill_raylet(self) -> None:
        """Kill what makes it a node, and wait until `ray start` has noticed and ended; what is left then is killed."""
        below, self.wanted = self.below(), False
        _kill([process for process in below if _name(process) == "raylet"])
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.kill(below)

    def kill(self, below: Sequence[psutil.Process] = ()) -> None:
        """Kill all its processes, and forget its files; where it died of itself, its log is shown."""
        if not below and self.wanted and self.process.poll() is not None:
            print((self.folder / self.log).read_text(errors="replace")[-3000:], flush=True)
        self.wanted = False
        _kill([*below, *self.below()])
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _start_node(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / "node.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)


def _kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()  # which looks whether the pid is still the same process


def _title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        words = " ".join(process.cmdline())
        return words if words.startswith("ray::") else ""
    return ""


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def write_vae(file: Path) -> None:
    """A tiny VAE of random weights."""
    from model.config import VAE_PRESETS
    from model.vae import VAE
    from model.weights import Kind, save_weights

    torch.manual_seed(1)
    vae = VAE(VAE_PRESETS["tiny"])
    save_weights(file, vae.state_dict(), Kind.VAE, vae.config)


def start_job(cluster: OwnCluster, log: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A job, as a person starts it, on the cluster."""
    with open(log, "ab") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT, env=cluster.environment)


def ended(job: subprocess.Popen[bytes], log: Path, seconds: float, told: str) -> int:
    """Wait for a job; one that hangs is killed, with an error that has `told` and the end of its log."""
    try:
        return job.wait(seconds)
    except subprocess.TimeoutExpired:
        stack = subprocess.run([str(BIN / "py-spy"), "dump", "--pid", str(job.pid)], capture_output=True, text=True)  # noqa: PLW1510
        job.kill()
        job.wait()
        raise AssertionError(f"{told}: no end after {seconds:g} s\n{stack.stdout}\n{tail(log)}") from None


def tail(log: Path) -> str:
    """The end of a log."""
    return log.read_text(errors="replace")[-4000:]


def until(ready: Callable[[], object], job: subprocess.Popen[bytes], seconds: float = 1e9) -> bool:
    """Wait until `ready`; False where the job ends, or the time is over, before."""
    deadline = time.monotonic() + seconds
    while job.poll() is None and time.monotonic() < deadline:
        if ready():
            return True
        time.sleep(0.05)
    return False


@dataclass
class Tally:
    """What a loop has done, and the table of it."""

    name: str
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By kind, and where they fell."""
    counts: Counter[str] = field(default_factory=Counter)
    """Outputs, restarts, rows compared ..."""
    seeds: list[int] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)
    load: list[float] = field(default_factory=list)

    def __enter__(self) -> Tally:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.show()  # also of a loop that is broken off

    def killed(self, kind: str, where: str) -> None:
        """Count a kill, and say so."""
        self.kills[kind, where] += 1
        self.load.append(os.getloadavg()[0])
        print(f"{time.monotonic() - self.begun:6.1f} s: {kind} in {where}", flush=True)

    def of(self, kind: str) -> int:
        """Kills of a kind."""
        return sum(count for (name, _), count in self.kills.items() if name == kind)

    def show(self) -> None:
        """Print the table."""
        places = sorted({place for _, place in self.kills})
        kinds = sorted({kind for kind, _ in self.kills})
        width = max([len(place) for place in places] + [5])
        minutes = (time.monotonic() - self.begun) / 60
        load = f", load {min(self.load):.1f} to {max(self.load):.1f}" if self.load else ""
        print(f"\n{self.name}: {sum(self.kills.values())} kills in {minutes:.1f} minutes{load}; seeds {self.seeds}")
        print(f"  {'':<{width}} " + " ".join(f"{kind:>10}" for kind in kinds))
        for place in places:
            print(f"  {place:<{width}} " + " ".join(f"{self.kills[kind, place] or '':>10}" for kind in kinds))
        print(f"  {'all':<{width}} " + " ".join(f"{self.of(kind):>10}" for kind in kinds))
        print("  " + ", ".join(f"{count} {what}" for what, count in self.counts.items()), flush=True)
