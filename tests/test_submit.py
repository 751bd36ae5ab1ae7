"""Jobs as they are submitted to a cluster that runs already, under token authentication."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ray
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import train_base
from jobs.config import TrainBaseJob
from pipelines.schema import require_manifest
from pipelines.storage import Storage
from tests.conftest import BIN, ROOT, SCHEDULE, Cluster, Demo, Finished
from tests.test_survival import assert_same_weights, curve

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and line feed: bars that redraw, colours


def submit(
    cluster: Cluster, folder: Path, *entrypoint: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`ray job submit` from a directory that is not the checkout."""
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", str(ROOT)]
    return subprocess.run(
        [*command, "--", sys.executable, "-m", *entrypoint],
        cwd=folder,
        env=cluster.environment if environment is None else environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_submitted_job_does_its_work_and_its_exit_status_is_true(
    cluster: Cluster, finished: Finished, tmp_path: Path
) -> None:
    config = "jobs/configs/demo/cpu/preprocess.toml"
    arguments = finished.arguments("preprocess", f'index="{tmp_path}/index"', 'stages=["index"]')
    done = submit(cluster, tmp_path, "jobs.preprocess", config, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"index: {finished.images + 3} made" in done.stdout
    assert re.search(rf"index: 100%.* {finished.images + 3}/{finished.images + 3} ", done.stdout)
    ours = require_manifest(Storage(str(tmp_path / "index")), "index")
    assert ours.counts == require_manifest(Storage(str(finished.root / "index")), "index").counts

    failed = submit(cluster, tmp_path, "jobs.preprocess", config)  # relative outputs would be lost with the directory
    assert failed.returncode != 0
    assert "temporary copy of its directory" in failed.stdout


def test_a_job_by_the_python_sdk_that_is_stopped_goes_on_with_the_same_command(
    cluster: Cluster, finished: Finished, tmp_path: Path
) -> None:
    for part in ("latents", "vae"):
        shutil.copytree(finished.root / part, tmp_path / part)
    demo, client = Demo(tmp_path), JobSubmissionClient(cluster.dashboard)
    config, arguments = "jobs/configs/demo/cpu/train_base.toml", demo.arguments("train_base", *SCHEDULE)
    slow = "task.samples.steps=40"  # time to stop it in, and a setting that may differ
    words = [sys.executable, "-m", "jobs.train_base", config, *arguments, slow]
    job = client.submit_job(entrypoint=" ".join(f"'{word}'" for word in words), runtime_env={"working_dir": str(ROOT)})
    checkpointed = lambda: any((tmp_path / "base").glob("checkpoints/checkpoint_*/progress.json"))  # noqa: E731
    wait(lambda: checkpointed() or client.get_job_status(job).is_terminal())
    assert client.get_job_status(job) == JobStatus.RUNNING, client.get_job_logs(job)[-3000:]
    client.stop_job(job)
    wait(lambda: client.get_job_status(job).is_terminal())
    log = client.get_job_logs(job)
    assert client.get_job_status(job) == JobStatus.STOPPED, log[-3000:]
    assert "train base: " in log
    assert CONTROL.findall(log) == []
    assert not (tmp_path / "base" / "weights.safetensors").exists()

    environment = client.get_job_info(job).runtime_env
    assert environment is not None
    assert environment.keys() <= {"working_dir", "env_vars", "_ray_commit"}  # nothing is installed
    session = ray._private.worker._global_node.get_session_dir_path()
    package = environment["working_dir"].rpartition("/")[2].removesuffix(".zip")
    copied = [p for p in Path(session, "runtime_resources/working_dir_files", package).rglob("*") if p.is_file()]
    assert any(path.name == "train_base.py" for path in copied)
    assert sum(path.stat().st_size for path in copied) < 20e6
    assert not any(".venv" in path.parts for path in copied)

    train_base.run(demo.load(TrainBaseJob, "train_base", *SCHEDULE))
    assert json.loads((tmp_path / "base" / "run.json").read_text())["finished_images"] == 32
    assert_same_weights(tmp_path / "base", finished.root / "base")
    assert curve(tmp_path, "images_seen") == [8, 16, 24, 32]


def wait(until: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_client_without_the_token_is_refused(cluster: Cluster, finished: Finished, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    config = "jobs/configs/demo/cpu/preprocess.toml"
    refused = submit(cluster, tmp_path, "jobs.preprocess", config, environment=environment)
    assert refused.returncode != 0
