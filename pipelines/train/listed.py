"""The images that an index keeps, in the order in which training counts them: a list in the run's folder.

The driver writes it once, before the run begins, by bucket, source and content. It follows from the set of kept images
alone, and workers read the parts of it that a step asks for, so that none of them holds the index. It is files of rows
of one bucket and source, which the plan (train/plan.py) draws from; a file is blocks of rows, each an Arrow stream.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import Size
from pipelines.originals import Originals
from pipelines.runs import CODE, KEY_BITS, Runs, Work, codes_within, parts
from pipelines.schema import INDEX_SCHEMA, Column, DataFile, Manifest, data_files, pair_array
from pipelines.storage import Storage

LIST, FOLDER = "images.parquet", "images"  # in the run's folder: what files there are, and the files
FILE_ROWS, BLOCK_ROWS = 65_536, 1_024  # most rows of a file, and of what is read at a time
OPEN_FILES, HELD_BLOCKS = 64, 128  # that a worker holds; a block is some 0.2 MB
PACKED = pa.ipc.IpcWriteOptions(compression="zstd")
KEPT = [  # what reading an image asks for, but for the source, of which a file has one; the first two are the order
    Column.ID,
    Column.PATH,
    Column.FILE,
    Column.OFFSET,
    Column.LENGTH,
    Column.CODEC,
    Column.SKIP,
    Column.FILE_SIZE,
]
SORTED = pa.schema([INDEX_SCHEMA.field(name) for name in KEPT])
LISTED = pa.schema(
    [
        pa.field("name", pa.string()),
        pa.field("rows", pa.int64()),
        INDEX_SCHEMA.field(Column.BUCKET),
        INDEX_SCHEMA.field(Column.SOURCE),
        pa.field("ends", pa.list_(pa.int64())),  # of its blocks, bytes
    ]
)


def list_images(output: Storage, index: Storage, manifest: Manifest, originals: Originals, work: Work) -> None:
    """Write the list of the images that the index keeps into a run's folder.

    Raises ValueError where `originals` lacks a source of the index.
    """
    for left in output.list(FOLDER):  # by a run that was killed before it had begun
        output.delete(left.name)
    buckets = sorted((height, width) for height, width in manifest.fingerprint["buckets"])
    names = originals.names
    files: dict[str, list[Any]] = {field.name: [] for field in LISTED}
    for group, rows in _files(*_grouped(index, manifest, buckets, originals, work)):
        packed = [_packed(rows.slice(start, BLOCK_ROWS)) for start in range(0, rows.num_rows, BLOCK_ROWS)]
        name = f"{FOLDER}/{len(files['name']):06}"
        output.write(name, b"".join(packed))
        bucket, source = buckets[group // len(names)], names[group % len(names)]
        told = {"name": name, "rows": rows.num_rows, Column.BUCKET: bucket, Column.SOURCE: source}
        told["ends"] = np.cumsum([len(block) for block in packed]).tolist()
        for column, values in files.items():
            values.append(told[column])
    output.write_table(LIST, pa.table(files, LISTED))


def _grouped(
    index: Storage, manifest: Manifest, buckets: Sequence[Size], originals: Originals, work: Work
) -> tuple[Runs, np.ndarray]:
    """The kept images by group, the number of a bucket and source, and how many each group has [groups]."""
    names = originals.names
    runs, counts = work.runs(SORTED), np.zeros(len(buckets) * len(names), np.int64)
    known = np.array([height << 32 | width for height, width in buckets], np.int64)
    asked = [*KEPT, Column.SOURCE, Column.BUCKET, Column.REJECT_REASON]
    for rows in index.read_tables([file.name for file in data_files(index, manifest)], asked):
        kept = rows.filter(pc.is_null(rows.column(Column.REJECT_REASON)))
        originals.check(kept)
        sources = pc.index_in(kept.column(Column.SOURCE), value_set=pa.array(names, pa.string())).to_numpy()
        pairs = pair_array(kept, Column.BUCKET).astype(np.int64)
        groups = np.searchsorted(known, pairs[:, 0] << 32 | pairs[:, 1]) * len(names) + sources
        counts += np.bincount(groups, minlength=len(counts))
        runs.add(codes_within(groups, kept.column(Column.ID)), kept.select(KEPT))
    return runs, counts


def _files(runs: Runs, counts: np.ndarray) -> Iterator[tuple[int, pa.Table]]:
    """(group, rows) of each file: the rows of a group by content, cut into files of one size, give or take a row."""
    for group, of_group in groupby(_in_order(runs), key=itemgetter(0)):
        pieces = (rows for _, rows in of_group)
        count, held = int(counts[group]), SORTED.empty_table()
        files = -(-count // FILE_ROWS)
        for start, stop in pairwise(count * number // files for number in range(files + 1)):
            while held.num_rows < stop - start:
                held = pa.concat_tables([held, next(pieces)])
            yield group, held.slice(0, stop - start).combine_chunks()
            held = held.slice(stop - start)


def _in_order(runs: Runs) -> Iterator[tuple[int, pa.Table]]:
    """(group, some of its rows), in order."""
    for (rows,) in parts(runs):
        ranks = pa.array(rows.column(CODE).to_numpy() >> KEY_BITS)
        ranked = rows.set_column(rows.schema.get_field_index(CODE), CODE, ranks)
        part = ranked.take(pc.sort_indices(ranked, sort_keys=[(name, "ascending") for name in (CODE, *KEPT[:2])]))
        groups = part.column(CODE).to_numpy()
        edges = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist(), len(groups)]
        for start, stop in pairwise(edges if len(groups) else []):
            yield int(groups[start]), part.slice(start, stop - start).drop_columns([CODE])


def _packed(block: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema, options=PACKED) as writer:
        writer.write_table(block)
    return sink.getvalue()


class ListedImages:
    """The list of a run's images, for reading any of them. Threads may share it."""

    def __init__(self, output: Storage, originals: Originals) -> None:
        """Raises ValueError where `originals` lacks a source of the list."""
        listed = output.read_table(LIST)
        originals.check(listed)
        self._sources = listed.column(Column.SOURCE).to_pylist()
        told = (listed.column(name).to_pylist() for name in ("name", "rows", "bucket"))
        self.files = [
            DataFile(name=name, rows=rows, bucket=(height, width), weight=originals.weight(source))
            for name, rows, (height, width), source in zip(*told, self._sources, strict=True)
        ]
        """Files of one bucket and source, as the plan draws from them."""
        ends = listed.column("ends").combine_chunks()
        self._ends, self._first = ends.flatten().to_numpy(), np.cumsum([0, *ends.value_lengths().to_pylist()])
        self._open = lru_cache(OPEN_FILES)(output.open)  # two threads may make one at a time: no harm
        self._block = lru_cache(HELD_BLOCKS)(self._read_block)

    def row(self, file: int, row: int) -> dict[str, Any]:
        """One image, as the index has it: its id, and where its bytes lie."""
        number, place = divmod(row, BLOCK_ROWS)
        return self._of(self._block(file, number), file, place)

    def rows(self, rows: np.ndarray, pool: Executor) -> list[dict[str, Any]]:
        """The images of rows [B, 2] (file, row), each block read once."""
        places = [(file, *divmod(row, BLOCK_ROWS)) for file, row in rows.tolist()]
        wanted = sorted({(file, number) for file, number, _ in places})
        blocks = dict(zip(wanted, pool.map(lambda block: self._block(*block), wanted), strict=True))
        return [self._of(blocks[file, number], file, place) for file, number, place in places]

    def _of(self, block: pa.Table, file: int, place: int) -> dict[str, Any]:
        return block.slice(place, 1).to_pylist()[0] | {Column.SOURCE: self._sources[file]}

    def _read_block(self, file: int, number: int) -> pa.Table:
        place = int(self._first[file]) + number
        start, stop = int(self._ends[place - 1]) if number else 0, int(self._ends[place])
        data = bytearray(stop - start)
        self._open(self.files[file].name).read_into(memoryview(data), start)
        with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
            return stream.read_all()


def listed_ids(output: Storage) -> Iterator[tuple[str, list[str]]]:
    """(file, ids of its images) of each file of a run's list, in order."""
    for name in output.read_table(LIST, ["name"]).column(0).to_pylist():
        data, ids = pa.BufferReader(output.map(name)), []
        while data.tell() < data.size():
            with pa.ipc.open_stream(data) as stream:
                ids += stream.read_all().column(Column.ID).to_pylist()
        yield name, ids
