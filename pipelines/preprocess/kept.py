"""The crops of the images that an index keeps: rows of which the latents are to be made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.originals import Originals
from pipelines.preprocess.crop import rows_of_crops
from pipelines.preprocess.stored import stored, want
from pipelines.preprocess.verdicts import Scores
from pipelines.runs import Work
from pipelines.schema import (
    COMPUTED,
    INDEX_ONLY,
    INDEX_SCHEMA,
    KEY_LENGTH,
    LATENTS_IDENTITY,
    ROWS_AT_A_TIME,
    Column,
    Manifest,
    data_files,
    kept,
    with_latents_key,
)
from pipelines.storage import Storage

TOLD = (Column.REJECT_REASON, Column.CAPTION_REASONS)  # of which `kept` makes something
ASKED = [name for name in INDEX_SCHEMA.names if name in (*LATENTS_IDENTITY, *TOLD, Column.SOURCE)]
ALL = [name for name in INDEX_SCHEMA.names if name not in INDEX_ONLY]


class Kept:
    """A row for each crop of each kept image, to be read twice: the keys of all first, then the rows that are missing.

    Some files of the index are in memory at a time.
    """

    def __init__(self, index: Storage, manifest: Manifest, crops: int, originals: Originals, work: Work) -> None:
        self._index, self._crops, self._originals = index, crops, originals
        self._groups: list[tuple[int, list[str]]] = []  # files that are read together, after so many rows of the index
        before = held = 0
        for file in data_files(index, manifest):
            if not self._groups or held >= ROWS_AT_A_TIME:
                self._groups.append((before, []))
                held = 0
            self._groups[-1][1].append(file.name)
            before, held = before + file.rows, held + file.rows
        self._counts: list[int] = []  # of crops, of each group
        count = manifest.counts.get("kept", 0) * crops
        self._keys = work.array(count, f"S{KEY_LENGTH}")  # hashed once, though rows are read twice
        self.weights = work.array(count, np.float64, fill=1.0)
        """How often training sees each crop: [crops], once `keys` has gone through all."""
        self.without_score = 0
        """Crops of images without an aesthetic score, likewise."""
        self._scores: Scores | None = None
        if COMPUTED in manifest.facts:
            names = [name for _, group in self._groups for name in group]
            keys = want((rows.column(Column.KEY) for rows in index.read_tables(names, [Column.KEY])), work)
            self._scores = Scores(stored(index, manifest.facts[COMPUTED], keys, work))

    def keys(self) -> Iterator[pa.ChunkedArray]:
        """The keys of all crops. Raises ValueError where the settings lack a source of the index."""
        self._counts, count = [], 0
        for number in range(len(self._groups)):
            images = self._images(number, ASKED)
            self._originals.check(images)
            sources = images.column(Column.SOURCE).combine_chunks().dictionary_encode()
            weights = np.array([self._originals.weight(name) for name in sources.dictionary.to_pylist()])
            crops = rows_of_crops(with_latents_key(images), self._crops)
            self._counts.append(crops.num_rows)
            of_images = weights[sources.indices.to_numpy()] if images.num_rows else np.empty(0)
            self.weights[count : count + crops.num_rows] = np.repeat(of_images, self._crops)
            self.without_score += crops.column(Column.AESTHETIC_SCORE).null_count
            self._keys[count : count + crops.num_rows] = crops.column(Column.KEY).to_numpy()
            count += crops.num_rows
            yield crops.column(Column.KEY)

    def rows(self, wanted: np.ndarray) -> Iterator[pa.Table]:
        """Those crops that are wanted [crops]."""
        ends = np.cumsum(self._counts)
        for number, (mask, known) in enumerate(zip(np.split(wanted, ends), np.split(self._keys, ends), strict=True)):
            of_images = mask.reshape(-1, self._crops).any(axis=1)
            if of_images.any():
                images = self._images(number, ALL).filter(pa.array(of_images))
                keys = known.reshape(-1, self._crops)[of_images]
                first, every = (pa.array(some).cast(pa.string()) for some in (keys[:, 0], keys.ravel()))
                crops = rows_of_crops(with_latents_key(images, first), self._crops, every)
                yield crops.filter(pa.array(mask[np.repeat(of_images, self._crops)]))

    def _images(self, number: int, columns: Sequence[str]) -> pa.Table:
        """The kept images of a group's files."""
        before, names = self._groups[number]
        rows = pa.concat_tables(self._index.read_tables(names, columns))
        numbers = before + np.flatnonzero(pc.is_null(rows.column(Column.REJECT_REASON)).to_numpy())
        images = kept(rows)
        if self._scores is not None:
            images = self._scores.add(images, numbers).drop_columns([Column.CLIP_SIMILARITY])
        return images
