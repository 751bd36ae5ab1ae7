"""What a run is told, put into MLflow's words. MLflow enters the project here only."""

from __future__ import annotations

import io
import itertools
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from pipelines.config import EXPERIMENT_NOTES, EXPERIMENTS, HIDDEN, flat, without_secrets
from pipelines.outbox import Entry, RefusedError
from pipelines.storage import Storage

CLOCK = "images_seen"  # the metric that says how far a curve goes
EXPERIMENT_KIND, TRAINING = "mlflow.experimentKind", "custom_model_development"  # which kind of page MLflow shows
WORKFLOW = "workflowType=machine_learning"  # the same in the address of a run
DESCRIPTION = "mlflow.note.content"
KEY_TAG = "sdxl.key"  # by which a run is found whose id is not known yet
FOLDER = "tracking"
MODEL_NOTE = "A version is a training run at its end. Its weights stay in the run's folder, which the version names."
MODEL, NEWEST = "model", "newest"  # folder of a version's files; the alias ("latest" is MLflow's own)
PICTURES, JPEG_QUALITY = "pictures", 92  # folder of plain pictures, which browsers and MLflow's viewer open
PARAMS_PER_CALL, METRICS_PER_CALL = 100, 1000  # the server's limits
REFUSALS = (400, 409, 413, 422)  # HTTP: about what was said, not about the server or the way there
DENIALS = (401, 403, 404)  # a mistake in the address or the password, if it is there from the start
LOCAL_ARTIFACTS = "mlartifacts"


@dataclass(frozen=True, kw_only=True)
class Ticket:
    """What a process needs to tell a run things."""

    uri: str
    """The server."""
    stage: str
    """Stage, which names the experiment."""
    key: str
    """Our name of the run."""
    run_id: str | None
    """MLflow's, once the server has answered."""
    output: Storage
    """Folder of what the stage makes; unsent entries lie below it."""

    @property
    def server(self) -> str:
        """The server in words, without a password."""
        return f"MLflow at {without_secrets(self.uri)}"

    @property
    def folder(self) -> Storage:
        """Where unsent entries are kept."""
        return self.output.folder(f"{FOLDER}/{self.key}")


class Post:
    """Tells MLflow entries of one run. After every trouble it first asks what the server has already."""

    def __init__(self, ticket: Ticket) -> None:
        from mlflow import MlflowClient  # on the caller's thread: beside other imports its own could lock both out

        self.ticket = ticket
        self.opening = False  # whether a person waits who can mend a wrong address or password
        self.page: str | None = None
        """Where a person sees the run, once a server has answered."""
        self._client: Any = MlflowClient(tracking_uri=ticket.uri)  # speaks to no server, and opens a database
        self._sure = False  # whether the server has just what was sent
        self._asked = self._last = -1  # images seen of its last point, when it was asked, and now

    def send(self, entries: Sequence[Entry]) -> int:
        """Tell it the first of the entries, or all points at the beginning at once; gives how many."""
        from mlflow.exceptions import MlflowException

        sure, self._sure = self._sure, False
        try:
            told = self._tell(entries, sure)
        except MlflowException as error:
            if error.get_http_status_code() in REFUSALS + (DENIALS if self.opening else ()):
                raise RefusedError(str(error)) from error
            raise
        self._sure = True
        return told

    def _tell(self, entries: Sequence[Entry], sure: bool) -> int:
        client, first, data = self._client, entries[0], entries[0].data
        run_id = self.ticket.run_id or self._search()
        if first.kind == "open":
            run_id = self._open(run_id, data)
        elif run_id is None:
            raise LookupError(f"no run of {EXPERIMENTS[self.ticket.stage]} is tagged {KEY_TAG} = {self.ticket.key}")
        self.ticket = replace(self.ticket, run_id=run_id)
        if not sure:
            run = client.get_run(run_id)
            self._asked = self._last = int(run.data.metrics.get(CLOCK, -1))
            self.page = self._page(run.info)
        if first.kind == "point":
            points = [entry.data for entry in itertools.takewhile(lambda entry: entry.kind == "point", entries)]
            new = [metric for point in points if point["step"] > self._last for metric in _metrics(point)]
            for start in range(0, len(new), METRICS_PER_CALL):
                client.log_batch(run_id, metrics=new[start : start + METRICS_PER_CALL])
            self._last = max(self._last, points[-1]["step"])
            return len(points)
        old = first.kind == "image" and (data["step"] <= self._asked or data.get("again", False))
        if first.kind == "image" and not (old and self._has_image(run_id, data)):
            _log_picture(client, run_id, data, first.blob or b"")
        elif first.kind == "artifact":
            _log_file(client, run_id, data["name"], first.blob or b"")
        elif first.kind == "numbers":
            client.log_batch(run_id, metrics=_metrics(data))
        elif first.kind == "model":
            _register(client, run_id, EXPERIMENTS[self.ticket.stage], data)
        elif first.kind == "tags":
            for name, value in data["tags"].items():
                client.set_tag(run_id, name, value)
        elif first.kind == "status":
            _set_status(client, run_id, data)
        return 1

    def _search(self) -> str | None:
        """The run's id, by our key."""
        experiment = self._client.get_experiment_by_name(EXPERIMENTS[self.ticket.stage])
        if experiment is None:
            return None
        runs = self._client.search_runs([experiment.experiment_id], f"tags.`{KEY_TAG}` = '{self.ticket.key}'")
        return runs[0].info.run_id if runs else None

    def _open(self, run_id: str | None, data: Mapping[str, Any]) -> str:
        """Create the run, unless an earlier try did, whose answer was lost, and tell it all that it starts with."""
        from mlflow.entities import Param

        client, stage = self._client, self.ticket.stage
        if run_id is None:
            tags = {"stage": stage, DESCRIPTION: data["description"], KEY_TAG: self.ticket.key}
            tags |= data.get("tags", {})  # an opening that an older version kept has none
            made = client.create_run(self._experiment(), start_time=data["time"], run_name=data["name"], tags=tags)
            run_id = str(made.info.run_id)
        params = [Param(key, str(value)) for key, value in flat(data["config"]).items()]
        for start in range(0, len(params), PARAMS_PER_CALL):
            client.log_batch(run_id, params=params[start : start + PARAMS_PER_CALL])
        config = json.dumps(data["config"], indent=2, ensure_ascii=False)
        _log_file(client, run_id, "config.json", config.encode())
        _log_inputs(client, run_id, data["inputs"])
        return run_id

    def _page(self, info: Any) -> str | None:
        """The run's address in a browser, without a password; None where there is no server."""
        if not self.ticket.uri.startswith("http"):
            return None
        address = str(without_secrets(self.ticket.uri)).replace(f"{HIDDEN}@", "").rstrip("/")
        return f"{address}/#/experiments/{info.experiment_id}/runs/{info.run_id}?{WORKFLOW}"

    def _experiment(self) -> str:
        client, uri, stage = self._client, self.ticket.uri, self.ticket.stage
        experiment = client.get_experiment_by_name(EXPERIMENTS[stage])
        if experiment is not None:
            return str(experiment.experiment_id)
        local = uri.startswith("sqlite:///")
        artifacts = f"file://{os.path.dirname(uri.removeprefix('sqlite:///'))}/{LOCAL_ARTIFACTS}" if local else None
        made = client.create_experiment(
            EXPERIMENTS[stage],
            artifact_location=artifacts and f"{artifacts}/{stage}",
            tags={EXPERIMENT_KIND: TRAINING, DESCRIPTION: EXPERIMENT_NOTES[stage]},
        )
        return str(made)

    def _has_image(self, run_id: str, data: Mapping[str, Any]) -> bool:
        beginning = f"images/{data['key'].replace('/', '~')}+step+{data['step']}+"  # as log_image names them
        names = (artifact.path.replace("%2B", "+") for artifact in self._client.list_artifacts(run_id, "images"))
        return any(name.startswith(beginning) and name.endswith(".webp") for name in names)


