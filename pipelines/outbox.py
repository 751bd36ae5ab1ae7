"""What is to be told to a server that may not answer: sent in order in the background, and kept on storage meanwhile.

    <number>.json    entries that were unsent when `keep` was called, oldest first
    <number>-<n>     the bytes of one of them
    99999999.json    what the next process is to tell, after all else, if this one does not come to its end

A file is written whole, never changed, and deleted when all that is in it is sent. One process at a time has the
folder; the next one takes up what it finds. Whoever sends must bear being told the same twice: a server can store an
entry and be gone before it says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import without_secrets
from pipelines.storage import Storage

ENTRIES_PER_CALL = 50  # told to the server at once
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0  # between two tries while nobody answers
PICTURE_BYTES = 256 * 1024**2  # pictures that may wait, the oldest are dropped and counted
TROUBLE_CHARACTERS = 300  # of a message; some hold a whole page
STOP_SECONDS = 1.0  # for what is on its way
REFUSED, LAST = "refused.json", "99999999.json"


class RefusedError(Exception):
    """The server understood an entry and does not take it, now or later."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing to tell."""

    kind: str
    """What it is."""
    data: Mapping[str, Any]
    """Its JSON values."""
    blob: bytes | None = None
    """Its bytes, where it has some."""
    picture: bool = False
    """Whether it may be dropped when too many bytes wait."""


class _Waiting:
    """An entry in the queue, and where it is kept."""

    def __init__(self, entry: Entry, file: str | None = None, blob: str | None = None, size: int = 0) -> None:
        self.entry, self.file, self.blob = entry, file, blob
        self.size = len(entry.blob) if entry.blob is not None else size


