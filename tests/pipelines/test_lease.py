"""One writer per dataset or run: a live holder is respected, a dead one replaced, a paused one kept from committing."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from pipelines import lease as module
from pipelines.lease import FOLDER, InUseError, LeaseLostError, lease
from pipelines.storage import Storage, StorageOptions
from tests.conftest import S3

HOLD = """
import sys
from pipelines.lease import lease
from pipelines.storage import Storage
with lease(Storage(sys.argv[1])) as held:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        held.check()
    except OSError as error:
        print("lost", error, flush=True)
"""


@pytest.fixture
def dataset(tmp_path) -> Storage:
    return Storage(str(tmp_path / "dataset"))


@contextmanager
def holder(dataset: Storage) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that holds the lease until it reads a line."""
    command = [sys.executable, "-c", HOLD, dataset.uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen from another machine, which cannot ask for the holder's process."""
    monkeypatch.setattr(module, "_machine", lambda: "another")
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)


def test_a_live_holder_is_named_and_respected_and_nothing_of_it_stays(dataset):
    with holder(dataset) as process:
        named = rf"process {process.pid} on .* since 20.*wait until it has ended"
        with pytest.raises(InUseError, match=named), lease(dataset):
            pytest.fail("held twice")
        process.communicate("\n")
    with lease(dataset) as held:
        held.check()
    assert dataset.list() == []


def test_a_lease_that_has_ended_lets_no_one_commit_who_was_given_it(dataset):
    with lease(dataset) as held:
        given = pickle.loads(pickle.dumps(held))
        given.check()
    with pytest.raises(LeaseLostError, match="the job has ended"):
        given.check()


def test_a_killed_holder_is_replaced_at_once(dataset):
    with holder(dataset) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with lease(dataset) as held:
        held.check()
    assert [file.name.rpartition(".")[2] for file in dataset.list(FOLDER)] == ["broken"]


def test_a_pid_that_is_used_again_is_not_the_holder(dataset):
    with lease(dataset) as held:
        mine = held.claim
    dataset.write_json(f"{FOLDER}/{mine.owner}.json", vars(replace(mine, started="1")))
    with lease(dataset):
        pass


def test_from_another_machine_a_silent_holder_is_told_from_one_that_beats(dataset, monkeypatch):
    with lease(dataset) as held:
        elsewhere(monkeypatch)
        beating = threading.Timer(0.2, lambda: module._write(dataset, replace(held.claim, beat=7)))
        beating.start()
        with pytest.raises(InUseError):
            module._acquire(dataset)
        beating.join()
        module._acquire(dataset)
        with pytest.raises(LeaseLostError, match="nothing was committed"):
            held.check()


def test_a_paused_holder_learns_that_it_was_replaced(dataset, monkeypatch):
    with holder(dataset) as process:
        os.kill(process.pid, signal.SIGSTOP)
        elsewhere(monkeypatch)
        with lease(dataset):
            os.kill(process.pid, signal.SIGCONT)
            said, _ = process.communicate("\n")
    assert said.startswith("lost")


def test_of_many_at_the_same_time_never_two_hold_it(dataset, monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.2)
    inside, most, entered, ready = [], [0], [], threading.Barrier(6)

    def work(number: int) -> None:
        ready.wait()
        try:
            with lease(dataset):
                inside.append(number)
                entered.append(number)
                most[0] = max(most[0], len(inside))
                threading.Event().wait(0.05)
                inside.remove(number)
        except InUseError:
            pass

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert entered


def test_a_lease_on_s3(s3: S3, monkeypatch):
    options = StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1")
    dataset = Storage(f"s3://{s3.bucket}/leased", options)
    with lease(dataset) as held:
        with pytest.raises(InUseError):
            module._acquire(dataset)
        elsewhere(monkeypatch)
        with lease(dataset) as newer:
            newer.check()
            with pytest.raises(LeaseLostError):
                held.check()
    assert [file.name for file in dataset.list(FOLDER)] == [f"{FOLDER}/{held.claim.owner}.broken"]
