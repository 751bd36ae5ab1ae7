"""An image that kills its decoder's process costs its block a second try, and no more.

Decoders are native code: a damaged file can end the process, take all memory, or never come back. At the first try of
a block its images are decoded in threads of the task, under a watch that ends a task whose decoders hang. Ray starts
the block again, and this time each image is decoded in a child process, one at a time: the image that ends its child
is known, and its neighbours lose nothing. docs/decisions/0033 has the reasons.
"""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

HANG_SECONDS = 120.0  # the largest image that filters.max_pixels allows by default takes a tenth of it
DEATHS = 2  # of children, at one image: the first may have been killed for reasons of the machine
START_SECONDS = 120.0
STDERR = 2  # the process's own, whatever sys.stderr is
SPARE_BYTES = 2 * 2**30  # memory of a child besides pixels
BYTES_PER_PIXEL = 24  # 16-bit RGBA, and copies of it on the way to RGB

Decode = Callable[..., Any]  # (function, *arguments) -> what function(*arguments) gives or raises


class DecoderKilledError(RuntimeError):
    """An image ended each process that decoded it, or kept it until its time was over."""


class ChildStartError(Exception):
    """No child could be started: the machine's fault, and none of DECODE_ERRORS, which are an image's."""


@contextmanager
def decoding(attempt: int | None, max_pixels: int) -> Iterator[Decode]:
    """How the threads of a task call decoders, at its first (0), its second (1) or a further `attempt`.

    None stands for no task that would be started again: nothing is watched. Functions and arguments have to be
    picklable, for a child; what kills it raises DecoderKilledError.
    """
    if attempt is None:
        yield _call
        return
    child = _Child(SPARE_BYTES + BYTES_PER_PIXEL * max_pixels)
    try:
        if attempt == 0:
            with _watch(child) as call:
                yield call
            return
        logging.getLogger(__name__).warning(
            "a block of images is at attempt %d, since its process died: each image is decoded in a child process",
            attempt + 1,
        )
        yield child.call
    finally:
        child.end()


@contextmanager
def _watch(child: _Child) -> Iterator[Decode]:
    """Calls in the threads of this process, watched; what it has no memory left for is called in the child."""
    watch = _Watch()

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return watch.call(function, *arguments)
        except MemoryError:
            return child.call(function, *arguments)

    try:
        yield call
    finally:
        watch.end()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


class _Watch:
    """Ends this process, with the stacks of its threads, where a decoder is not done after HANG_SECONDS.

    A thread puts the end off again and again, as long as no decoder hangs. The end itself is in C: a decoder that
    holds the interpreter's lock stops that thread too.
    """

    def __init__(self) -> None:
        self._begun: dict[int, float] = {}  # by thread
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._put_off, daemon=True, name="watch of decoders")
        self._thread.start()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        thread = threading.get_ident()
        self._begun[thread] = time.monotonic()
        try:
            return function(*arguments)
        finally:
            del self._begun[thread]

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _put_off(self) -> None:
        while True:
            now = time.monotonic()
            if now - min(list(self._begun.values()), default=now) < HANG_SECONDS:
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=STDERR)
            if self._over.wait(HANG_SECONDS / 10):
                return


class _Child:
    """A process that decodes what it is sent, and a new one after each that dies."""

    def __init__(self, memory: int) -> None:
        self._memory, self._lock = memory, threading.Lock()
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            for _ in range(DEATHS):
                pipe = self._pipe or self._start(function)
                try:
                    pipe.send((function, arguments))
                    if not pipe.poll(HANG_SECONDS):
                        self.end()
                        end = f"not done after {HANG_SECONDS:g} s"
                        continue
                    result, error = pipe.recv()
                except (EOFError, ConnectionError):
                    end = self.end()
                    continue
                if isinstance(error, MemoryError):
                    raise DecoderKilledError("it takes more memory than its process may have") from error
                if error is not None:
                    raise error
                return result
        raise DecoderKilledError(f"{end}, in each of {DEATHS} processes of its own")

    def _start(self, function: Callable[..., Any]) -> Connection:
        context = multiprocessing.get_context("spawn")  # a fork would take locks of other threads along
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._memory, function), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if self._pipe.poll(START_SECONDS):
                self._pipe.recv()
                return self._pipe
            problem = f"not ready after {START_SECONDS:g} s"
        except EOFError:
            problem = self.end()
        self.end()
        raise ChildStartError(f"a process that decodes images did not start: {problem}")

    def end(self) -> str:
        """End the child; gives how it ended, if it has by itself."""
        if self._process is None or self._pipe is None:
            return ""
        self._pipe.close()
        self._process.join(1.0)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None
        return f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with {code}"


def _serve(pipe: Connection, memory: int, function: Callable[..., Any]) -> None:
    """The child: decode until the pipe is closed. An allocation beyond `memory` bytes raises MemoryError.

    It is given a `function` so that its module is imported before any image's time is taken.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # control-C is for the parent
    pipe.send("ready")
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result, error = function(*arguments), None
        except Exception as raised:
            result, error = None, raised
        pipe.send((result, error))
