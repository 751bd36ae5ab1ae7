"""One job writes an output at a time: a second is refused, and of one that was killed the next one tells the page."""

import shutil
from contextlib import nullcontext
from types import ModuleType

import numpy as np
import pytest
from mlflow import MlflowClient

from jobs import evaluate, generate, train_base, train_vae
from jobs.cli import USAGE_ERROR, JobError
from jobs.config import EvaluateJob, GenerateJob, Job
from jobs.training_config import TrainBaseJob, TrainVAEJob
from pipelines.evaluate import evaluate as evaluation
from pipelines.evaluate import generate as generation
from pipelines.evaluate.evaluate import Result
from pipelines.evaluate.generate import Made
from pipelines.evaluate.measure import png
from pipelines.lease import Claim, _machine, lease
from pipelines.schema import Manifest
from pipelines.storage import Storage
from tests.conftest import Demo


def job_of(module: ModuleType, demo: Demo) -> Job:
    if module is evaluate:
        vae = {"preset": "tiny", "path": f"{demo.root}/vae.safetensors"}
        measured = {"index": f"{demo.root}/index", "size": (32, 32), "vae": vae}
        part = {"network": "vae", "source": {"path": f"{demo.root}/images"}, "reconstruct": measured}
        tracking = {"uri": f"sqlite:///{demo.root}/mlflow.db"}
        return EvaluateJob(output=f"{demo.root}/evaluation", evaluate=part, tracking=tracking)
    name = module.__name__.removeprefix("jobs.")
    return demo.load({"generate": GenerateJob, "train_base": TrainBaseJob, "train_vae": TrainVAEJob}[name], name)


@pytest.mark.parametrize("module", [train_base, train_vae, generate, evaluate])
def test_a_second_run_on_an_output_is_refused_and_names_the_first(module, tmp_path):
    job = job_of(module, Demo(tmp_path))
    output = Storage(job.output)
    with lease(output):
        before = [file.name for file in output.list()]
        with pytest.raises(JobError, match=r"is being written by process \d+ on .* since .*: wait until") as refused:
            module.run(job)
        assert [file.name for file in output.list()] == before
    assert refused.value.code == USAGE_ERROR


def test_pictures_and_figures_of_a_run_that_was_killed_are_gone_on_with_and_its_end_is_told(
    empty_mlflow, tmp_path, monkeypatch
):
    """What they make is the Ray tests' matter, and left out here: only who writes, and what the page says."""
    index = Manifest(kind="index", rows=1, counts={}, fingerprint={}, parents={}, files="f", digest="d")
    grid = png(np.zeros((8, 8, 3), np.uint8))
    result = Result(name="vae", images_seen=None, grid=grid, time_ms=1, measured=True)
    monkeypatch.setattr(generate, "require_manifest", lambda *_: index)
    monkeypatch.setattr(evaluation, "pinned_index", lambda *_: index)
    monkeypatch.setattr(evaluate, "start_ray", lambda _: None)
    monkeypatch.setattr(evaluate, "check_resources", lambda *_, **__: None)
    monkeypatch.setattr(generation, "generate_pictures", lambda *_: Made(pictures=[], made=0, sheets=[]))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_: iter([result]))
    client = MlflowClient(tracking_uri=f"sqlite:///{shutil.copy(empty_mlflow, tmp_path / 'mlflow.db')}")
    for module in (generate, evaluate):
        job = job_of(module, Demo(tmp_path))
        with monkeypatch.context() as killed:
            killed.setattr(module, "closing", lambda _: nullcontext())
            module.run(job)
        dead = Claim(owner="dead", host="here", pid=2**30, machine=_machine(), started="1")
        Storage(job.output).write_json("lease/dead.json", vars(dead))
        stage = module.__name__.removeprefix("jobs.")
        assert statuses(client, stage) == ["RUNNING"]
        module.run(job)
        assert statuses(client, stage) == ["KILLED", "FINISHED"]
        assert [file.name for file in Storage(job.output).list("lease")] == ["lease/dead.broken"]
        assert Storage(job.output).list("tracking") == []


def statuses(client: MlflowClient, stage: str) -> list[str]:
    experiment = client.get_experiment_by_name(f"sdxl-{stage}")
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return [run.info.status for run in runs]
