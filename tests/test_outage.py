"""An MLflow server that is not there, answers, is killed at work and comes back: what its page shows in the end."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from jobs.cli import WORKER_ENVIRONMENT
from pipelines import outbox, tracking
from pipelines.storage import Storage
from pipelines.tracking import Tracker, closing, joined, open_run, send_left
from tests.conftest import free_port
from tests.servers import mlflow_server


def server(folder: Path, port: int) -> AbstractContextManager[None]:
    """A server of its own SQLite file."""
    store = ("--backend-store-uri", f"sqlite:///{folder}/server.db")
    return mlflow_server(folder, port, *store, "--artifacts-destination", str(folder / "artifacts"))


@contextmanager
def mute(answer: bytes) -> Iterator[int]:
    """A port that takes every call and never ends its answer: it sends `answer` once a tenth of a second."""
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def serve() -> None:
        calls = []
        listening.settimeout(0.1)
        while not over.is_set():
            try:
                calls.append(listening.accept()[0])
            except TimeoutError:
                for call in calls:
                    with suppress(OSError):  # who called has hung up
                        call.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        over.set()
        thread.join()
        listening.close()


def kept(output: Path) -> list[Path]:
    return [path for path in output.rglob("*") if path.is_file()]


def test_what_a_run_is_told_while_its_server_is_gone_arrives_in_the_end_once(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(tracking, "END_SECONDS", 2.0)  # it is known to be gone
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port, pixels = free_port(), np.zeros((8, 8, 3), np.uint8)
    uri, output = f"http://me:word@127.0.0.1:{port}", tmp_path / "run"
    place = {"stage": "base", "name": "a run", "inputs": [], "output": Storage(str(output))}
    first = time.time()
    run = open_run(uri, config={"lr": 1e-4, "secret": "http://me:word@host"}, **place)  # nobody answers yet
    with closing(run):
        assert run.ticket.run_id is None
        with run.lent() as ticket:
            tracker = Tracker(ticket)
            tracker.log(8, {"loss": 0.5})
            tracker.image(8, "samples", pixels)
            tracker.leave()
            assert kept(output)
            with server(tmp_path, port):
                tracker = Tracker(ticket)  # the next attempt takes it up
                tracker.log(8, {"loss": 9.0})  # as the one before told it already
                tracker.log(16, {"loss": 0.4})
                assert tracker.outbox.flush(60)
                assert kept(output) == []
            tracker.log(24, {"loss": 0.3})  # killed at work; this returns at once
            tracker.image(24, "samples", pixels)
            tracker.keep()
            told_twice = kept(output)
            copies = tmp_path / "copies"
            shutil.copytree(output, copies)
            tracker.outbox.stop()  # as a worker that dies without a word
            tracker = Tracker(ticket)
            tracker.log(24, {"loss": 9.0})
            tracker.log(32, {"loss": 0.2})
            tracker.leave()
            resumed = time.time()
    told = capsys.readouterr().err + caplog.text
    assert f"MLflow at http://***@127.0.0.1:{port} does not take what this run told it" in told
    assert "word" not in told
    assert told_twice
    assert not any(b"word" in path.read_bytes() for path in kept(output))

    monkeypatch.setattr(tracking, "END_SECONDS", 60.0)
    with server(tmp_path, port):
        send_left(uri, Storage(str(output)))  # what the same command does
        shutil.copytree(copies, output, dirs_exist_ok=True)  # as if it had been killed before it forgot them
        send_left(uri, Storage(str(output)))
        assert kept(output) == []
        client = MlflowClient(tracking_uri=uri)
        (page,) = client.search_runs([client.get_experiment_by_name("sdxl-base").experiment_id])
        loss = client.get_metric_history(page.info.run_id, "loss")
        assert [(point.step, point.value) for point in loss] == [(8, 0.5), (16, 0.4), (24, 0.3), (32, 0.2)]
        assert all(first <= point.timestamp / 1000 + 0.001 <= resumed + 0.001 for point in loss)
        assert (page.info.status, page.info.run_name) == ("FINISHED", "a run")
        assert page.data.params == {"lr": "0.0001", "secret": "http://***@host"}
        pictures = [file.path for file in client.list_artifacts(page.info.run_id, "images")]
        assert sorted(name.split("+")[2] for name in pictures if name.endswith(".webp")) == ["24", "8"]
        assert [file.path for file in client.list_artifacts(page.info.run_id)] == ["config.json", "images", "pictures"]

        with pytest.raises(
            ValueError, match=rf"tracking.uri: MLflow at http://\*\*\*@127.0.0.1:{port}/nowhere refuses"
        ):
            open_run(f"{uri}/nowhere", config={}, **place)


def test_a_run_that_goes_on_is_the_same_run_and_its_curves_have_neither_a_gap_nor_a_point_twice(empty_mlflow, tmp_path):
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri, output = f"sqlite:///{tmp_path}/mlflow.db", Storage(str(tmp_path / "run"))
    place = {"stage": "vae", "name": "a run", "config": {}, "inputs": [], "output": output}
    client = MlflowClient(tracking_uri=uri)
    run = open_run(uri, **place)

    def told(ticket, *points):
        tracker = Tracker(ticket)
        for step, loss in points:
            tracker.log(step, {"loss": loss})
            tracker.image(step, "samples", np.zeros((8, 8, 3), np.uint8))
        tracker.leave()

    def interrupted():
        with closing(run), run.lent() as ticket:
            told(ticket, (8, 0.8), (16, 0.7), (24, 0.6))  # the last checkpoint is that of 16
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    first = run.ticket
    assert first.run_id is not None
    assert client.get_run(first.run_id).info.status == "KILLED"

    run = open_run(uri, **place, key=first.key, run_id=first.run_id)
    assert run.ticket == first
    with closing(run), run.lent() as ticket:
        assert client.get_run(first.run_id).info.status == "RUNNING"
        told(ticket, (24, 9.0), (32, 0.5))
    assert client.get_run(first.run_id).info.status == "FINISHED"
    points = [(point.step, point.value) for point in client.get_metric_history(first.run_id, "loss")]
    assert points == [(8, 0.8), (16, 0.7), (24, 0.6), (32, 0.5)]
    pictures = [file.path.replace("%2B", "+") for file in client.list_artifacts(first.run_id, "images")]
    assert sorted(int(name.split("+")[2]) for name in pictures if name.endswith(".png")) == [8, 16, 24, 32]
    assert kept(tmp_path / "run") == []

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    for _ in range(2):  # an evaluation that is killed before it knows what it told tells it again
        with joined(dataclasses.replace(run.ticket, output=Storage(str(tmp_path / "evaluation")))) as beside:
            beside.evaluation(16, {"fid": 3.0}, buffer.getvalue(), 1_700_000_000_000)
            beside.model("s3://bucket/vae", 32)
    found = client.get_metric_history(first.run_id, "evaluation/fid")
    assert [(point.step, point.value) for point in found] == [(16, 3.0)]
    assert [point.step for point in client.get_metric_history(first.run_id, "images_seen")] == [8, 16, 24, 32]
    pictures = [file.path for file in client.list_artifacts(first.run_id, "images") if "evaluation" in file.path]
    assert len([name for name in pictures if name.endswith(".png")]) == 1
    assert client.get_run(first.run_id).info.status == "FINISHED"
    (version,) = client.search_model_versions("name = 'sdxl-vae'")
    assert client.get_model_version_by_alias("sdxl-vae", "newest").version == version.version
    assert kept(tmp_path / "evaluation") == []

    lost = open_run(uri, **place, alone=True)  # whose process is killed
    assert client.get_run(lost.ticket.run_id).info.status == "RUNNING"
    send_left(uri, output)
    assert client.get_run(lost.ticket.run_id).info.status == "KILLED"
    with closing(open_run(uri, **place, alone=True)) as _:
        (foretold,) = kept(tmp_path / "run")
        told = foretold.read_bytes()
    assert kept(tmp_path / "run") == []
    assert list((tmp_path / "run/tracking").iterdir()) == []
    foretold.parent.mkdir()
    foretold.write_bytes(told)  # as where it is killed between the run's end and its own
    send_left(uri, output)
    runs = client.search_runs(["1"], order_by=["attributes.start_time"])
    assert [run.info.status for run in runs] == ["FINISHED", "KILLED", "FINISHED"]
    assert kept(tmp_path / "run") == []


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"x"], ids=["silent", "dripping", "no-http"])
def test_a_server_that_takes_calls_and_never_answers_holds_nothing_up(tmp_path, monkeypatch, capsys, answer):
    for name in ("OPEN_SECONDS", "SETTLE_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(tracking, name, 0.3)
    monkeypatch.setattr(outbox, "STOP_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", WORKER_ENVIRONMENT["MLFLOW_HTTP_REQUEST_MAX_RETRIES"])
    place = {"stage": "base", "name": "a run", "config": {}, "inputs": [], "output": Storage(str(tmp_path))}
    began = time.monotonic()
    with mute(answer) as port:
        run = open_run(f"http://127.0.0.1:{port}", **place)
        with closing(run), run.lent() as ticket:
            tracker = Tracker(ticket)
            for step in range(8, 808, 8):
                tracker.log(step, {"loss": 0.5})
                tracker.image(step, "samples", np.zeros((8, 8, 3), np.uint8))
            tracker.keep()  # as before each checkpoint
            tracker.leave()
        assert time.monotonic() - began < 30  # one request alone may take MLFLOW_HTTP_REQUEST_TIMEOUT, 120 s by default
        entries = [row["kind"] for path in tmp_path.rglob("*.json") for row in json.loads(path.read_text())["entries"]]
    assert Counter(entries) == {"open": 1, "point": 100, "image": 100, "status": 1}
    assert "and the same command sends them when the server answers" in capsys.readouterr().err


def test_an_address_of_no_known_kind_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"tracking\.uri: MLflow at htp://host refuses"):
        open_run("htp://host", stage="base", name="", config={}, inputs=[], output=Storage(str(tmp_path)))
