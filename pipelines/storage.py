"""Where files live: a local folder or an s3:// prefix behind one small class. S3 enters the project here only.

Every write is all or nothing: locally a temporary file is flushed and renamed, on S3 an object appears when its
upload completes. A name that exists is whole.
"""

from __future__ import annotations

import io
import json
import os
import uuid
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Gt
from pyarrow import fs as pafs

READ_AHEAD = 2**20  # bytes of a stream
TABLE_READERS, TABLES_AHEAD = 16, 64  # tables that are read at a time, and before they are asked for
UPLOADED_AT_A_TIME = 2**26  # bytes of an upload that are in memory twice
TEMPORARY = ".incomplete-"  # prefix of a local file that is still being written


@dataclass(frozen=True, kw_only=True)
class StorageOptions:
    """How to reach S3. Credentials come from the usual AWS chain (environment, profile, instance role)."""

    s3_endpoint: str | None = None
    """URL of an S3-compatible server; None for AWS."""
    s3_region: str | None = None
    """Region; None lets the client find it."""
    s3_attempts: Annotated[int, Gt(0)] = 10
    """Attempts per request before it fails; each waits longer than the one before."""
    s3_timeout_seconds: Annotated[float, Gt(0)] = 60.0
    """Time to connect, and between two packets, before an attempt counts as failed."""


@dataclass(frozen=True)
class FileStat:
    """One stored file: its name below the folder, its size in bytes, its modification time in microseconds."""

    name: str
    size: int
    modified_us: int


