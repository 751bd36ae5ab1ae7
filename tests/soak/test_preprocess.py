"""Preprocessing on a real Ray that dies in all its parts at random: in the end the rows are an unbroken run's.

    python -m pytest tests/soak/test_preprocess.py -s --soak 8

Killed with kill -9 are the driver, tasks, the encoder's actor, the raylet, and the whole cluster, and then the same
command is started until it is done. Outputs lie on local disk, and in turns on an S3 server behind a proxy that fails a
share of all requests; there the images lie too.
"""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from jobs.demo_images import render_images
from pipelines.lease import FOLDER as LEASES
from pipelines.schema import Column, data_files, require_manifest
from pipelines.storage import TEMPORARY, Storage, StorageOptions
from tests.conftest import S3
from tests.faulty import Fault, Proxy, faulty
from tests.soak.killing import OwnCluster, Tally, ended, start_job, tail, until, write_vae

IMAGES, LONGEST = 40, 96
MOST_KILLS = 9  # of one output, so that it comes to its end
MOST_WORKERS = 3  # of one run: Ray starts a task or an actor again as often
KINDS = {"driver": 0.2, "task": 0.15, "encoder": 0.15, "raylet": 0.2, "cluster": 0.3}
WITHOUT_CLUSTER = ("\nerror: ", "Failed to register worker to Raylet", "Failed to connect to GCS")
"""What a job says whose cluster is gone: ours, and Ray's own where it ends the process while it joins the cluster."""
TITLES = {"task": "ray::MapBatches", "encoder": "ray::MapWorker(MapBatches(Encoder))"}
SHARE = 0.05  # of requests that fail
FAULTS = (Fault.BUSY, Fault.LOST_ANSWER, Fault.RESET, Fault.RESET_HALFWAY, Fault.CUT, Fault.SLOW)
HANG = 240.0  # seconds after which a job that nobody kills any more hangs
SETTINGS = """
index_rows_per_file = 2
[source]
path = "{source}"
[buckets]
table = [[16, 48], [24, 40], [32, 32], [40, 24], [48, 16]]
multiple = 8
[vae]
preset = "tiny"
path = "{root}/vae.safetensors"
[text]
preset = "tiny"
seed = 2
[crop]
flip_chance = 0.5
[encode]
rows_per_file = 4
batch = 4
crops = 2
[tracking]
uri = "sqlite:///{root}/mlflow.db"
[storage]
{storage}
"""


@dataclass(frozen=True)
class Place:
    """Where outputs of a kind lie, and what their jobs are told."""

    name: str
    folder: Storage
    """As the test reaches it, past any proxy."""
    settings: Path

    def arguments(self, output: str) -> list[str]:
        """The command's, for one output."""
        parts = [f"{part}={self.folder.uri}/{output}/{part}" for part in ("index", "latents")]
        return [str(self.settings), *parts]


@dataclass
class Loop:
    """One output: the command again and again, killed as the seed has it, until it is done."""

    cluster: OwnCluster
    tally: Tally
    random: random.Random
    arguments: list[str]
    logs: Path
    seconds: float
    """What an unbroken run takes."""
    left: int
    """Kills that are left."""
    until: float
    """When the last process is killed, by the monotonic clock."""

    def run(self) -> None:
        for attempt in itertools.count():
            log = self.logs / f"attempt-{attempt}.log"
            driver = start_job(self.cluster, log, "jobs.preprocess", *self.arguments)
            survives = self._kill_some(driver, log)
            code = ended(driver, log, HANG, f"seeds {self.tally.seeds}, {log}")
            if code == 0:
                return
            assert not survives, f"seeds {self.tally.seeds}: ended with {code}\n{tail(log)}"
            if not self.cluster.nodes:
                said = log.read_text(errors="replace")
                assert code == 1, tail(log)
                assert any(words in said for words in WITHOUT_CLUSTER), tail(log)
                self.cluster.start()
            self.tally.counts["restarts"] += 1

    def _kill_some(self, driver: subprocess.Popen[bytes], log: Path) -> bool:
        """Kill, while this run lives on; gives whether it should come to its end."""
        workers = 0
        while self.left and workers < MOST_WORKERS and time.monotonic() < self.until:
            kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
            if not self._moment(kind, driver):
                return True  # too late: it is done
            victims = self.cluster.workers(TITLES[kind]) if kind in TITLES else []
            if kind in TITLES and not victims:
                continue
            where = where_in(log.read_text(errors="replace"))
            if kind in TITLES:
                self.random.choice(victims).kill()
                workers += 1
            elif kind == "driver":
                driver.kill()
            elif kind == "raylet":
                self.cluster.nodes[0].kill_raylet()
                self.cluster.nodes = []
            else:
                self.cluster.kill()
            self.left -= 1
            self.tally.killed(kind, where)
            if kind not in TITLES:
                return False
        return True

    def _moment(self, kind: str, driver: subprocess.Popen[bytes]) -> bool:
        """Wait for a moment to kill: soon after such a worker is at work, or any worker, or whenever it comes."""
        longest = self.seconds
        if kind in TITLES or self.random.random() < 0.5:
            title = TITLES.get(kind, "ray::Map")
            if not until(lambda: self.cluster.workers(title), driver):
                return False
            longest = 1.0 if kind in TITLES else 4.0
        until(lambda: False, driver, self.random.uniform(0, longest))
        return driver.poll() is None


def where_in(text: str) -> str:
    """What a run was at, by what it has printed."""
    where = "start"
    for stage in ("index", "latents"):
        if re.search(rf"^{stage}: +\d+%", text, re.MULTILINE):
            where = f"{stage}, rows"
        if re.search(rf"^{stage}: +100%", text, re.MULTILINE):
            where = f"{stage}, commit and report"
        if re.search(rf"^{stage}: (nothing new|\d+ made)", text, re.MULTILINE):
            where = f"after {stage}"
    return where


