"""The original images of one or several sources, as the index names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import SourceConfig
from pipelines.schema import Column
from pipelines.storage import Storage, StorageOptions


class Originals:
    """Reads the bytes of images, by their rows of the index or of a source's inputs."""

    def __init__(self, sources: Sequence[SourceConfig], options: StorageOptions) -> None:
        self._storages = {source.name: Storage(source.path, options) for source in sources}

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The image file's bytes. Raises FileNotFoundError where there is none."""
        return self.storage(row[Column.SOURCE]).read(row[Column.PATH])

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
