"""Where files live: a local folder or an s3:// prefix behind one small class. S3 enters the project here only.

Every write is all or nothing: locally a temporary file is flushed and renamed, on S3 an object appears when its
upload completes. A name that exists is whole.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from annotated_types import Gt
from pyarrow import fs as pafs

from pipelines.ranges import RangeReader
from pipelines.walk import files_below, opened

READ_AHEAD = 2**20  # bytes of a stream
TABLE_READERS, TABLES_AHEAD = 16, 64  # tables that are read at a time, and before they are asked for
AHEAD_BYTES = 16 * 2**20  # of these in memory
FILES_AT_A_TIME = 65_536  # of a listing, as Python values
LISTED = pa.schema([("name", pa.string()), ("size", pa.int64()), ("modified_us", pa.int64())])
PART_BYTES = 16 * 2**20  # of an upload whose size is not known; ten are in memory at most
GONE = "NO_SUCH_UPLOAD"  # as boto3 says
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


class _Pipe:
    """What a thread that uploads reads, until the writer closes the other end, or breaks it off."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.broken = file, False

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        if self.broken:
            raise _BrokenOffError
        return data


class _UploadGoneError(OSError):
    """The server does not know the upload any more that was to be completed."""


class _BrokenOffError(Exception):
    """The writer of an upload failed: the upload ends, and is not completed."""


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
        files = (FileStat(*found) for found in self._files_below(folder))
        return sorted(files, key=lambda file: file.name)

    def folders(self, folder: str = "") -> set[str]:
        """The names of the folders in `folder`: local ones also where all files are still being written; on S3 those
        with a file in them, since some servers go on showing empty ones."""
        start = len(self.root) + 1
        if not self.is_local:
            place = len(self.path(folder)) + 1 - start
            names = (name for name, _, _ in self._files_below(folder))
            return {name[: name.index("/", place)] for name in names if "/" in name[place:]}
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return {info.path[start:] for info in found if info.type == pafs.FileType.Directory}

    def list_table(self) -> pa.Table:
        """As `list`, of the whole folder, as columns name, size and modified_us: for folders of millions of files."""
        found = self._files_below("")
        tables = []
        while some := list(islice(found, FILES_AT_A_TIME)):
            tables.append(pa.table(list(zip(*some, strict=True)), LISTED))
        return pa.concat_tables([*tables, LISTED.empty_table()]).sort_by("name")

    def read(self, name: str) -> bytes:
        """The bytes of `name`. Raises FileNotFoundError if there is none."""
        if self.is_local:
            with opened(self.path(name)) as file:
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
        return RangeReader(opened(path) if self.is_local else self.filesystem.open_input_file(path), name, attempts)

    def stream(self, name: str, size: int) -> io.BufferedReader:
        """The file `name` of `size` bytes, read ahead in pieces; seeking past one leaves bytes unread.

        Where the storage fails, reading raises StorageError.
        """
        return self.open(name).stream(size, READ_AHEAD)

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write `name` whole, replacing what is there."""
        if not self.is_local:
            self._put(name, pa.BufferReader(data))
            return
        with _replacing(self.path(name)) as temporary, open(temporary, "wb") as file:
            file.write(data)

    @contextmanager
    def output(self, name: str) -> Iterator[BinaryIO]:
        """`name`, for the block to write piece by piece, without a copy elsewhere; if that fails, it is as it was."""
        if self.is_local:
            with _replacing(self.path(name)) as temporary, open(temporary, "wb") as file:
                yield file
            return
        receiver, sender = os.pipe()
        source = _Pipe(os.fdopen(receiver, "rb"))
        file = os.fdopen(sender, "wb")
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(self._send_piped, name, source)
            try:
                yield file
                file.close()
            except BaseException as error:
                source.broken = True
                with suppress(BrokenPipeError):
                    file.close()
                if isinstance(error, BrokenPipeError):  # most likely since the upload has failed, which says why
                    with suppress(_BrokenOffError):
                        sent.result()
                raise
            sent.result()

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
        """Write what the binary file `source` holds as the object `name`: in one request, or in parts."""
        threads = source.seek(0, io.SEEK_END) > PART_BYTES
        for last in (False, True):
            source.seek(0)
            try:
                self._send(name, source, threads)
                return
            except _UploadGoneError:  # most likely completed, and the answer lost: written again, to be sure
                if last:
                    raise

    def _send_piped(self, name: str, source: _Pipe) -> None:
        with source.file:  # whoever writes to the other end learns that nobody reads any more
            self._send(name, source, threads=True)

    def _send(self, name: str, source: Any, threads: bool) -> None:
        """What can be read from `source` until it ends, as the object `name`.

        By boto3, because Arrow completes an upload that an error ended early, and its copy_files tells of no error.
        """
        from boto3.exceptions import S3UploadFailedError
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import BotoCoreError, ClientError

        bucket, _, key = self.path(name).partition("/")
        config = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=threads)
        try:
            self._client.upload_fileobj(source, bucket, key, Config=config)
        except (S3UploadFailedError, BotoCoreError, ClientError) as error:
            code = _code(error)
            kind = _UploadGoneError if code == GONE else OSError
            raise kind(f"{self.uri}/{name}: writing it failed: AWS Error {code}: {error}") from error

    def delete(self, name: str) -> None:
        """Delete the file `name`."""
        self.filesystem.delete_file(self.path(name))

    def delete_folder(self, name: str) -> None:
        """Delete the folder `name` and all below it."""
        self.filesystem.delete_dir(self.path(name))

    def delete_if_empty(self) -> None:
        """Delete this folder where it is local and has nothing in it: elsewhere there are no folders without files."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self.root)

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
        """As `read_table`, of each of `names` in their order, several read at a time: as many ahead as take AHEAD_BYTES
        where all are as large as the last one, and TABLES_AHEAD at most."""
        ahead = 0  # of the first nothing is known
        with ThreadPoolExecutor(TABLE_READERS) as pool:
            waiting: deque[Future[pa.Table]] = deque()
            for name in names:
                waiting.append(pool.submit(self.read_table, name, columns))
                while len(waiting) > ahead:
                    table = waiting.popleft().result()
                    ahead = min(TABLES_AHEAD, AHEAD_BYTES // max(1, table.nbytes))
                    yield table
                    del table  # not held while the next one is waited for
            while waiting:
                yield waiting.popleft().result()

    def write_table(self, name: str, table: pa.Table, **parquet: Any) -> int:
        """Write `table` as the Parquet file `name`, in one row group or of `row_group_size`; returns its size in
        bytes."""
        parquet = {"row_group_size": max(1, table.num_rows)} | parquet
        if self.is_local:
            with _replacing(self.path(name)) as temporary:
                pq.write_table(table, temporary, **parquet)
                return os.path.getsize(temporary)
        sink = pa.BufferOutputStream()  # in memory first: an upload that an error ends early is completed as it is
        pq.write_table(table, sink, **parquet)
        buffer = sink.getvalue()
        self.write(name, buffer)
        return buffer.size

    def read_group(self, name: str, number: int, columns: Sequence[str] | None = None) -> tuple[pa.Table, int]:
        """A row group of the Parquet file `name`, or some of its columns; and how many groups there are."""
        with self._parquet(name) as parquet:
            wanted = list(columns) if columns is not None else None
            if not parquet.num_row_groups:
                empty = parquet.schema_arrow.empty_table()
                return empty if wanted is None else empty.select(wanted), 1
            return parquet.read_row_group(number, columns=wanted), parquet.num_row_groups

    def _files_below(self, folder: str) -> Iterator[tuple[str, int, int]]:
        """Name, size and time, as FileStat has them, of each whole file."""
        place, start = self.path(folder), len(self.root) + 1
        for path, size, modified_us in files_below(place) if self.is_local else self._objects_below(place):
            if not path.rpartition("/")[2].startswith(TEMPORARY):
                yield path[start:], size, modified_us

    def _objects_below(self, place: str) -> Iterator[tuple[str, int, int]]:
        selector = pafs.FileSelector(place, recursive=True, allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # of a folder that came meanwhile: not there at first, there at last
            found = self.filesystem.get_file_info(selector)
        for info in found:
            if info.type == pafs.FileType.File:
                yield info.path, info.size, (info.mtime_ns or 0) // 1000

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
