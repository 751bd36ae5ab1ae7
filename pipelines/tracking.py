"""Runs on the MLflow page.

One run is one call of a preprocessing or generation stage, or all of a training run, whose output folder remembers
it. The driver opens it, and one process at a time tells it things: the driver, or worker 0 of training.

Work does not wait for the server, nor end with it: all that a run is told goes through an outbox, which keeps what is
unsent below the stage's output, in tracking/<key>/. The key is ours, so a run has its identity before its server has
answered at all. docs/decisions/ has the reasons.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipelines.config import TrackingConfig, without_secrets
from pipelines.mlflow_post import CLOCK, FOLDER, Post, Ticket
from pipelines.outbox import PICTURE_BYTES, REFUSED, Entry, Outbox
from pipelines.schema import Manifest
from pipelines.storage import Storage
from pipelines.version import code_tags

LOCAL_DATABASE = "mlflow.db"
OPEN_SECONDS, SETTLE_SECONDS = 60.0, 2.0  # longest wait for a server that neither answers nor refuses, at both ends
END_SECONDS, KILLED_SECONDS = 20.0, 1.0  # a job that is told to end has little time


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
    name: str | None,
    config: Mapping[str, Any],
    inputs: Sequence[Lineage],
    output: Storage,
    key: str | None = None,
    run_id: str | None = None,
    alone: bool = False,
) -> Run:
    """Start a run of a stage, or go on with the one that has `key` and, if it was ever known, `run_id`.

    A new run gets the configuration as parameters and as the artifact config.json, and its input datasets; without a
    name it takes the last part of its output's address. Where the server does not answer, that is said, and the run is
    opened when it does. Where the caller is `alone` on its output, as by a lease, and dies, the next one's `send_left`
    ends the run as KILLED. Raises ValueError where the server refuses.
    """
    ticket = Ticket(uri=uri, stage=stage, key=key or uuid.uuid4().hex, run_id=run_id, output=output)
    try:
        run = Run(ticket)
    except Exception as error:  # of an address of no known kind, or a database that does not open
        raise ValueError(f"tracking.uri: {ticket.server} refuses: {error}") from error
    if key is not None or run_id is not None:
        run.outbox.load()
        run._tell("status", status="RUNNING")
    else:
        run._tell("open", **without_secrets(_opening(stage, name, config, inputs, output)))
    run.start()
    if alone:
        run.foretell()
    return run


@contextmanager
def closing(run: Run) -> Iterator[None]:
    """End the run with the block: FINISHED, FAILED, or KILLED where it is interrupted."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.close(status)


@contextmanager
def joined(ticket: Ticket) -> Iterator[Run]:
    """A run that another process opens and closes, for the block to tell things, beside it or after its end."""
    run = Run(ticket)
    run.outbox.load()
    try:
        yield run
    finally:
        run.keep()
        run.outbox.flush(END_SECONDS)
        run.end()


def send_left(uri: str, output: Storage) -> None:
    """Send what earlier runs on the same output have left unsent; what cannot be sent now either stays."""
    files: dict[str, str] = {}
    for file in output.list(FOLDER):
        key, _, name = file.name.removeprefix(f"{FOLDER}/").partition("/")
        if name.endswith(".json") and name != REFUSED:
            files.setdefault(key, file.name)
    for key, name in files.items():
        head = output.read_json(name)["head"]
        if head["uri"] == without_secrets(uri):
            run = Run(Ticket(uri=uri, stage=head["stage"], key=key, run_id=head["run_id"], output=output))
            run.outbox.load()
            run.outbox.flush(END_SECONDS, tries=1)
            run.end()
            run.ticket.folder.delete_if_empty()


