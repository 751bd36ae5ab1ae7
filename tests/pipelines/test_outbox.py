"""The outbox alone: what is added is sent in order, and what is unsent outlives its process."""

import time

import pytest

from pipelines import outbox as module
from pipelines.outbox import REFUSED, Entry, Outbox, RefusedError
from pipelines.storage import Storage


class Server:
    """Notes what it is told; can be away, and refuses what is called bad."""

    def __init__(self):
        self.away, self.told, self.bytes = False, [], {}

    def send(self, entries):
        if self.away:
            raise ConnectionError("nobody at http://me:word@host")
        if any(entry.kind == "bad" for entry in entries):
            raise RefusedError("http://me:word@host says no")
        self.told += [entry.data["n"] for entry in entries]
        self.bytes |= {entry.data["n"]: entry.blob for entry in entries if entry.blob is not None}
        return len(entries)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def make(tmp_path, server):
    return lambda: Outbox(Storage(str(tmp_path)), server.send, "the server", {"head": 1})


def number(n, **more):
    return Entry(kind=more.pop("kind", "number"), data={"n": n}, **more)


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_entries_are_sent_in_order_and_leave_no_file(make, server, tmp_path):
    box = make()
    for n in range(200):
        box.add(number(n, blob=b"x" * n if n % 7 == 0 else None))
    assert box.flush(10)
    box.keep()
    assert server.told == list(range(200))
    assert files(tmp_path) == []


def test_what_is_unsent_is_taken_up_by_the_next_process_in_front_of_what_is_new(make, server, tmp_path):
    server.away = True
    box = make()
    box.add(number(0))
    box.add(number(1, blob=b"one"))
    box.keep()
    box.add(number(2))
    box.keep()
    box.add(number(3))  # not kept: it ends with its process
    box.stop()
    server.away = False
    after = make()
    assert [entry.data["n"] for entry in after.load()][:3] == [0, 1, 2]
    after.add(number(4))
    assert after.flush(10)
    assert [n for n in server.told if n != 3] == [0, 1, 2, 4]
    assert server.bytes == {1: b"one"}
    assert files(tmp_path) == []


def test_it_goes_on_by_itself_when_the_server_is_back(make, server, monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE_SECONDS", 0.02)
    server.away = True
    box = make()
    box.add(number(0))
    assert not box.flush(5, tries=1)
    assert box.trouble == "ConnectionError: nobody at http://***@host"
    assert box.left() == {"number": 1}
    server.away = False
    deadline = time.monotonic() + 10
    while box.left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.told == [0]
    assert box.trouble is None


def test_what_is_refused_is_recorded_and_holds_nothing_up(make, server, tmp_path):
    server.away = True
    box = make()
    for n in range(5):  # in one batch
        box.add(number(n, kind="bad" if n == 2 else "number"))
    server.away = False
    assert box.flush(10)
    assert server.told == [0, 1, 3, 4]
    reason = "http://***@host says no"
    assert box.refused == [f"bad: {reason}"]
    assert Storage(str(tmp_path)).read_json(REFUSED) == [{"kind": "bad", "data": {"n": 2}, "reason": reason}]
    assert make().load() == []


def test_of_too_many_pictures_the_oldest_are_dropped_and_counted(make, server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PICTURE_BYTES", 30)
    server.away = True
    box = make()
    box.add(number(0))
    for n in range(1, 6):
        box.add(number(n, blob=b"x" * 10, picture=True))
        box.keep()
    assert box.dropped == 2
    box.stop()
    server.away = False
    after = make()
    after.load()
    assert after.flush(10)
    assert server.told == [0, 3, 4, 5]
    assert files(tmp_path) == []