class Outbox:
    """A queue of entries in front of `send`, which is given some from its beginning and returns how many it sent.

    `send` raises RefusedError where one of them is at fault; any other error means that nobody answers, and is tried
    again. It is called from one thread only, and gets an entry with bytes alone. `label` names the server to a person;
    `head` stands in every file that is kept.
    """

    def __init__(
        self, folder: Storage, send: Callable[[Sequence[Entry]], int], label: str, head: Mapping[str, Any]
    ) -> None:
        self._folder, self._send, self._label, self._head = folder, send, label, head
        self._waiting: deque[_Waiting] = deque()
        self._number = 0  # of the next file
        self._changed = threading.Condition()
        self._keeping = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = self._cleaning = False
        self._next_try = self._pause = 0.0
        self._failures = self._alone = 0
        self.trouble: str | None = None
        """Why nothing is sent at the moment."""
        self.dropped = 0
        """Pictures that were dropped, since too many waited."""
        self.refused: list[str] = []
        """Entries that the server did not take, and why."""

    def load(self) -> list[Entry]:
        """Take up what an earlier process kept, in front of all that is added; gives it."""
        found: list[_Waiting] = []
        names = {file.name for file in self._folder.list()}
        for name in sorted(names):
            if not name.endswith(".json") or name == REFUSED:
                continue
            for row in self._folder.read_json(name)["entries"]:
                blob, size = row.pop("blob"), row.pop("size")
                if blob is None or blob in names:  # a dropped picture has lost its bytes
                    found.append(_Waiting(Entry(**row), file=name, blob=blob, size=size))
            if name != LAST:
                self._number = max(self._number, int(name.removesuffix(".json")) + 1)
        with self._changed:
            self._waiting.extendleft(reversed(found))
        if found:
            self._wake()
        return [item.entry for item in found]

    def add(self, entry: Entry) -> None:
        """Send it when its turn comes. Returns at once."""
        with self._changed:
            self._waiting.append(_Waiting(entry))
            gone = self._too_many() if entry.picture else []
        self._clean(gone)
        self._wake()

    def keep(self) -> None:
        """Write what is unsent to the folder, so that it outlives this process."""
        with self._keeping:
            with self._changed:
                items = [item for item in self._waiting if item.file is None]
            if not items:
                return
            name, rows = f"{self._number:08d}.json", []
            for place, item in enumerate(items):
                entry = item.entry
                if entry.blob is not None:
                    item.blob = f"{self._number:08d}-{place}"
                    self._folder.write(item.blob, entry.blob)
                rows.append(_row(entry) | {"blob": item.blob, "size": item.size})
            self._folder.write_json(name, {"head": self._head, "entries": rows})
            self._number += 1
            with self._changed:
                for item in items:
                    item.file = name
                    if item.blob is not None:  # it is read again when its turn comes
                        item.entry = replace(item.entry, blob=None)
                waiting = {id(item) for item in self._waiting}
                sent = [item for item in items if id(item) not in waiting]
            self._clean(sent)

    def foretell(self, entry: Entry) -> None:
        """Keep an entry without bytes for the next process alone, after all else, until it is taken back."""
        self._folder.write_json(LAST, {"head": self._head, "entries": [_row(entry) | {"blob": None, "size": 0}]})

    def take_back(self) -> None:
        """Forget what was foretold, and the folder if nothing else is in it."""
        self._delete(LAST)
        self._folder.delete_if_empty()

    def flush(self, seconds: float, *, tries: int | None = None) -> bool:
        """Try at once, and wait until all is sent, for so long or for so many tries; gives whether all is sent."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._next_try, before = 0.0, self._failures
            self._changed.notify_all()
            while (self._waiting or self._cleaning) and (left := deadline - time.monotonic()) > 0:
                if tries is not None and self._failures - before >= tries:
                    break
                self._changed.wait(left)
            return not self._waiting

    def left(self) -> Counter[str]:
        """How many entries of each kind are unsent."""
        with self._changed:
            return Counter(item.entry.kind for item in self._waiting)

    def stop(self) -> None:
        """End the thread after what it is sending now; call `keep` first."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(STOP_SECONDS)

    def _wake(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True, name="outbox")
                self._thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while (items := self._next()) is not None:
            try:
                try:
                    sent = self._send([self._whole(item) for item in items])
                except RefusedError as error:
                    if len(items) > 1:
                        self._alone = len(items)  # one of them is to blame: each is sent by itself
                        continue
                    self._refuse(items[0], error)
                    sent = 1
            except Exception as error:  # whatever it is, it is told, and what was not sent stays
                self._wait(str(without_secrets(f"{type(error).__name__}: {error}"))[:TROUBLE_CHARACTERS])
                self._keep_or_tell()
                continue
            self._recovered()
            self._alone = max(0, self._alone - sent)
            with self._changed:
                done = [self._waiting.popleft() for _ in range(sent)]
                self._cleaning = True
            self._clean(done)
            with self._changed:
                self._cleaning = False
                self._changed.notify_all()

    def _next(self) -> list[_Waiting] | None:
        """The entries to be sent next, once it is time; None when it is over."""
        with self._changed:
            while not self._stopped:
                pause = self._next_try - time.monotonic()
                if self._waiting and pause <= 0:
                    first = self._waiting[0]
                    if first.size:
                        return [first]
                    items: list[_Waiting] = []
                    for item in self._waiting:
                        if item.size or len(items) == (1 if self._alone else ENTRIES_PER_CALL):
                            break
                        items.append(item)
                    return items
                self._changed.wait(pause if self._waiting else None)
        return None

    def _whole(self, item: _Waiting) -> Entry:
        entry = item.entry
        if item.size and entry.blob is None:
            assert item.blob is not None
            return replace(entry, blob=self._folder.read(item.blob))
        return entry

    def _wait(self, trouble: str) -> None:
        if self.trouble is None:
            logging.getLogger(__name__).warning(
                "%s does not take what this run tells it; work goes on, it is kept and sent later: %s",
                self._label,
                trouble,
            )
        with self._changed:
            self._pause = min(max(FIRST_PAUSE_SECONDS, 2 * self._pause), LONGEST_PAUSE_SECONDS)
            self._next_try = time.monotonic() + self._pause
            self.trouble = trouble
            self._failures += 1
            self._changed.notify_all()

    def _keep_or_tell(self) -> None:
        try:
            self.keep()
        except OSError as error:  # this thread is not the one to end the work; `keep` before a checkpoint does
            logging.getLogger(__name__).warning("%s: what is unsent is not kept yet: %s", self._folder.uri, error)

    def _recovered(self) -> None:
        if self.trouble is not None:
            logging.getLogger(__name__).warning("%s answers again; what was kept is being sent", self._label)
        with self._changed:
            self.trouble, self._next_try, self._pause = None, 0.0, 0.0

    def _refuse(self, item: _Waiting, error: RefusedError) -> None:
        reason = str(without_secrets(str(error)))
        self.refused.append(f"{item.entry.kind}: {reason}")
        logging.getLogger(__name__).warning("%s refuses an entry, %s", self._label, self.refused[-1])
        before = self._folder.read_json(REFUSED) if self._folder.exists(REFUSED) else []
        row = {"kind": item.entry.kind, "data": item.entry.data, "reason": reason}
        self._folder.write_json(REFUSED, [*before, row])

    def _too_many(self) -> list[_Waiting]:
        """Take the oldest pictures out of the queue, save one that may be on its way, until few enough bytes wait."""
        pictures = [item for item in self._waiting if item.entry.picture]
        size, gone = sum(item.size for item in pictures), []
        for item in pictures[:-1]:
            if size <= PICTURE_BYTES:
                break
            if item is self._waiting[0]:
                continue
            self._waiting.remove(item)
            size -= item.size
            gone.append(item)
        self.dropped += len(gone)
        return gone

    def _clean(self, done: Sequence[_Waiting]) -> None:
        """Delete the files of entries that are sent, as far as no other entry is in them."""
        with self._changed:
            needed = {item.file for item in self._waiting}
        for name in {item.file for item in done} - needed:
            self._delete(name)
        for item in done:
            if item.file is not None:
                self._delete(item.blob)

    def _delete(self, name: str | None) -> None:
        try:
            if name is not None and self._folder.exists(name):
                self._folder.delete(name)
        except FileNotFoundError:
            return  # two threads found it done
        except OSError as error:  # it is told again by the next process, which the server bears
            logging.getLogger(__name__).warning("%s: %s could not be deleted: %s", self._folder.uri, name, error)


def _row(entry: Entry) -> dict[str, Any]:
    return {"kind": entry.kind, "data": entry.data, "picture": entry.picture}
