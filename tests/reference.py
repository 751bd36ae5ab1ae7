"""What out-of-core code is compared with: the same of all rows at once, in memory."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.filter import _rejected, near_detail, sides
from pipelines.preprocess.near import leaders
from pipelines.schema import (
    COMPUTED,
    INDEX_ONLY,
    INDEX_SCHEMA,
    Column,
    Manifest,
    Reject,
    data_files,
    kept,
    with_latents_key,
)
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


def mark_near_duplicates(rows: pa.Table, config: FilterConfig) -> pa.Table:
    """The verdict on images that look alike, over all rows of an index that nothing else rejects.

    The one with the largest area is kept, of equals the smallest (source, path); preprocess/near.py says what follows
    for others.
    """
    if config.near_duplicate_bits is None:
        return rows
    judged = pc.and_(pc.is_null(rows.column(Column.REJECT_REASON)), pc.is_valid(rows.column(Column.PERCEPTUAL_HASH)))
    places = np.flatnonzero(judged.to_numpy())
    found = rows.select([Column.SOURCE, Column.PATH, Column.KEY, Column.PERCEPTUAL_HASH]).take(places)
    height, width = (pc.cast(side, pa.int64()).take(places) for side in sides(rows))
    found = found.append_column("area", pc.multiply(height, width))
    wishes = [("area", "descending"), *((name, "ascending") for name in (Column.SOURCE, Column.PATH, Column.KEY))]
    order = pc.sort_indices(found, sort_keys=wishes).to_numpy()
    places, hashes = places[order], found.column(Column.PERCEPTUAL_HASH).to_numpy()[order]
    leader = leaders(hashes, config.near_duplicate_bits)
    near = np.flatnonzero(leader != np.arange(len(leader)))
    near = near[np.argsort(places[near])]  # as the rows are
    differing = np.bitwise_count(hashes[near] ^ hashes[leader[near]])
    detail = near_detail(pa.chunked_array([differing]), rows.take(places[near]), rows.take(places[leader[near]]))
    return _rejected(rows, places[near], Reject.NEAR_DUPLICATE, detail)
