"""The evaluation job on the real Ray and MLflow: what it says of finished runs, and what another call does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn

from jobs import evaluate
from jobs.cli import JobError, load
from jobs.config import EvaluateJob
from pipelines.config import TrackingConfig
from tests.conftest import Finished


class Pooled(nn.Module):
    """Stands for Inception: the mean colours of an image's quarters."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def job(tmp_path: Path, network: str, table: str) -> EvaluateJob:
    path = tmp_path / f"{network}.toml"
    path.write_text(f"""
        output = "{tmp_path}/evaluation-{network}"
        tracking.uri = "sqlite:///{tmp_path}/mlflow.db"
        [evaluate]
        network = "{network}"
        watch = true
        source.path = "{tmp_path}/images"
        inception.path = "{tmp_path}/inception.pt"
        {table}
    """)
    return load(EvaluateJob, str(path), [])


def test_each_checkpoint_of_a_run_is_measured_once_into_the_runs_own_page(finished: Finished, tmp_path, capsys) -> None:
    for part in ("images", "index", "vae", "base"):
        shutil.copytree(finished.root / part, tmp_path / part)
    shutil.copy(finished.root / "mlflow.db", tmp_path)
    for run in (tmp_path / "vae/run.json", tmp_path / "base/run.json"):
        run.write_text(run.read_text().replace(f"{finished.root}/mlflow.db", f"{tmp_path}/mlflow.db"))
    torch.jit.script(Pooled()).save(tmp_path / "inception.pt")
    vae = f'{{preset = "tiny", path = "{tmp_path}/vae"}}'
    reconstruct = f'reconstruct = {{index = "{tmp_path}/index", size = [32, 32], vae = {vae}}}'
    generate = f"""
        [evaluate.generate]
        base = {{preset = "tiny-base", path = "{tmp_path}/base"}}
        vae = {vae}
        text = {{preset = "tiny", seed = 0}}
        sampling.steps = 1
        prompts = {{index = "{tmp_path}/index", count = 6}}
    """
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for network, table, figures in (("vae", reconstruct, ("psnr", "ssim", "rfid")), ("base", generate, ("fid",))):
        evaluation = job(tmp_path, network, table)
        evaluate.run(evaluation)
        summary = json.loads((tmp_path / f"evaluation-{network}/metrics.json").read_text())
        assert [row["images_seen"] for row in summary["results"]] == [16, 32]
        run_id = json.loads((tmp_path / network / "run.json").read_text())["run_id"]
        clock = [point.step for point in client.get_metric_history(run_id, "images_seen")]
        evaluate.run(evaluation)  # nothing is measured, and no point is told twice
        assert capsys.readouterr().out.count("(was there)") == 2
        for figure in figures:
            points = client.get_metric_history(run_id, f"evaluation/{figure}")
            assert [point.step for point in points] == [16, 32]
            assert [point.value for point in points] == [row[figure] for row in summary["results"]]
        assert [point.step for point in client.get_metric_history(run_id, "images_seen")] == clock == [8, 16, 24, 32]
        assert client.get_run(run_id).info.status == "FINISHED"
        pictures = [file.path.replace("%2B", "+") for file in client.list_artifacts(run_id, "images")]
        assert len([name for name in pictures if "evaluation+step+32+" in name and name.endswith(".png")]) == 1
    assert len(list((tmp_path / "evaluation-base").glob("*/pictures/*.png"))) == 12
    with pytest.raises(JobError, match=r"tracking\.uri: sqlite:////other\.db is not where"):
        evaluate.run(evaluation.model_copy(update={"tracking": TrackingConfig(uri="sqlite:////other.db")}))
