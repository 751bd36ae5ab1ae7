"""The original images of one or several sources: files, or parts of files, as the index names them."""

from __future__ import annotations

import errno
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import SINGLE_FILES, SourceConfig
from pipelines.ranges import RangeReader
from pipelines.schema import Column
from pipelines.spans import unpack
from pipelines.storage import Storage, StorageOptions

OPEN_FILES = 256  # files that images are parts of, held open by each process
ABSOLUTE = "^(/|s3://)"  # names of files that stand for themselves, and not for a place below a source's folder
S3 = "s3://"


class Originals:
    """Reads the bytes of images, by their rows of the index or of a source's inputs. Threads may share it."""

    def __init__(self, sources: Sequence[SourceConfig], options: StorageOptions) -> None:
        self._sources, self._options = tuple(sources), options
        self._storages = {source.name: source_folder(source.path, options)[0] for source in sources}
        self._weights = {source.name: source.weight for source in sources}
        self._open: OrderedDict[tuple[str, str], RangeReader] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Originals, (self._sources, self._options)  # files are opened again in each process

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The image's bytes as they were put in. Raises FileNotFoundError where their file is not there, or none can
        have its name."""
        storage, name = self.storage(row[Column.SOURCE]), row[Column.FILE] or row[Column.PATH]
        on_s3 = name.startswith(S3) or not (storage.is_local or name.startswith("/"))
        parts = name.removeprefix(S3).split("/")
        if on_s3 and ("" in parts or name == S3 + parts[0] or "\0" in name):  # Arrow refuses to ask for it
            raise FileNotFoundError(errno.ENOENT, "no file can have this name", name)
        if re.match(ABSOLUTE, name):
            folder, _, name = name.rpartition("/")
            storage = Storage(folder or "/", self._options)
        if row[Column.OFFSET] is None:
            return storage.read(name)
        span = bytearray(row[Column.LENGTH])
        self._reader(storage, name).read_into(memoryview(span), row[Column.OFFSET])
        return unpack(bytes(span), row[Column.CODEC], row[Column.SKIP] or 0, row[Column.FILE_SIZE])

    @property
    def names(self) -> list[str]:
        """The names of the sources, in order."""
        return sorted(self._storages)

    def weight(self, source: str) -> float:
        """How often the images of a source are seen in an epoch."""
        return self._weights[source]

    def storage(self, source: str) -> Storage:
        """The folder of a source, by its name."""
        return self._storages[source]

    def check(self, rows: pa.Table) -> None:
        """Raise ValueError where rows are of a source that the settings do not have."""
        unknown = sorted(set(pc.unique(rows.column(Column.SOURCE)).to_pylist()) - self._storages.keys())
        if unknown:
            raise ValueError(
                f"the index has images of the source {', '.join(map(repr, unknown))}, "
                f"and the settings name {', '.join(map(repr, self._storages))}"
            )

    def _reader(self, storage: Storage, name: str) -> RangeReader:
        key = (storage.uri, name)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
        reader = storage.open(name)  # two threads may open one at a time: no harm
        with self._lock:
            self._open[key] = reader
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return reader


def source_folder(path: str, options: StorageOptions) -> tuple[Storage, str | None]:
    """The folder of a source, and the file's name where the path names one."""
    if not path.endswith(SINGLE_FILES):
        return Storage(path, options), None
    folder, _, name = path.rpartition("/")
    return Storage(folder or ".", options), name
