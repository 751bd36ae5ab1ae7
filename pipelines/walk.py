"""Local files, whatever their names are and wherever links lead."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator

LEADS_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # of a path: there is no such file


def opened(path: str) -> io.FileIO:
    """The file `path`, for reading. Raises FileNotFoundError where there is none, or none can have this path."""
    if "\0" in path:
        raise FileNotFoundError(errno.ENOENT, "no file can have this name", path)
    try:
        return io.FileIO(path)
    except OSError as error:
        if error.errno in LEADS_NOWHERE:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        raise


def files_below(folder: str) -> Iterator[tuple[str, int, int]]:
    """(path, size in bytes, modification time in microseconds) of each file at any depth, in no order.

    Links are followed, but for those to a folder that they lie in: what is there is listed already. A link that leads
    nowhere, or to where this user may not look, is a file that cannot be read. In a name that is no UTF-8 the other
    bytes are written as `\\xe9`: no file is found by that path. Pipes and devices are no files. There are none where
    the folder is missing.
    """
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(folder, frozenset())]
    while waiting:
        place, around = waiting.pop()
        try:
            around |= {_identity(os.stat(place))}
            entries = os.scandir(place)
        except FileNotFoundError:
            continue
        with entries:
            for entry in entries:
                try:
                    found = entry.stat()
                except OSError as error:
                    if not entry.is_symlink():
                        if error.errno in LEADS_NOWHERE:  # it went meanwhile
                            continue
                        raise
                    if error.errno not in (*LEADS_NOWHERE, errno.EACCES):
                        raise
                    found = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(found.st_mode):
                    if not entry.is_symlink() or _identity(found) not in around:
                        waiting.append((entry.path, around))
                elif stat.S_ISREG(found.st_mode) or stat.S_ISLNK(found.st_mode):
                    yield _text(entry.path), found.st_size, found.st_mtime_ns // 1000


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _text(path: str) -> str:
    return path if path.isascii() else os.fsencode(path).decode(errors="backslashreplace")