class RangeReader:
    """One stored file, read at any place, by several threads at a time; closed when nobody refers to it any more."""

    def __init__(self, file: io.FileIO | pa.NativeFile, name: str) -> None:
        self.file, self.name = file, name
        self._descriptor = file.fileno() if isinstance(file, io.FileIO) else None

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target`, bytes, from `offset` on. Raises OSError where the file ends before."""
        done = 0
        while done < len(target):
            if self._descriptor is not None:
                count = os.preadv(self._descriptor, [target[done:]], offset + done)
            else:
                data = self.file.read_at(len(target) - done, offset + done)  # type: ignore[union-attr]  # of pyarrow
                count = len(data)
                target[done : done + count] = data
            if count == 0:
                raise OSError(f"{self.name} ends before byte {offset + len(target)}")
            done += count


class StorageError(RuntimeError):
    """The storage failed, which says nothing of what it stores: no OSError, which readers of file formats raise too."""


class _Stream(io.RawIOBase):
    """A stored file of `size` bytes as a stream that can seek."""

    def __init__(self, reader: RangeReader, size: int) -> None:
        self._reader, self._size, self._place = reader, size, 0

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
            raise StorageError(f"{self._reader.name} cannot be read: {error}") from error
        self._place += count
        return count


class _Upload:
    """An upload that waits for what it was given, a piece at a time: its own buffer would grow without end."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def write(self, data: Any, /) -> None:
        view = memoryview(data)
        for start in range(0, len(view), UPLOADED_AT_A_TIME):
            self._stream.write(view[start : start + UPLOADED_AT_A_TIME])
            self._stream.flush()


@dataclass(frozen=True)
class Storage:
    """The folder at `uri`: a local path or s3://bucket/prefix. Names are relative to it, with forward slashes."""

    uri: str
    options: StorageOptions = field(default_factory=StorageOptions)

    def __post_init__(self) -> None:
        if "://" in self.uri and not self.uri.startswith("s3://"):
            raise ValueError(f"{self.uri}: a local path or s3:// was expected")

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's file system."""
        return not self.uri.startswith("s3://")

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system that serves the folder."""
        if self.is_local:
            return pafs.LocalFileSystem()
        options = self.options
        scheme, _, address = (options.s3_endpoint or "").rpartition("://")
        return pafs.S3FileSystem(
            endpoint_override=address or None,
            scheme=scheme or "https",
            region=options.s3_region or ("us-east-1" if address else None),
            connect_timeout=options.s3_timeout_seconds,
            request_timeout=options.s3_timeout_seconds,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=options.s3_attempts),
        )

    @property
    def root(self) -> str:
        """The folder as the file system names it: an absolute path, or bucket/prefix."""
        if self.is_local:
            return os.path.abspath(self.uri)
        return self.uri.removeprefix("s3://").rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "options": self.options}  # the connection is made again in each process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def path(self, name: str = "") -> str:
        """The file system's path of `name`."""
        return f"{self.root}/{name}" if name else self.root

    def folder(self, name: str) -> Storage:
        """The folder `name` below this one."""
        return Storage(f"{self.uri.rstrip('/')}/{name}", self.options)

    def exists(self, name: str) -> bool:
        """Whether `name` is a file."""
        return self.filesystem.get_file_info(self.path(name)).type == pafs.FileType.File

    def table_columns(self, name: str) -> list[str]:
        """The columns of the Parquet file `name`."""
        with self.filesystem.open_input_file(self.path(name)) as file:
            return list(pq.ParquetFile(file).schema_arrow.names)

    def list(self, folder: str = "") -> list[FileStat]:
        """All files below `folder`, at any depth, sorted by name; files still being written are not among them."""
        start = len(self.root) + 1
        files = [
            FileStat(info.path[start:], info.size, (info.mtime_ns or 0) // 1000) for info in self._files_below(folder)
        ]
        return sorted(files, key=lambda file: file.name)

    def folders(self, folder: str = "") -> set[str]:
        """The names of the folders in `folder`, also of those whose files are all still being written."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        start = len(self.root) + 1
        found = self.filesystem.get_file_info(selector)
        return {info.path[start:] for info in found if info.type == pafs.FileType.Directory}

    def list_table(self) -> pa.Table:
        """As `list`, of the whole folder, as columns name, size and modified_us: for folders of millions of files."""
        names, sizes, times = [], array("q"), array("q")
        start = len(self.root) + 1
        for info in self._files_below(""):
            names.append(info.path[start:])
            sizes.append(info.size)
            times.append((info.mtime_ns or 0) // 1000)
        columns = {"name": pa.array(names, pa.string()), "size": pa.array(sizes), "modified_us": pa.array(times)}
        return pa.table(columns).sort_by("name")

    def read(self, name: str) -> bytes:
        """The bytes of `name`. Raises FileNotFoundError if there is none."""
        with self.filesystem.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def map(self, name: str) -> pa.Buffer:
        """The bytes of `name`, mapped to memory where it is local and read where it is not."""
        if not self.is_local:
            return pa.py_buffer(self.read(name))
        with pa.memory_map(self.path(name)) as file:
            return file.read_buffer()

    def open(self, name: str) -> RangeReader:
        """The file `name`, for reading parts of it."""
        path = self.path(name)
        return RangeReader(io.FileIO(path) if self.is_local else self.filesystem.open_input_file(path), name)

    def stream(self, name: str, size: int) -> io.BufferedReader:
        """The file `name` of `size` bytes, read ahead in pieces; seeking past one leaves bytes unread.

        Where the storage fails, reading raises StorageError.
        """
        return io.BufferedReader(_Stream(self.open(name), size), READ_AHEAD)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write `name` whole, replacing what is there."""
        target = self.path(name)
        if not self.is_local:
            with self.filesystem.open_output_stream(target) as stream:
                stream.write(data)
            return
        with _replacing(target) as temporary, open(temporary, "wb") as file:
            file.write(data)

    @contextmanager
    def output(self, name: str) -> Iterator[BinaryIO | _Upload]:
        """`name`, for the block to write piece by piece, without a copy elsewhere; if that fails, it is not there."""
        target = self.path(name)
        if self.is_local:
            with _replacing(target) as temporary, open(temporary, "wb") as file:
                yield file
            return
        with self.filesystem.open_output_stream(target) as stream:
            try:
                yield _Upload(stream)
            except BaseException:
                stream.close()  # which completes the upload as it is
                self.filesystem.delete_file(target)
                raise

    def upload(self, name: str, file: str | os.PathLike[str]) -> None:
        """Copy a local file, however large, to `name`, whole."""
        target = self.path(name)
        local = pafs.LocalFileSystem()
        if not self.is_local:
            pafs.copy_files(os.fspath(file), target, local, self.filesystem)
            return
        with _replacing(target) as temporary:
            pafs.copy_files(os.fspath(file), temporary, local, local)

    def delete(self, name: str) -> None:
        """Delete the file `name`."""
        self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete the folder `name` and all below it."""
        self.filesystem.delete_dir(self.path(name))

    def read_json(self, name: str) -> Any:
        """The JSON document `name`."""
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as the JSON document `name`."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The Parquet file `name`, or some of its columns."""
        with self.filesystem.open_input_file(self.path(name)) as file:
            return pq.ParquetFile(file).read(columns=list(columns) if columns is not None else None)

    def read_tables(self, names: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """As `read_table`, of each of `names` in their order, several read at a time and few ahead."""
        with ThreadPoolExecutor(TABLE_READERS) as pool:
            for start in range(0, len(names), TABLES_AHEAD):
                group = names[start : start + TABLES_AHEAD]
                yield from pool.map(lambda name: self.read_table(name, columns), group)

    def write_table(self, name: str, table: pa.Table, **parquet: Any) -> int:
        """Write `table` as the Parquet file `name`, in one row group; returns its size in bytes."""
        parquet["row_group_size"] = max(1, table.num_rows)
        if self.is_local:
            with _replacing(self.path(name)) as temporary:
                pq.write_table(table, temporary, **parquet)
                return os.path.getsize(temporary)
        sink = pa.BufferOutputStream()  # in memory first: an upload that an error ends early is completed as it is
        pq.write_table(table, sink, **parquet)
        buffer = sink.getvalue()
        self.write(name, buffer)
        return buffer.size

    def _files_below(self, folder: str) -> Iterator[pafs.FileInfo]:
        selector = pafs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # of a folder that came while it was looked for: not there at first, there at last
            found = self.filesystem.get_file_info(selector)
        for info in found:
            if info.type == pafs.FileType.File and not info.base_name.startswith(TEMPORARY):
                yield info

    def remove_incomplete(self) -> int:
        """Delete what writers that were killed left behind; returns how many files. Local folders only."""
        if not self.is_local:
            return 0  # an unfinished upload is invisible; a lifecycle rule ends it
        count = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                if name.startswith(TEMPORARY):
                    os.unlink(os.path.join(folder, name))
                    count += 1
        return count


@contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A temporary name beside `target` for the block to write, which takes its place, flushed, when the block ends."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