def _log_inputs(client: Any, run_id: str, inputs: Sequence[Mapping[str, Any]]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    for item in inputs:
        told = {name: item[name] for name in ("name", "digest", "source", "profile")}
        tags = [InputTag(name, value) for name, value in item["tags"].items()]
        client.log_inputs(run_id, datasets=[DatasetInput(Dataset(source_type="parquet", **told), tags=tags)])


def _set_status(client: Any, run_id: str, data: Mapping[str, Any]) -> None:
    if data.get("unless_ended") and client.get_run(run_id).info.status != "RUNNING":
        return
    if data["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, data["status"], data["time"])


def _register(client: Any, run_id: str, name: str, data: Mapping[str, Any]) -> None:
    """A version of the registered model `name` for the run at this count of images, and the alias on it.

    The version's files are a document that says where the weights are: they stay where the run has them.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=MODEL_NOTE)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"weights": data["weights"], "images_seen": str(data["images_seen"])}
    _log_file(client, run_id, f"{MODEL}/weights.json", json.dumps(tags, indent=2).encode())
    there = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    version = next((v.version for v in there if v.tags.get("images_seen") == tags["images_seen"]), None)
    if version is None:
        source = f"{client.get_run(run_id).info.artifact_uri}/{MODEL}"
        note = f"{data['images_seen']} images, weights in `{data['weights']}`"
        version = client.create_model_version(name, source, run_id, tags=tags, description=note).version
    client.set_registered_model_alias(name, NEWEST, version)


def _log_picture(client: Any, run_id: str, data: Mapping[str, Any], png: bytes) -> None:
    """A picture for the grids of the charts, and before it once more as a plain file, which opens by a click.

    MLflow's grid shows nothing at step 0, where it starts, and below all of the run's parameters.
    """
    picture, plain = Image.open(io.BytesIO(png)), io.BytesIO()
    picture.convert("RGB").save(plain, "JPEG", quality=JPEG_QUALITY)
    _log_file(client, run_id, f"{PICTURES}/{data['key']}/{data['step']:010d}.jpg", plain.getvalue())
    place = {"key": data["key"], "step": data["step"], "timestamp": data["time"]}
    client.log_image(run_id, picture, **place, synchronous=True)


def _log_file(client: Any, run_id: str, name: str, data: bytes) -> None:
    folder, _, base = name.rpartition("/")
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, base)
        with open(path, "wb") as file:
            file.write(data)
        client.log_artifact(run_id, path, folder or None)


def _metrics(data: Mapping[str, Any]) -> list[Any]:
    """A point of each curve, of the time when it was told: the server takes the very same only once."""
    from mlflow.entities import Metric

    return [Metric(name, value, data["time"], data.get("step", 0)) for name, value in data["numbers"].items()]