class Run:
    """A run of the page, as one process tells it things. Nothing waits for the server but opening and closing."""

    def __init__(self, ticket: Ticket) -> None:
        self._post = Post(ticket)
        self.outbox = self._new_outbox()

    @property
    def ticket(self) -> Ticket:
        """For another process, while this one tells nothing."""
        return self._post.ticket

    def json(self, name: str, value: Any) -> None:
        """Keep a JSON document with the run."""
        self.file(name, json.dumps(value, indent=2, ensure_ascii=False, default=str).encode())

    def file(self, name: str, data: bytes) -> None:
        """Keep a file, under a name that may lie in a folder."""
        self.outbox.add(Entry(kind="artifact", data={"name": name}, blob=data))

    def numbers(self, numbers: Mapping[str, float]) -> None:
        """Numbers that the run ends with."""
        self._tell("numbers", numbers={name: float(value) for name, value in numbers.items()})

    def evaluation(self, images_seen: int, numbers: Mapping[str, float], png: bytes, time_ms: int) -> None:
        """Figures and a picture of a state of the network, measured at `time_ms`: told again, they are the same points.

        They stand at the state's images_seen among the training's curves, and are without the CLOCK, which says where
        the curves of a resumed run go on.
        """
        at = {"step": images_seen, "time": time_ms}
        self.outbox.add(Entry(kind="image", data=at | {"key": "evaluation", "again": True}, blob=png, picture=True))
        values = {f"evaluation/{name}": float(value) for name, value in numbers.items()}
        self.outbox.add(Entry(kind="numbers", data=at | {"numbers": values}))

    def tags(self, tags: Mapping[str, str]) -> None:
        """Words that a person can search for."""
        self._tell("tags", tags=dict(tags))

    def model(self, weights: str, images_seen: int) -> None:
        """Register what the run has trained, at `weights`, as the stage's newest model."""
        self._tell("model", weights=weights, images_seen=images_seen)

    @contextmanager
    def lent(self) -> Iterator[Ticket]:
        """For the block another process, given the ticket, tells the run things, and this one does not."""
        self.keep()
        self.outbox.stop()
        try:
            yield self.ticket
        finally:
            self.outbox = self._new_outbox()
            self.outbox.load()

    def start(self) -> None:
        """Tell the server of the run, if it answers. Raises ValueError where it refuses."""
        self._post.opening = True
        self.outbox.flush(OPEN_SECONDS, tries=1)
        self._post.opening = False
        if self.outbox.refused:
            self.outbox.stop()
            raise ValueError(f"tracking.uri: {self.ticket.server} refuses: {self.outbox.refused[0]}")
        if self._post.page is not None:
            print(f"{self.ticket.stage}: {self._post.page}")

    def foretell(self) -> None:
        """Let the next process on the same output tell that this run was killed, if this one cannot end it."""
        if self.ticket.run_id is not None:  # else the page has no run that would seem to go on for ever
            data = {"time": int(time.time() * 1000), "status": "KILLED", "unless_ended": True}
            self.outbox.foretell(Entry(kind="status", data=data))

    def keep(self) -> None:
        """Make sure that what was told outlives this process: sent, or on storage."""
        if self.outbox.trouble or not self.outbox.flush(SETTLE_SECONDS, tries=1):
            self.outbox.keep()

    def close(self, status: str) -> None:
        """End the run, wait a bounded time for what is unsent, and say what is left and how it is sent."""
        self._tell("status", status=status)
        if status == "KILLED":
            if not self.outbox.flush(KILLED_SECONDS, tries=1):
                self.outbox.keep()
        else:
            self.keep()
            self.outbox.flush(END_SECONDS)
        self.end()
        self.outbox.take_back()

    def end(self) -> None:
        """Tell nothing more; say what is unsent."""
        outbox, server = self.outbox, self.ticket.server
        outbox.stop()
        told = []
        if left := outbox.left():
            what = ", ".join(f"{count} {kind}" for kind, count in sorted(left.items()))
            told.append(
                f"{server} does not take what this run told it ({outbox.trouble}). Nothing else is missing: {what} are "
                f"kept in {self.ticket.folder.uri}, and the same command sends them when the server answers"
            )
        if outbox.dropped:
            told.append(
                f"{outbox.dropped} pictures were dropped, since over {PICTURE_BYTES >> 20} MiB waited for {server}"
            )
        if outbox.refused:
            told.append(f"{server} refused {len(outbox.refused)} entries: see {self.ticket.folder.uri}/{REFUSED}")
        for line in told:
            print(f"warning: {line}", file=sys.stderr)

    def _tell(self, kind: str, **data: Any) -> None:
        self.outbox.add(Entry(kind=kind, data={"time": int(time.time() * 1000)} | data))

    def _new_outbox(self) -> Outbox:
        ticket = self.ticket
        head = {"uri": without_secrets(ticket.uri), "stage": ticket.stage, "run_id": ticket.run_id}
        return Outbox(ticket.folder, self._post.send, ticket.server, head)


class Tracker(Run):
    """Curves and pictures of one training run, by images seen, told by worker 0."""

    def __init__(self, ticket: Ticket) -> None:
        super().__init__(ticket)
        kept = self.outbox.load()
        self._last = max((entry.data["step"] for entry in kept if entry.kind == "point"), default=-1)

    def log(self, images_seen: int, numbers: Mapping[str, float]) -> None:
        """One point of each curve. Points that an earlier attempt has logged already are left as they are."""
        if images_seen > self._last:
            values = {name: float(value) for name, value in numbers.items()} | {CLOCK: float(images_seen)}
            self._tell("point", step=images_seen, numbers=values)
            self._last = images_seen

    def image(self, images_seen: int, key: str, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3], that the page shows by step; an earlier attempt's stays as it is."""
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(
            buffer, "PNG", compress_level=1
        )  # training waits: a sixth of the time, for 19% more
        data = {"step": images_seen, "time": int(time.time() * 1000), "key": key}
        self.outbox.add(Entry(kind="image", data=data, blob=buffer.getvalue(), picture=True))

    def leave(self) -> None:
        """Hand over to the process that closes the run."""
        self.keep()
        self.outbox.stop()


def _opening(
    stage: str, name: str | None, config: Mapping[str, Any], inputs: Sequence[Lineage], output: Storage
) -> dict[str, Any]:
    """All that a run starts with, as JSON."""
    made = output.uri.rstrip("/")
    read = [f"{item.name} `{item.manifest.digest}` ({item.manifest.rows} rows) in `{item.uri}`" for item in inputs]
    datasets = [
        {
            "name": item.name,
            "digest": item.manifest.digest,
            "source": json.dumps({"uri": item.uri, "fingerprint": item.manifest.fingerprint}),
            "profile": json.dumps({"rows": item.manifest.rows, **item.manifest.counts}),
            "tags": {"mlflow.data.context": item.name}
            | {f"parent.{name}": digest for name, digest in item.manifest.parents.items()},
        }
        for item in inputs
    ]
    return {
        "name": name or made.rpartition("/")[2],
        "description": "  \n".join([f"makes `{made}`", *(f"from {item}" for item in read)]),
        "config": json.loads(json.dumps(config, default=str)),
        "inputs": datasets,
        "tags": {"output": made} | {f"from.{item.name}": item.uri for item in inputs} | code_tags(),
    }
