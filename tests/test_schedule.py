"""Preprocessing as a schedule runs it: the same command, time after time, on a source that grows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from jobs import preprocess
from jobs.cli import HELD, LOOK, USAGE_ERROR, main
from jobs.config import PreprocessJob
from pipelines.lease import lease
from pipelines.schema import Column, data_files, require_manifest
from pipelines.storage import Storage
from tests.conftest import ROOT, Cluster

CONFIG = str(ROOT / "jobs/configs/demo/cpu/preprocess.toml")


def paths(index: Storage) -> list[str]:
    files = data_files(index, require_manifest(index, "index"))
    return sorted(path for file in files for path in index.read_table(file.name, [Column.PATH]).column(0).to_pylist())


def add(folder: Path, *names: str, caption: str = "a picture") -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        image = Image.effect_noise((64, 64), 80).convert("RGB")
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption)


def test_a_growing_source_on_a_schedule(
    cluster: Cluster, empty_mlflow: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    source, index = tmp_path / "images", Storage(str(tmp_path / "index"))
    arguments = [CONFIG, 'stages=["index"]', f"source.path={source}", f"index={index.uri}"]
    arguments += [f"tracking.uri=sqlite:///{tmp_path}/mlflow.db", "alerts.min_new=3"]
    arguments += ["alerts.reject_share=[0.0,0.4]", "alerts.hold_reject_share=0.8", "alerts.hold_loss_share=0.5"]

    def tick(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ending:
            main(PreprocessJob, preprocess.run, preprocess.plan, [*arguments, *more], needs_ray=False)
        printed = capfd.readouterr()
        return int(ending.value.code or 0), printed.out.rpartition("\n}\n")[2] + printed.err

    add(source, "a", "b", "c")
    code, printed = tick()
    assert code == 0
    assert printed.startswith("index: 3 made in ")

    command = [sys.executable, "-m", "jobs.preprocess", *arguments, "ray.address=127.0.0.1:1"]  # nobody is there
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    idle = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert (idle.returncode, idle.stderr) == (0, "")
    assert idle.stdout.endswith("\n}\nindex: nothing new, 3 rows (3 kept)\n")

    add(source, "d")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index" / "data").rglob("*.parquet")}
    with lease(index):  # as a run that is still at work
        code, printed = tick()
    assert code == USAGE_ERROR
    assert f"{index.uri} is being written by process {os.getpid()}" in printed
    assert tick()[0] == 0
    assert paths(index) == ["a.png", "b.png", "c.png", "d.png"]
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "index" / "data").rglob("*.parquet")}.items()

    add(source, "e", "f", "g", "h")
    add(source, "i", "j", "k", caption="")
    code, printed = tick()
    assert code == LOOK
    assert "error: index: 3 of 7 new images are rejected, a share of 0.429" in printed
    assert len(paths(index)) == 11

    add(source, "l", "m", "n", caption="")
    committed = require_manifest(index, "index").digest
    for _ in range(2):  # it stays held, though nothing is left to measure
        code, printed = tick()
        assert code == HELD
        assert "index: 3 of 3 new images are rejected, a share of 1.000" in printed
    assert require_manifest(index, "index").digest == committed
    code, printed = tick("alerts.hold_reject_share=1", "ray.address=127.0.0.1:1")
    assert code == LOOK
    assert "index: 0 made in" in printed
    assert len(paths(index)) == 14

    for name in "abcdefg":
        (source / f"{name}.png").unlink()
    code, printed = tick()
    assert code == HELD
    assert "1 rows would be kept after 8" in printed
    assert len(paths(index)) == 14

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sdxl-index").experiment_id
    runs = client.search_runs([experiment], order_by=["attributes.start_time"])
    alerts = [(run.data.tags.get("alert"), run.info.status) for run in runs]
    done, look, held = (None, "FINISHED"), ("look", "FINISHED"), ("held", "FAILED")
    assert alerts == [done, done, look, held, held, look, held]  # none where there was nothing to do
    assert runs[2].data.metrics["reject_share_new"] == pytest.approx(3 / 7)
    assert len(client.search_runs([experiment], "tags.alert = 'held'")) == 3
