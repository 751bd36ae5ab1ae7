"""Find the inputs of a source."""

from __future__ import annotations

import pyarrow as pa

from pipelines.config import SourceConfig
from pipelines.preprocess.sources.folder import list_folder
from pipelines.preprocess.sources.inputs import keyed
from pipelines.storage import Storage


def list_inputs(source: Storage, config: SourceConfig) -> pa.Table:
    """Every input, sorted by path. Raises FileNotFoundError where there is no image, ValueError for wrong metadata."""
    return keyed(list_folder(source, source.list_table(), config))
