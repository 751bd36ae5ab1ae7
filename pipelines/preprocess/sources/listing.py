"""Find the inputs of all sources."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from pipelines.config import SourceConfig
from pipelines.preprocess.sources.folder import list_folder
from pipelines.preprocess.sources.inputs import keyed
from pipelines.storage import Storage, StorageOptions


def list_inputs(sources: Sequence[SourceConfig], options: StorageOptions) -> pa.Table:
    """Every input, in the order of sources, and there sorted by path.

    Raises FileNotFoundError where a source has no image, ValueError for wrong metadata; both name the source.
    """
    return pa.concat_tables([list_source(source, options) for source in sources])


def list_source(config: SourceConfig, options: StorageOptions) -> pa.Table:
    """The inputs of one source, sorted by path."""
    source = Storage(config.path, options)
    return keyed(list_folder(source, source.list_table(), config), config.name)
