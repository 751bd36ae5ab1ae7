"""Runs on the MLflow page. MLflow enters the project here only.

One run is one call of a preprocessing or generation stage, or all of a training run, whose output folder remembers
the id. The driver opens it, and one process at a time logs to it: the driver, or worker 0 of training.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.config import EXPERIMENTS, TrackingConfig, flat, without_secrets
from pipelines.schema import Manifest

CLOCK = "images_seen"  # the metric that says how far a curve goes
EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"  # which kind of page MLflow shows
DESCRIPTION = "mlflow.note.content"
PARAMS_PER_CALL = 100  # the server's limit
LOCAL_DATABASE, LOCAL_ARTIFACTS = "mlflow.db", "mlartifacts"


def tracking_uri(config: TrackingConfig) -> str:
    """The configured server, or a SQLite file in the current directory, by its absolute path."""
    return config.uri or f"sqlite:///{os.path.abspath(LOCAL_DATABASE)}"


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """A dataset that a run read."""

    name: str
    """What it is to the run, e.g. "latents"."""
    uri: str
    """Where it is."""
    manifest: Manifest
    """What it was when the run started."""


def open_run(
    uri: str,
    *,
    stage: str,
    name: str,
    config: Mapping[str, Any],
    inputs: list[Lineage],
    run_id: str | None = None,
) -> str:
    """Start a run of a stage, or go on with `run_id`; gives its id.

    A new run gets the configuration as parameters and as the artifact config.json, and its input datasets.
    """
    from mlflow.entities import Param

    config = without_secrets(config)
    client = _client(uri)
    if run_id is not None:
        client.update_run(run_id, status="RUNNING")
        return run_id
    experiment = client.get_experiment_by_name(EXPERIMENTS[stage])
    local = uri.startswith("sqlite:///")
    artifacts = f"file://{os.path.dirname(uri.removeprefix('sqlite:///'))}/{LOCAL_ARTIFACTS}" if local else None
    experiment_id = (
        experiment.experiment_id
        if experiment
        else client.create_experiment(
            EXPERIMENTS[stage], artifact_location=artifacts and f"{artifacts}/{stage}", tags={EXPERIMENT_KIND: TRAINING}
        )
    )
    read = ", ".join(f"{item.name} {item.manifest.digest} ({item.manifest.rows} rows) in {item.uri}" for item in inputs)
    description = f"{stage}" + (f", from {read}" if read else "")
    run = client.create_run(experiment_id, run_name=name, tags={"stage": stage, DESCRIPTION: description})
    params = [Param(key, str(value)) for key, value in flat(config).items()]
    for start in range(0, len(params), PARAMS_PER_CALL):
        client.log_batch(run.info.run_id, params=params[start : start + PARAMS_PER_CALL])
    log_json(uri, run.info.run_id, "config.json", config)
    _log_inputs(client, run.info.run_id, inputs)
    return run.info.run_id


@contextmanager
def closing(uri: str, run_id: str) -> Iterator[None]:
    """End the run with the block: FINISHED, FAILED, or KILLED where it is interrupted."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        _client(uri).set_terminated(run_id, status)


def log_json(uri: str, run_id: str, name: str, value: Any) -> None:
    """Keep a JSON document with a run."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        _client(uri).log_artifact(run_id, path)


def log_picture(uri: str, run_id: str, name: str, png: bytes) -> None:
    """Keep a PNG file with a run, under a name that may lie in a folder."""
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, base)
        with open(path, "wb") as file:
            file.write(png)
        _client(uri).log_artifact(run_id, path, folder or None)


def log_numbers(uri: str, run_id: str, numbers: Mapping[str, float]) -> None:
    """Numbers that a run ends with."""
    client = _client(uri)
    for key, value in numbers.items():
        client.log_metric(run_id, key, value)


class Tracker:
    """Curves and pictures of one training run, by images seen."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        self._client = _client(uri)
        points = self._client.get_metric_history(run_id, CLOCK)
        self._last = self._resumed = max((point.step for point in points), default=-1)

    def log(self, images_seen: int, numbers: Mapping[str, float]) -> None:
        """One point of each curve. Points that an earlier attempt has logged already are left as they are."""
        if images_seen <= self._last:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, images_seen) for key, value in {**numbers, CLOCK: images_seen}.items()]
        self._client.log_batch(self._run_id, metrics=metrics)
        self._last = images_seen

    def image(self, images_seen: int, key: str, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3], that the page shows by step; an earlier attempt's stays as it is."""
        if images_seen <= self._resumed:
            return
        self._client.log_image(self._run_id, Image.fromarray(pixels), key=key, step=images_seen, synchronous=True)


def _log_inputs(client: Any, run_id: str, inputs: list[Lineage]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for item in inputs:
        profile = {"rows": item.manifest.rows, **item.manifest.counts}
        dataset = Dataset(
            name=item.name,
            digest=item.manifest.digest,
            source_type="parquet",
            source=json.dumps({"uri": item.uri, "fingerprint": item.manifest.fingerprint}),
            profile=json.dumps(profile),
        )
        tags = [InputTag("mlflow.data.context", item.name)]
        tags += [InputTag(f"parent.{name}", digest) for name, digest in item.manifest.parents.items()]
        client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags=tags)])


def _client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)
