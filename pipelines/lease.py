"""One writer per folder, of a dataset or of what a job makes, on any storage: a lease that a dead owner loses, and
under which a paused one, or what it has started elsewhere, cannot commit.

It asks of the storage only that a file which was written is listed from then on. Names are never shared between
owners, so servers without conditional writes serve as well:

    lease/<owner>.json      a claim: host, process, since when, and a beat that its owner keeps raising
    lease/<owner>.broken    written once by whoever found the owner dead; from then on the claim is void

Who wants the lease writes a claim, then lists: of two at the same time at least one sees the other, so never do both
hold it. docs/decisions/ says what is guaranteed where.
"""

from __future__ import annotations

import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from pipelines.storage import Storage

FOLDER = "lease"
BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # a claim whose beat stands still for so long has lost its owner
TRIES = 5  # two who claim at the same time both step back, and try again after a random wait


class InUseError(OSError):
    """Another process writes the folder."""


class LeaseLostError(OSError):
    """The lease has ended, or was taken over while its owner did not answer."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What an owner says about itself."""

    owner: str
    """Unique among all claims there have been."""
    host: str
    """Name of the machine."""
    pid: int
    """Its process there."""
    machine: str = ""
    """Boot and process namespace, within which a pid means one process; empty where it cannot be told."""
    started: str = ""
    """When the process started, in clock ticks since boot: a pid that is used again has another."""
    since: str = ""
    """When the claim was made, UTC, for a person."""
    beat: int = 0
    """Raised every BEAT_SECONDS."""


@dataclass(frozen=True)
class Lease:
    """The right to commit to `dataset`, while it is held; workers elsewhere are given it to ask for themselves."""

    dataset: Storage
    """What is written: the folder of a dataset, a run, pictures or figures."""
    claim: Claim

    def check(self) -> None:
        """Raise LeaseLostError where the lease has ended or was taken over. A commit asks just before it counts."""
        owner = self.claim.owner
        if self.dataset.exists(_broken(owner)):
            raise LeaseLostError(
                f"{self.dataset.uri}: another process took over while this one did not answer for {SILENT_SECONDS:g} s;"
                " nothing was committed, and finished files are kept: run the job again when the other has ended"
            )
        if not self.dataset.exists(_claim(owner)):
            raise LeaseLostError(f"{self.dataset.uri}: the job has ended, and what it has started may not go on")


@contextmanager
def lease(dataset: Storage) -> Iterator[Lease]:
    """Hold the folder for the block. Raises InUseError, naming the holder and the remedy, where it is held."""
    held = Lease(dataset, _acquire(dataset))
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(held, ended), daemon=True, name="lease")
    thread.start()
    try:
        yield held
    finally:
        ended.set()
        thread.join()
        if dataset.exists(_claim(held.claim.owner)):
            dataset.delete(_claim(held.claim.owner))


def _beat(held: Lease, ended: threading.Event) -> None:
    """Raise the beat until the lease ends. A failure of the storage is told, and left to whoever writes next."""
    claim = held.claim
    while not ended.wait(BEAT_SECONDS):
        claim = replace(claim, beat=claim.beat + 1)
        try:
            held.check()
            _write(held.dataset, claim)
        except LeaseLostError:
            return
        except OSError as error:
            logging.getLogger(__name__).warning(
                "%s: beat %d of the lease was not written, and is tried again: %s",
                held.dataset.uri,
                claim.beat,
                error,
            )


def _acquire(dataset: Storage) -> Claim:
    for _ in range(TRIES):
        claim = Claim(
            owner=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            machine=_machine(),
            started=_started(os.getpid()),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        for other in _claims(dataset):  # before ours is there: a live holder is told from a dead one at leisure
            _refuse_or_break(dataset, other)
        _write(dataset, claim)
        if all(other.owner == claim.owner for other in _claims(dataset)):
            return claim
        dataset.delete(_claim(claim.owner))
        time.sleep(random.uniform(0, BEAT_SECONDS / 5))
    raise InUseError(f"{dataset.uri}: other processes start on it at the same time: run the job again")


def _refuse_or_break(dataset: Storage, claim: Claim) -> None:
    """Break the claim of a dead owner; raise InUseError for a live one."""
    if not _is_dead(dataset, claim):
        raise InUseError(
            f"{dataset.uri} is being written by process {claim.pid} on {claim.host} since {claim.since}: wait until it "
            "has ended, or end it; a process that was killed is noticed by itself, on another machine after "
            f"{SILENT_SECONDS:g} s"
        )
    dataset.write(_broken(claim.owner), b"")
    if dataset.exists(_claim(claim.owner)):
        dataset.delete(_claim(claim.owner))


def _is_dead(dataset: Storage, claim: Claim) -> bool:
    """Whether the owner has ended: asked of this machine's processes, or else of the beat, which no clock enters."""
    if claim.machine and claim.machine == _machine():
        return _started(claim.pid) != claim.started
    deadline = time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENT_SECONDS / 10))
        now = next((other for other in _claims(dataset) if other.owner == claim.owner), None)
        if now is None:
            return True
        if now.beat != claim.beat:
            return False
    return True


def _claims(dataset: Storage) -> list[Claim]:
    """All claims that are not broken."""
    names = {file.name for file in dataset.list(FOLDER)}
    found = []
    for name in sorted(names):
        owner = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
        if not name.endswith(".json") or _broken(owner) in names:
            continue
        try:
            found.append(Claim(**dataset.read_json(name)))
        except FileNotFoundError:  # its owner ended since it was listed
            continue
    return found


def _write(dataset: Storage, claim: Claim) -> None:
    dataset.write_json(_claim(claim.owner), asdict(claim))


def _claim(owner: str) -> str:
    return f"{FOLDER}/{owner}.json"


def _broken(owner: str) -> str:
    return f"{FOLDER}/{owner}.broken"


def _machine() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start of a process of this machine, in clock ticks since boot; empty where there is no such process, or a zombie.

    Linux only: elsewhere `machine` is empty too, and the beat decides.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
