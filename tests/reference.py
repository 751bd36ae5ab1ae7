"""What out-of-core code is compared with: the same of all rows at once, in memory."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.schema import COMPUTED, INDEX_ONLY, INDEX_SCHEMA, Column, Manifest, data_files, kept, with_latents_key
from pipelines.storage import Storage


def kept_rows(index: Storage, manifest: Manifest) -> pa.Table:
    """The index rows that are kept, with their kept captions and the key that their latents row has, sorted by it."""
    columns = [name for name in INDEX_SCHEMA.names if name not in INDEX_ONLY]
    names = [file.name for file in data_files(index, manifest)]
    tables = [kept(rows) for rows in index.read_tables(names, columns)]
    rows = pa.concat_tables(tables or [kept(INDEX_SCHEMA.empty_table().select(columns))])
    if COMPUTED in manifest.facts:
        rows = _with_computed(rows, index, manifest.facts[COMPUTED]).drop_columns([Column.CLIP_SIMILARITY])
    return with_latents_key(rows).sort_by(Column.KEY)


def _with_computed(rows: pa.Table, index: Storage, folder: str) -> pa.Table:
    """Index rows with clip_similarity, and aesthetic_score where it is null, from the files of computed scores."""
    columns = [Column.KEY, Column.CLIP_SIMILARITY, Column.AESTHETIC_SCORE]
    tables = list(index.read_tables([file.name for file in index.list(folder)], columns))
    if not tables:
        return rows.append_column(Column.CLIP_SIMILARITY, pa.nulls(rows.num_rows, pa.float32()))
    computed = pa.concat_tables(tables)
    computed = computed.take(pc.index_in(rows.column(Column.KEY), value_set=computed.column(Column.KEY)))
    aesthetic = pc.coalesce(rows.column(Column.AESTHETIC_SCORE), computed.column(Column.AESTHETIC_SCORE))
    place = rows.schema.get_field_index(Column.AESTHETIC_SCORE)
    rows = rows.set_column(place, INDEX_SCHEMA.field(Column.AESTHETIC_SCORE), aesthetic)
    return rows.append_column(Column.CLIP_SIMILARITY, computed.column(Column.CLIP_SIMILARITY))
