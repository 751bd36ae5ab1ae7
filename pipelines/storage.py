"""Where files live: a local folder or an s3:// prefix behind one small class. S3 enters the project here only.

Every write is all or nothing: locally a temporary file is flushed and renamed, on S3 an object appears when its
upload completes. A name that exists is whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import re
import shutil
import time
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
REQUEST_BYTES = 64 * 2**20  # most that one read asks for
GONE, OVERFLOWN = "NO_SUCH_UPLOAD", "Failed to flush response stream"  # as boto3 and Arrow say
MARKS = (0x5A, 0xA5, 0x3C, 0xC3)  # what stands where an answer's last byte comes
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

    @cached_property
    def _client(self) -> Any:
        """boto3's client of the server, which writes."""
        import boto3
        from botocore.config import Config

        options = self.options
        seconds, attempts = options.s3_timeout_seconds, options.s3_attempts
        return boto3.session.Session().client(
            "s3",
            endpoint_url=options.s3_endpoint,
            region_name=options.s3_region or ("us-east-1" if options.s3_endpoint else None),
            config=Config(
                connect_timeout=seconds,
                read_timeout=seconds,
                retries={"total_max_attempts": attempts, "mode": "standard"},
                s3={"addressing_style": "path"} if options.s3_endpoint else None,
            ),
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
        with self._parquet(name) as parquet:
            return list(parquet.schema_arrow.names)

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
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return file.read()
        return self.map(name).to_pybytes()

    def map(self, name: str) -> pa.Buffer:
        """The bytes of `name`, mapped to memory where it is local and read where it is not."""
        if not self.is_local:
            reader = self.open(name)
            data = pa.allocate_buffer(reader.size())
            reader.read_into(memoryview(data).cast("B"), 0)
            return data
        with pa.memory_map(self.path(name)) as file:
            return file.read_buffer()

    def open(self, name: str) -> RangeReader:
        """The file `name`, for reading parts of it."""
        path, attempts = self.path(name), self.options.s3_attempts
        return RangeReader(io.FileIO(path) if self.is_local else self.filesystem.open_input_file(path), name, attempts)

    def stream(self, name: str, size: int) -> io.BufferedReader:
        """The file `name` of `size` bytes, read ahead in pieces; seeking past one leaves bytes unread.

        Where the storage fails, reading raises StorageError.
        """
        return io.BufferedReader(_Stream(self.open(name), size, StorageError), READ_AHEAD)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write `name` whole, replacing what is there."""
        if not self.is_local:
            self._put(name, pa.BufferReader(data))
            return
        with _replacing(self.path(name)) as temporary, open(temporary, "wb") as file:
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
        if not self.is_local:
            with open(file, "rb") as source:
                self._put(name, source)
            return
        local = pafs.LocalFileSystem()
        with _replacing(self.path(name)) as temporary:
            pafs.copy_files(os.fspath(file), temporary, local, local)

    def _put(self, name: str, source: Any) -> None:
        """Write what the binary file `source` holds as the object `name`: in one request, or in parts if it is large.

        By boto3, because Arrow completes an upload that an error ended early, and its copy_files tells of no error.
        """
        from boto3.exceptions import S3UploadFailedError
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.path(name).partition("/")
        size = source.seek(0, io.SEEK_END)
        config = TransferConfig(use_threads=size > TransferConfig().multipart_threshold)
        for last in (False, True):
            source.seek(0)
            try:
                self._client.upload_fileobj(source, bucket, key, Config=config)
                return
            except (S3UploadFailedError, BotoCoreError, ClientError) as error:
                code = _code(error)
                if code == GONE and not last:  # most likely completed, and the answer lost: written again, to be sure
                    continue
                raise OSError(f"{self.uri}/{name}: writing it failed: AWS Error {code}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete the file `name`."""
        self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete the folder `name` and all below it."""
        self.filesystem.delete_dir(self.path(name))

    def read_json(self, name: str) -> Any:
        """The JSON document `name`."""
        try:
            return json.loads(self.read(name))
        except FileNotFoundError:
            raise
        except (ValueError, OSError):  # on S3 a document that was replaced between two requests may be of both
            return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as the JSON document `name`."""
        self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def read_table(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The Parquet file `name`, or some of its columns."""
        with self._parquet(name) as parquet:
            return parquet.read(columns=list(columns) if columns is not None else None)

    @contextmanager
    def _parquet(self, name: str) -> Iterator[pq.ParquetFile]:
        if not self.is_local:
            yield self.open(name).parquet()
            return
        with self.filesystem.open_input_file(self.path(name)) as file:
            yield pq.ParquetFile(file)

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


def _code(error: Exception) -> str:
    """What went wrong, in the words of Arrow's errors: SLOW_DOWN, ACCESS_DENIED, NETWORK_CONNECTION."""
    from botocore.exceptions import ClientError

    cause = error if isinstance(error, ClientError) else error.__context__
    if not isinstance(cause, ClientError):
        return "NETWORK_CONNECTION"
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cause.response["Error"]["Code"]).upper()


@contextmanager
def _replacing(target: str) -> Iterator[str]:
    """A temporary name beside `target` for the block to write, which takes its place, flushed, when the block ends."""
    folder = os.path.dirname(target)
    temporary = os.path.join(folder, f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with naming_full_disk(target):
            os.makedirs(folder, exist_ok=True)
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


@contextmanager
def naming_full_disk(path: str) -> Iterator[None]:
    """Let an error of a full disk, while the block writes the file `path`, say which disk that is and what is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        disk = os.path.dirname(os.path.abspath(path))
        while not os.path.ismount(disk):
            disk = os.path.dirname(disk)
        usage = shutil.disk_usage(disk)
        left = f"{usage.free / 2**20:,.1f} of {usage.total / 2**20:,.1f} MiB are free on the disk at {disk}"
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {left}", path) from error
