"""Jobs as they are submitted to a cluster that runs already, under token authentication."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipelines.schema import require_manifest
from pipelines.storage import Storage
from tests.conftest import BIN, ROOT, Cluster, Finished


def submit(
    cluster: Cluster, *entrypoint: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    command = [str(BIN / "ray"), "job", "submit", "--address", cluster.dashboard, "--working-dir", "."]
    return subprocess.run(
        [*command, "--", sys.executable, "-m", *entrypoint],
        cwd=ROOT,
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
    done = submit(cluster, "jobs.preprocess", config, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"index: {finished.images + 3} made" in done.stdout
    ours = require_manifest(Storage(str(tmp_path / "index")), "index")
    assert ours.counts == require_manifest(Storage(str(finished.root / "index")), "index").counts

    failed = submit(cluster, "jobs.preprocess", config)  # relative outputs would be lost with the job's directory
    assert failed.returncode != 0
    assert "temporary copy of its directory" in failed.stdout


def test_a_client_without_the_token_is_refused(cluster: Cluster, finished: Finished) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    refused = submit(cluster, "jobs.preprocess", "jobs/configs/demo/cpu/preprocess.toml", environment=environment)
    assert refused.returncode != 0