def rows_of(dataset: Storage, kind: str) -> dict[str, dict[str, Any]]:
    """The rows of a dataset by key. No key is there twice."""
    files = data_files(dataset, require_manifest(dataset, kind))
    rows = [row for file in files for row in dataset.read_table(file.name).to_pylist()]
    found = {row[Column.KEY]: row for row in rows}
    assert len(found) == len(rows), f"{dataset.uri}: a row is there twice"
    return found


def compare(ours: Storage, theirs: Storage, tally: Tally) -> None:
    """Row by row: all columns are equal, but that passes of another size round numbers of networks differently."""
    found, expected = (rows_of(place.folder("index"), "index") for place in (ours, theirs))
    assert found == expected
    tally.counts["index rows the same"] += len(found)
    found, expected = (rows_of(place.folder("latents"), "latents") for place in (ours, theirs))
    assert found.keys() == expected.keys()
    for key, row in found.items():
        for column, value in row.items():
            other = expected[key][column]
            if value == other:
                continue
            values, others = (entry if isinstance(entry, list) else [entry] for entry in (value, other))
            for one, two in zip(values, others, strict=True):
                assert isinstance(one, bytes), f"{key}: {column} is {value}, and was {other}"
                numbers = [np.frombuffer(data, np.float16).astype(float) for data in (one, two)]
                np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.005)
            tally.counts["tensors rounded differently"] += 1
    tally.counts["latents rows the same"] += len(found)


def nothing_is_left(folder: Storage) -> None:
    """No claim and no temporary file is left of what was killed, and all that a manifest names is there."""
    for kind in ("index", "latents"):
        dataset = folder.folder(kind)
        claims = [file.name for file in dataset.list(LEASES) if not file.name.endswith(".broken")]
        assert not claims
        named = {file.name for file in data_files(dataset, require_manifest(dataset, kind))}
        assert named <= {file.name for file in dataset.list("data")}
        if dataset.is_local:
            assert not list(Path(dataset.uri).rglob(f"{TEMPORARY}*"))


@pytest.fixture(scope="module")
def proxy(s3: S3) -> Iterator[Proxy]:
    with faulty(s3.endpoint) as running:
        yield running


@pytest.mark.timeout(0)
def test_rows_are_those_of_an_unbroken_run_whatever_of_ray_dies(
    s3: S3, proxy: Proxy, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    render_images(tmp_path / "images", IMAGES, LONGEST)
    write_vae(tmp_path / "vae.safetensors")
    seed, tally = time.time_ns() % 1_000_000, Tally("preprocessing")
    remote = Storage(f"s3://{s3.bucket}/soak-{seed}", StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1"))
    for image in (tmp_path / "images").iterdir():
        remote.write(f"images/{image.name}", image.read_bytes())
    places = []
    for name, folder in (("local", Storage(str(tmp_path))), ("s3", remote)):
        settings = tmp_path / f"{name}.toml"
        reach = f's3_endpoint = "{proxy.endpoint}"\ns3_region = "us-east-1"'
        settings.write_text(SETTINGS.format(root=tmp_path, source=f"{folder.uri}/images", storage=reach))
        places.append(Place(name, folder, settings))
    seconds: dict[str, float] = {}
    with OwnCluster() as cluster, tally:
        end = tally.begun + 60 * pytestconfig.getoption("--soak")
        while time.monotonic() < end:
            place, output = places[seed % 2], f"seed-{seed}"
            if place.name not in seconds:
                proxy.inject(None)
                seconds[place.name] = unbroken(place, cluster, tmp_path)
                end += seconds[place.name]
            proxy.shower(seed, SHARE, FAULTS)
            logs, draws = tmp_path / f"logs-{seed}", random.Random(seed)
            logs.mkdir()
            tally.seeds.append(seed)
            arguments = place.arguments(output)
            left = draws.randint(4, MOST_KILLS)
            Loop(cluster, tally, draws, arguments, logs, seconds[place.name], left, end).run()
            compare(place.folder.folder(output), place.folder.folder("unbroken"), tally)
            nothing_is_left(place.folder.folder(output))
            again = start_job(cluster, logs / "again.log", "jobs.preprocess", *arguments)
            assert ended(again, logs / "again.log", HANG, "once more") == 0
            said = (logs / "again.log").read_text()
            assert re.findall("^(?:index|latents): nothing new", said, re.MULTILINE) == [
                "index: nothing new",
                "latents: nothing new",
            ], said
            tally.counts[f"outputs ({place.name})"] += 1
            tally.counts["requests failed"] += len(proxy.seen)
            seed += 1
    print("  runs on the MLflow page:", runs_by_status(tmp_path))
    assert tally.kills
    assert "RUNNING" not in runs_by_status(tmp_path)


def unbroken(place: Place, cluster: OwnCluster, folder: Path) -> float:
    """Make the output that all others of the place are compared with; gives the seconds it took."""
    begun, log = time.monotonic(), folder / f"unbroken-{place.name}.log"
    job = start_job(cluster, log, "jobs.preprocess", *place.arguments("unbroken"))
    assert ended(job, log, HANG, "the unbroken run") == 0, tail(log)
    seconds = time.monotonic() - begun
    print(f"an unbroken run ({place.name}) takes {seconds:.0f} s", flush=True)
    return seconds


def runs_by_status(folder: Path) -> dict[str, int]:
    """How many runs a database of MLflow has in each state."""
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return dict(Counter(run.info.status for run in client.search_runs(experiments)))
