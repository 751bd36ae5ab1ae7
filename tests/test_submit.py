"""Jobs submitted to a cluster that runs already, under token authentication; what the MLflow page shows of them.

The MLflow server is that of infra/compose.yaml, on PostgreSQL and S3, and its address has a password in it.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import ray
from click.testing import CliRunner
from mlflow import MlflowClient
from ray.dashboard.modules.job.cli import job_cli_group
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import train_base
from jobs.cli import load
from jobs.training_config import TrainBaseJob
from pipelines.config import without_secrets
from pipelines.schema import require_manifest
from pipelines.storage import Storage
from tests.conftest import BIN, ROOT, S3, SCHEDULE, Cluster, Demo, Finished
from tests.servers import browser_page, composed_mlflow
from tests.test_survival import assert_same_weights

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # all but tab and line feed: bars that redraw, colours
PASSWORD = secrets.token_hex(16)
WORDS = "workflowType=machine_learning"


def ray_job(
    cluster: Cluster, folder: Path, *words: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`ray job ...`, from a directory that is not the checkout."""
    return subprocess.run(
        [str(BIN / "ray"), "job", words[0], "--address", cluster.dashboard, *words[1:]],
        cwd=folder,
        env=cluster.environment if environment is None else environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def submit(
    cluster: Cluster, folder: Path, *entrypoint: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`ray job submit` of a job, with the checkout as its working directory."""
    words = ["submit", "--working-dir", str(ROOT), "--", sys.executable, "-m", *entrypoint]
    return ray_job(cluster, folder, *words, environment=environment)


def ask(cluster: Cluster, *words: str) -> str:
    """What `ray job ...` prints, without the seconds that a process takes to start."""
    told = CliRunner().invoke(job_cli_group, [words[0], "--address", cluster.dashboard, *words[1:]])
    assert told.exit_code == 0, told.output
    return told.output


@dataclass(frozen=True)
class Tracking:
    """The MLflow server."""

    uri: str
    database: Any

    def settings(self, name: str, folder: Path) -> str:
        """A shipped configuration that names the server, as a file: a command line is seen by many."""
        path = folder / f"{name}.toml"
        shipped = (ROOT / "jobs/configs/demo/cpu" / f"{name}.toml").read_text()
        path.write_text(f'{shipped}\n[tracking]\nuri = "{self.uri}"\n')
        return str(path)


@pytest.fixture(scope="module")
def tracking(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracking]:
    with composed_mlflow(s3, tmp_path_factory.mktemp("mlflow")) as (port, database):
        yield Tracking(f"http://me:{PASSWORD}@127.0.0.1:{port}", database)


def places(demo: Demo, name: str, *overrides: str) -> list[str]:
    return [word for word in demo.arguments(name, *overrides) if not word.startswith("tracking.")]


@dataclass(frozen=True)
class Job:
    """A job that was submitted."""

    folder: Path
    output: str
    """All that it printed."""
    listed: str = ""
    """What `ray job list` and `ray job logs` say of it."""
    returncode: int | None = None
    stopped: bool = False
    environment: dict[str, Any] | None = None


@pytest.fixture(scope="module")
def indexed(cluster: Cluster, finished: Finished, tracking: Tracking, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Preprocessing, submitted by the command line."""
    folder = tmp_path_factory.mktemp("indexed")
    words = places(finished, "preprocess", f'index="{folder}/index"', 'stages=["index"]')
    done = submit(cluster, folder, "jobs.preprocess", tracking.settings("preprocess", folder), *words)
    return Job(folder, done.stdout + done.stderr, returncode=done.returncode)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, finished: Finished, tracking: Tracking, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Training, submitted by the Python SDK, stopped by the command line, and gone on with by the same settings."""
    folder = tmp_path_factory.mktemp("trained")
    for part in ("latents", "vae"):
        shutil.copytree(finished.root / part, folder / part)
    client, config = JobSubmissionClient(cluster.dashboard), tracking.settings("train_base", folder)
    arguments = places(Demo(folder), "train_base", *SCHEDULE)
    slow = ["schedule.sample_images=32", "task.samples.steps=1000"]  # time to stop it in; settings that may differ
    words = [sys.executable, "-m", "jobs.train_base", config, *arguments, *slow]
    job = client.submit_job(entrypoint=" ".join(f"'{word}'" for word in words), runtime_env={"working_dir": str(ROOT)})
    checkpointed = lambda: any((folder / "base").glob("checkpoints/checkpoint_*/progress.json"))  # noqa: E731
    wait(lambda: checkpointed() or client.get_job_status(job).is_terminal())
    assert client.get_job_status(job) == JobStatus.RUNNING, client.get_job_logs(job)[-3000:]
    ask(cluster, "stop", job)
    wait(lambda: client.get_job_status(job).is_terminal())
    stopped = client.get_job_status(job) == JobStatus.STOPPED and not (folder / "base/weights.safetensors").exists()
    train_base.run(load(TrainBaseJob, config, arguments))
    listed = ask(cluster, "list") + ask(cluster, "logs", job)
    return Job(folder, client.get_job_logs(job), listed, None, stopped, client.get_job_info(job).runtime_env)


def test_a_submitted_job_does_its_work_and_its_exit_status_is_true(
    cluster: Cluster, finished: Finished, indexed: Job, tmp_path: Path
) -> None:
    assert indexed.returncode == 0, indexed.output[-3000:]
    assert f"index: {finished.images + 3} made" in indexed.output
    assert re.search(rf"index: 100%.* {finished.images + 3}/{finished.images + 3} ", indexed.output)
    ours = require_manifest(Storage(str(indexed.folder / "index")), "index")
    assert ours.counts == require_manifest(Storage(str(finished.root / "index")), "index").counts

    failed = submit(cluster, tmp_path, "jobs.preprocess", "jobs/configs/demo/cpu/preprocess.toml")
    assert failed.returncode != 0  # relative outputs would be lost with the directory
    assert "temporary copy of its directory" in failed.stdout


def test_a_job_by_the_python_sdk_that_is_stopped_goes_on_with_the_same_command(
    finished: Finished, trained: Job
) -> None:
    assert trained.stopped, trained.output[-3000:]
    assert "train base: " in trained.output
    assert "jobs.train_base" in trained.listed  # `ray job list`, whose entrypoints these are
    assert "train base: " in trained.listed  # `ray job logs`
    assert CONTROL.findall(trained.output) == []
    assert trained.environment is not None
    assert trained.environment.keys() <= {"working_dir", "env_vars", "_ray_commit"}  # nothing is installed
    session = ray._private.worker._global_node.get_session_dir_path()
    package = trained.environment["working_dir"].rpartition("/")[2].removesuffix(".zip")
    copied = [p for p in Path(session, "runtime_resources/working_dir_files", package).rglob("*") if p.is_file()]
    assert any(path.name == "train_base.py" for path in copied)
    assert sum(path.stat().st_size for path in copied) < 20e6
    assert not any(".venv" in path.parts for path in copied)
    assert json.loads((trained.folder / "base" / "run.json").read_text())["finished_images"] == 32
    assert_same_weights(trained.folder / "base", finished.root / "base")


def wait(until: Callable[[], bool], seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def shown(indexed: Job, trained: Job, tracking: Tracking) -> Iterator[Any]:
    """A browser's tab, after all has happened that it looks at."""
    with browser_page() as page:
        yield page


class Page:
    """MLflow's page in a browser; what was looked at is kept as a picture, in $SCREENSHOTS or the test's folder."""

    def __init__(self, tab: Any, tracking: Tracking, folder: Path) -> None:
        self.tab, self.folder = tab, Path(os.environ.get("SCREENSHOTS", folder))
        self.address = without_secrets(tracking.uri).replace("***@", "")
        self.client = MlflowClient(tracking_uri=self.address)

    def run(self, stage: str) -> Any:
        """The one run of a stage."""
        experiment = self.client.get_experiment_by_name(f"sdxl-{stage}").experiment_id
        (run,) = self.client.search_runs([experiment])
        return run

    def of_run(self, run: Any, part: str = "") -> None:
        """Open a run, or a part of its page."""
        self.open(f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}{part and '/' + part}")

    def open(self, path: str, more: str = "") -> None:
        """Open an address below the server's."""
        self.tab.goto(f"{self.address}/#/{path}?{WORDS}{more}")

    def has(self, *texts: str) -> None:
        """Wait until each text can be seen."""
        for text in texts:
            self.tab.get_by_text(text).filter(visible=True).first.wait_for()

    def picture(self, selector: str) -> None:
        """Wait until a picture is shown that the browser could decode."""
        self.tab.locator(selector).first.wait_for()
        self.tab.wait_for_function(f"document.querySelector({selector!r}).naturalWidth >= 32")

    def keep(self, name: str) -> None:
        """Keep a picture of what is shown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=self.folder / f"{name}.png", timeout=120_000)


@pytest.fixture
def page(shown: Any, tracking: Tracking, tmp_path: Path) -> Page:
    return Page(shown, tracking, tmp_path)


def test_the_page_lists_experiments_with_what_they_are(page: Page) -> None:
    page.open("experiments")
    page.has("sdxl-index", "sdxl-base", "Every input image", "Training of the base")
    page.keep("experiments")


def test_the_page_of_a_training_run_says_what_it_made_of_what(page: Page, trained: Job) -> None:
    run = page.run("base")
    assert run.info.status == "FINISHED"
    steps = [point.step for point in page.client.get_metric_history(run.info.run_id, "images_seen")]
    assert steps == [8, 16, 24, 32]  # the stopped job's and its successor's, on one curve
    latents = require_manifest(Storage(str(trained.folder / "latents")), "latents")
    page.of_run(run)
    page.has(
        "Finished", "jobs.train_base", f"latents ({latents.digest})", f"{trained.folder}/base", "sdxl-base", "loss_unet"
    )
    page.keep("run")
    page.tab.get_by_text(f"latents ({latents.digest})").first.click()
    page.has(f"{trained.folder}/latents", str(latents.rows))
    page.keep("lineage")


def test_a_run_is_found_by_name_tag_description_and_setting(page: Page, trained: Job) -> None:
    run = page.run("base")
    for search in (
        "attributes.run_name = 'base'",
        f"tags.output = '{trained.folder}/base'",
        f"tags.`from.latents` LIKE '%{trained.folder.name}%'",
        f"tags.`mlflow.note.content` LIKE '%{trained.folder.name}%'",
        "params.`optimizer.lr` = '0.001' and tags.stage = 'base'",
    ):
        (found,) = page.client.search_runs([run.info.experiment_id], search)
        assert found.info.run_id == run.info.run_id
    page.open(f"experiments/{run.info.experiment_id}/runs")
    row, box = page.tab.locator(f"a[href*='{run.info.run_id}']").first, page.tab.get_by_placeholder("metrics.rmse")
    for search, state in (("tags.output = 'another'", "hidden"), (f"tags.output = '{trained.folder}/base'", "visible")):
        row.wait_for()
        box.fill(search)
        with page.tab.expect_response("**/runs/search*"):  # until then the list is the one before
            box.press("Enter")
        row.wait_for(state=state)
        page.tab.locator("[class*=spin]").first.wait_for(state="hidden")
        page.keep(f"search-{state}")
        box.fill("")
        with page.tab.expect_response("**/runs/search*"):
            box.press("Enter")


def test_a_runs_charts_and_pictures_are_there(page: Page) -> None:
    run = page.run("base")
    page.of_run(run, "model-metrics")
    page.has("validation", "squared_error")
    page.tab.locator(".js-plotly-plot").first.wait_for()
    page.keep("charts")
    page.tab.get_by_placeholder("Search metric charts").fill("samples")
    page.has("samples_by_original_size")
    page.tab.get_by_test_id("experiment-view-compare-runs-card-menu").first.click()
    page.tab.get_by_role("menuitem", name="Configure").click()
    page.tab.get_by_role("dialog").get_by_text("Show run parameters").click()
    page.tab.get_by_role("button", name="Save changes").click()
    slider = page.tab.get_by_role("slider").first
    slider.focus()
    slider.press("ArrowRight")
    page.picture(".rc-image img")
    page.keep("grid")
    page.of_run(run, "artifacts/pictures/samples/0000000032.jpg")
    page.picture("img[src*='blob:'], .image-container img")
    page.keep("picture")


def test_the_report_of_preprocessing_is_read_on_the_page(page: Page, finished: Finished) -> None:
    page.of_run(page.run("index"), "artifacts/report.html")
    report = page.tab.frame_locator("iframe").first
    report.get_by_text("Index report").wait_for()
    report.get_by_text(str(finished.images + 3), exact=True).first.wait_for()
    page.keep("report")


def test_the_registered_model_names_its_weights_and_its_run(page: Page, trained: Job) -> None:
    page.open("models/sdxl-base/versions/1")
    page.has("Version 1", "newest", f"{trained.folder}/base/weights.safetensors")
    page.tab.get_by_role("link", name="base", exact=True).first.wait_for()
    page.keep("model")


def test_no_password_is_in_logs_outputs_or_the_tracking_server(
    cluster: Cluster, indexed: Job, trained: Job, tracking: Tracking, s3: S3
) -> None:
    address = without_secrets(tracking.uri).replace("***@", "")
    for job in (indexed, trained):
        assert f": {address}/#/experiments/" in job.output  # where to look
        assert PASSWORD not in job.output
        outputs = [path for path in job.folder.rglob("*") if path.is_file() and path.suffix != ".toml"]
        assert [path for path in outputs if PASSWORD.encode() in path.read_bytes()] == []
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    logs = [path for path in session.rglob("*") if path.is_file()]
    assert any(path.name.startswith("job-driver-raysubmit") for path in logs)
    assert [path for path in logs if PASSWORD.encode() in path.read_bytes()] == []
    dump = subprocess.run(
        [str(tracking.database.bin_path / "pg_dump"), tracking.database.get_uri()], capture_output=True, check=True
    )
    assert b"optimizer.lr" in dump.stdout
    assert PASSWORD.encode() not in dump.stdout
    client = boto3.client("s3", endpoint_url=s3.endpoint, region_name="us-east-1")
    found = client.list_objects_v2(Bucket="mlflow")["Contents"]
    assert any(item["Key"].endswith("report.html") for item in found)
    for item in found:
        assert PASSWORD.encode() not in client.get_object(Bucket="mlflow", Key=item["Key"])["Body"].read()


def test_a_client_without_the_token_is_refused(cluster: Cluster, finished: Finished, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    config = "jobs/configs/demo/cpu/preprocess.toml"
    refused = submit(cluster, tmp_path, "jobs.preprocess", config, environment=environment)
    assert refused.returncode != 0
    assert "Invalid authentication token" in refused.stdout + refused.stderr
