"""What tests share: one Ray cluster for the whole session, an S3 server, and the pipeline run once at tiny size.

The cluster is started as a person starts one, with `ray start --head` and token authentication, so that submitted
jobs meet the same one. Everything is started by the tests, listens on the loopback interface, and ends with them.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.cli import WORKER_ENVIRONMENT

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
LOGICAL_CPUS = 4  # more than the machine may have: workers wait for each other more than they compute
S3_KEY, S3_SECRET, S3_BUCKET = "test-key", secrets.token_hex(16), "sdxl"

os.environ.update(  # before anything imports Ray, which reads its token once
    {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AWS_ACCESS_KEY_ID": S3_KEY,
        "AWS_SECRET_ACCESS_KEY": S3_SECRET,
        "AWS_EC2_METADATA_DISABLED": "true",
        **WORKER_ENVIRONMENT,
    }
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--benchmarks", action="store_true", help="run tests/benchmarks for figures: all, at full size")
    parser.addoption(
        "--soak", type=float, metavar="MINUTES", help="run tests/soak, which kill at random for so long each"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "soak" and not config.getoption("--soak") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the whole system first: they take longest."""
    items.sort(key=lambda item: item.path.parent != ROOT / "tests")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of two processes one runs the tests of the whole system, which share a cluster; other files stay whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ByRoom(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::", maxsplit=1)[0])
            return "whole system" if path.parent == Path("tests") else str(path)

    return ByRoom(config, log)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster."""

    address: str
    dashboard: str
    environment: dict[str, str]
    """What a client needs to reach it."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One cluster, and this process connected to it."""
    import ray

    for last in (False, False, True):
        port, dashboard = free_port(), free_port()
        address = os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
        folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # Ray's sockets need a short path
        head = _start_head(port, dashboard, folder)
        try:
            if _is_up(head, port, address, folder):
                yield Cluster(address, f"http://127.0.0.1:{dashboard}", dict(os.environ))
                ray.shutdown()
                return
            assert not last, (folder / "head.log").read_text()[-3000:]
        finally:
            _end(head)


def _start_head(port: int, dashboard: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--num-cpus={LOGICAL_CPUS}"]
    command += [f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += ["--object-store-memory=1000000000", "--disable-usage-stats"]
    command += [f"--ray-client-server-port={free_port()}"]  # Ray starts its client's server wherever it can
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # a fixed one by default; where it is taken, no job
    with open(folder / "head.log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)


def _is_up(head: subprocess.Popen[bytes], port: int, address: str, folder: Path) -> bool:
    """Whether this process is connected to the cluster. Ray gives a node 30 s to start: too few on a busy machine."""
    ended = lambda: head.poll() is not None  # noqa: E731
    _wait_for(lambda: ended() or _listens(port), 120, f"no GCS: see {folder}/head.log")
    _wait_for(lambda: ended() or _connects(address), 120, f"ray start did not come up: see {folder}/head.log")
    return not ended()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _connects(address: str) -> bool:
    import ray

    try:
        ray.init(address=address, log_to_driver=True, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class S3:
    """A running S3 server with one bucket."""

    endpoint: str
    bucket: str


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """A SeaweedFS server that checks credentials."""
    import boto3
    from botocore.config import Config

    port = free_port()
    with tempfile.TemporaryDirectory(prefix="s3-") as folder:
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = [{"accessKey": S3_KEY, "secretKey": S3_SECRET}]
        identities = {"identities": [{"name": "test", "credentials": keys, "actions": actions}]}
        Path(folder, "s3.json").write_text(json.dumps(identities))
        names = ("master.port", "volume.port", "filer.port", "master.port.grpc", "volume.port.grpc", "filer.port.grpc")
        ports = {name: free_port() for name in (*names, "s3.port.grpc")}
        command = [str(BIN / "weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{name}={value}" for name, value in ports.items()]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=100", "-filer", "-s3", f"-s3.port={port}"]
        command += [f"-s3.config={folder}/s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0"]  # else fixed ports
        with open(Path(folder, "weed.log"), "wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        endpoint = f"http://127.0.0.1:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=20),
        )

        def has_bucket() -> bool:
            try:
                client.create_bucket(Bucket=S3_BUCKET)
                client.put_object(Bucket=S3_BUCKET, Key="ready", Body=b"")
            except Exception:
                return False
            return True

        try:
            _wait_for(has_bucket, 90, f"weed did not come up: {Path(folder, 'weed.log').read_text()[-2000:]}")
            yield S3(endpoint, S3_BUCKET)
        finally:
            _end(server)


def _wait_for(ready: Callable[[], bool], seconds: float, message: str) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(message)
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that this session started, and what it started."""
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in children:
        if child.is_running():
            child.kill()


@contextmanager
def killing(title: str, when: Callable[[], bool] = lambda: True) -> Iterator[list[int]]:
    """Kill -9 the first Ray worker whose title holds `title`, once `when` says so; gives the killed pids.

    Only workers below the cluster that this session started are looked at.
    """
    killed: list[int] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.05):
            if not when():
                continue
            for process in ray_workers(title)[:1]:
                process.kill()
                killed.append(process.pid)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def ray_workers(title: str) -> list[psutil.Process]:
    """Ray workers of the cluster that this session started, whose title holds `title`."""
    return [
        process
        for process in psutil.process_iter(["pid", "cmdline"])
        if (words := " ".join(process.info["cmdline"] or "")).startswith("ray::")
        and title in words
        and _is_ours(process)
    ]


def _is_ours(process: psutil.Process) -> bool:
    try:
        return process.environ().get("RAY_AUTH_TOKEN") == os.environ["RAY_AUTH_TOKEN"]
    except psutil.Error:
        return False


@dataclass(frozen=True)
class Demo:
    """The shipped demo configuration, on a folder of its own, at the size of a test."""

    root: Path
    options: tuple[str, ...] = ()

    def load(self, kind: Any, name: str, *overrides: str) -> Any:
        """A stage's job."""
        from jobs.cli import load

        return load(kind, str(ROOT / "jobs/configs/demo/cpu" / f"{name}.toml"), self.arguments(name, *overrides))

    def arguments(self, name: str, *overrides: str) -> list[str]:
        """The overrides that place a stage in the folder."""
        root = self.root
        vae = {"task.vae.path": "vae"}
        train = ["batch.global_size=8", "batch.micro_size=4", "schedule.log_images=8", "task.samples.steps=2"]
        train += ["batch.validation_share=0.25", "schedule.validation_images=16"]
        sampled = ["schedule.sample_images=16", "optimizer.warmup_images=0", "optimizer.decay_images=0"]
        places = {
            "preprocess": {"source.path": "images", "index": "index", "latents": "latents", "vae.path": "vae"},
            "train_vae": {"output": "vae", "task.index": "index", "task.source.path": "images"},
            "train_base": {"output": "base", "task.latents": "latents", **vae},
            "train_refiner": {"output": "refiner", "task.latents": "latents", **vae},
            "generate": {
                "output": "pictures",
                "generate.base.path": "base",
                "generate.refiner.path": "refiner",
                "generate.vae.path": "vae",
                "generate.prompts.index": "index",
            },
        }[name]
        small = {
            "preprocess": ["index_rows_per_file=8", "encode.rows_per_file=8"],
            "train_vae": [t for t in train if "task" not in t] + sampled + ["task.scaling_images=8"],
            "train_base": train + sampled,
            "train_refiner": train + sampled,
            "generate": ["generate.sampling.steps=5"],
        }[name]
        tracking = [f'tracking.uri="sqlite:///{root}/mlflow.db"']
        return [f'{key}="{root / place}"' for key, place in places.items()] + tracking + small + [*overrides]


@dataclass(frozen=True)
class Finished(Demo):
    """A demo whose stages have all run once."""

    images: int = 0


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without runs, to be copied: making its tables takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


SCHEDULE = ("schedule.images=32", "schedule.checkpoint_images=16")


@pytest.fixture(scope="session")
def finished(cluster: Cluster, empty_mlflow: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Every stage of the pipeline, run once on 24 rendered pictures and three bad files."""
    from jobs import generate, preprocess, train_base, train_refiner, train_vae
    from jobs.config import GenerateJob, PreprocessJob
    from jobs.demo_images import render_images
    from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob

    demo = Finished(tmp_path_factory.mktemp("pipeline"), images=24)
    shutil.copy(empty_mlflow, demo.root / "mlflow.db")
    render_images(demo.root / "images", demo.images, 96)
    job = demo.load(PreprocessJob, "preprocess")
    preprocess.run_stage(job, "index")
    adversarial = "task.loss.adversarial_start_images=16"
    train_vae.run(demo.load(TrainVAEJob, "train_vae", *SCHEDULE, adversarial))
    preprocess.run_stage(job, "latents")
    train_base.run(demo.load(TrainBaseJob, "train_base", *SCHEDULE))
    train_refiner.run(demo.load(TrainRefinerJob, "train_refiner", *SCHEDULE, "workers.zero_stage=2"))
    generate.run(demo.load(GenerateJob, "generate"))
    return demo
