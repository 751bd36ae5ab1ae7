"""Stored files that are read at any place: ranges that are whole or an error, and streams over them."""

from __future__ import annotations

import io
import os
import random
import time
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

REQUEST_BYTES = 64 * 2**20  # most that one read asks for
OVERFLOWN = "Failed to flush response stream"  # as Arrow says
MARKS = (0x5A, 0xA5, 0x3C, 0xC3)  # what stands where an answer's last byte comes


class RangeReader:
    """One stored file, read at any place, by several threads at a time; closed when nobody refers to it any more."""

    def __init__(self, file: io.FileIO | pa.NativeFile, name: str, attempts: int = 1) -> None:
        self.file, self.name, self._attempts = file, name, attempts
        self._descriptor = file.fileno() if isinstance(file, io.FileIO) else None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target`, bytes, from `offset` on. Raises OSError where the file ends before."""
        done = 0
        while done < len(target):
            part = target[done : done + REQUEST_BYTES]
            if self._descriptor is not None:
                count = os.preadv(self._descriptor, [part], offset + done)
            else:
                count = self._request(part, offset + done)
            if count == 0:
                raise OSError(f"{self.name} ends before byte {offset + len(target)}")
            done += count

    def size(self) -> int:
        """Bytes of the file."""
        return self.file.size() if self._descriptor is None else os.fstat(self._descriptor).st_size  # type: ignore[union-attr]

    def stream(self, size: int, read_ahead: int) -> io.BufferedReader:
        """The file, of `size` bytes, as a stream that can seek. Where the storage fails, it raises StorageError."""
        return io.BufferedReader(_Stream(self, size, StorageError), read_ahead)

    def parquet(self) -> pq.ParquetFile:
        """The file as Parquet."""
        if self._descriptor is not None:
            return pq.ParquetFile(self.file)
        return pq.ParquetFile(pa.PythonFile(_Stream(self, self.size(), OSError), mode="r"))

    def _request(self, part: memoryview, offset: int) -> int:
        """Fill `part` by one request to S3; how many bytes were there. Raises OSError where no answer was whole.

        An answer that is shorter than what was asked for, and says so in its length, passes Arrow: it counts the bytes
        that it asked for, and leaves the rest of the buffer as it was. So the last byte is marked, and an answer that
        leaves the mark is asked for again, with another. And an error's text that is longer than `part` ends Arrow's
        own attempts, so that they are made here.
        """
        problem: Exception | None = None
        for attempt in range(max(2, self._attempts)):
            mark = part[-1] = MARKS[attempt % len(MARKS)]
            try:
                count = self.file.get_stream(offset, len(part)).readinto(part)  # type: ignore[union-attr]
            except OSError as error:
                if OVERFLOWN not in str(error):
                    raise
                problem = error
                time.sleep(random.random() * min(0.1 * 2**attempt, 10.0))
                continue
            if count < len(part) or part[-1] != mark:
                return count
            problem = OSError(f"answers from byte {offset} on were shorter than the {len(part)} asked for")
        raise OSError(f"{self.name}, {attempt + 1} times: {problem}") from problem


class StorageError(RuntimeError):
    """The storage failed, which says nothing of what it stores: no OSError, which readers of file formats raise too."""


class _Stream(io.RawIOBase):
    """A stored file of `size` bytes as a stream that can seek. Where it cannot be read, it raises `raising`."""

    def __init__(self, reader: RangeReader, size: int, raising: type[Exception]) -> None:
        self._reader, self._size, self._place, self._raising = reader, size, 0, raising

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, target: Any) -> int:
        count = max(0, min(len(target), self._size - self._place))
        try:
            self._reader.read_into(memoryview(target).cast("B")[:count], self._place)
        except OSError as error:
            raise self._raising(f"{self._reader.name} cannot be read: {error}") from error
        self._place += count
        return count
