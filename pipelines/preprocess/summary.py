"""What an index holds, in numbers of a fixed size and a few sampled rows: file by file, never all rows at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.captions import left, out_of_lists
from pipelines.config import Size
from pipelines.preprocess.filter import garbled, kept_instead
from pipelines.schema import PLACE, Column, Manifest, Reject, data_files
from pipelines.storage import Storage

SIDE_EDGES = [2 ** (step / 4) for step in range(65)]  # of the size map, pixels: quarter octaves up to 65,536
SHARE_BINS, MOST_WORDS = 50, 100
MOST_HASHES = 200_000  # hashes that are compared here; a preview, so it ends somewhere
READ = [
    Column.KEY,
    Column.SOURCE,
    Column.PATH,
    Column.CAPTIONS,
    Column.CAPTION_WEIGHTS,
    Column.CAPTION_REASONS,
    Column.ORIGINAL_SIZE,
    Column.BUCKET,
    Column.PERCEPTUAL_HASH,
    Column.REJECT_REASON,
    Column.REJECT_DETAIL,
    *(Column.FILE_SIZE, *(field.name for field in PLACE)),
]
SHOWN = [
    *(Column.KEY, Column.SOURCE, Column.PATH, Column.CAPTIONS, Column.ORIGINAL_SIZE, Column.REJECT_DETAIL),
    *(Column.FILE_SIZE, *(field.name for field in PLACE)),  # pictures are read by their place
]
Row = dict[str, Any]


@dataclass
class Summary:
    """The numbers of an index."""

    side: int
    """Side of the square that the buckets have the area of, pixels."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows by reject reason; "kept" for those without."""
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((len(SIDE_EDGES) - 1,) * 2, np.int64))
    """[height, width] images whose size is known, by SIDE_EDGES."""
    small: int = 0
    """Those whose shortest side is below `side`."""
    buckets: Counter[Size] = field(default_factory=Counter)
    """Kept rows by (height, width)."""
    enlarged: int = 0
    """Kept rows smaller than their bucket."""
    kept_shares: np.ndarray = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))
    """Kept rows by the share of their pixels inside the crop."""
    square_shares: np.ndarray = field(default_factory=lambda: np.zeros(SHARE_BINS, np.int64))
    """Likewise, by what a crop to the centre square would keep."""
    kept_share_sum: float = 0.0
    square_share_sum: float = 0.0
    words: np.ndarray = field(default_factory=lambda: np.zeros(MOST_WORDS + 1, np.int64))
    """Kept captions of kept rows by words; the last stands for all above."""
    captions_dropped: int = 0
    """Captions of kept rows that are left out."""
    garbled: list[str] = field(default_factory=list)
    """source:path of some rows, kept or not, with a caption of which bytes were no text."""
    garbled_count: int = 0
    """How many there are."""
    examples: dict[str, list[Row]] = field(default_factory=dict)
    """Some rows of each reason: those with the smallest keys, which are hashes."""
    pairs: list[tuple[Row, Row]] = field(default_factory=list)
    """Some rejected duplicates, each with the row that is kept for it."""
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """Perceptual hashes of the kept rows, by descending area; empty where there are more than MOST_HASHES."""

    @property
    def kept(self) -> int:
        """Kept rows."""
        return self.reasons["kept"]


def summarize(index: Storage, manifest: Manifest, examples: int) -> Summary:
    """Read the index once, and its kept rows a second time for the originals of sampled duplicates."""
    largest = max(height * width for height, width in manifest.fingerprint["buckets"])
    summary = Summary(side=round(largest**0.5))
    names = [file.name for file in data_files(index, manifest)]
    hashes: list[tuple[np.ndarray, np.ndarray]] = []
    for name in names:
        rows = index.read_table(name, READ)
        reasons = pc.fill_null(rows.column(Column.REJECT_REASON), "kept")
        for count in pc.value_counts(reasons).to_pylist():
            summary.reasons[count["values"]] += count["counts"]
            members = rows.filter(pc.equal(reasons, count["values"])).select(SHOWN).sort_by(Column.KEY)
            shown = summary.examples.get(count["values"], []) + members.slice(0, examples).to_pylist()
            summary.examples[count["values"]] = sorted(shown, key=lambda row: row[Column.KEY])[:examples]
        _add_sizes(summary, rows)
        _add_garbled(summary, rows, examples)
        kept = rows.filter(pc.equal(reasons, "kept"))
        _add_kept(summary, kept)
        if summary.kept <= MOST_HASHES:
            hashes.append(_hashes(kept))
    if hashes and summary.kept <= MOST_HASHES:
        areas, found = (np.concatenate(arrays) for arrays in zip(*hashes, strict=True))
        summary.hashes = found[np.lexsort((found, -areas))]
    duplicates = [summary.examples.get(reason, []) for reason in (Reject.DUPLICATE, Reject.NEAR_DUPLICATE)]
    summary.pairs = _originals(index, names, [row for rows in duplicates for row in rows])
    return summary


def _add_sizes(summary: Summary, rows: pa.Table) -> None:
    height, width = _pairs(rows, Column.ORIGINAL_SIZE)
    places = [
        np.clip(np.searchsorted(SIDE_EDGES, side, "right") - 1, 0, len(SIDE_EDGES) - 2) for side in (height, width)
    ]
    np.add.at(summary.sizes, tuple(places), 1)
    summary.small += int((np.minimum(height, width) < summary.side).sum())


def _add_garbled(summary: Summary, rows: pa.Table, examples: int) -> None:
    found = rows.filter(garbled(rows)).select([Column.SOURCE, Column.PATH])
    summary.garbled_count += found.num_rows
    names = pc.binary_join_element_wise(*found.slice(0, examples - len(summary.garbled)).columns, ":")
    summary.garbled += names.to_pylist()


def _add_kept(summary: Summary, kept: pa.Table) -> None:
    height, width = _pairs(kept, Column.ORIGINAL_SIZE)
    bucket = _pairs(kept, Column.BUCKET)
    summary.buckets.update(zip(bucket[0].tolist(), bucket[1].tolist(), strict=True))
    scale = np.maximum(bucket[0] / height, bucket[1] / width)
    share = np.minimum(1, bucket[0] * bucket[1] / (scale**2 * height * width))
    summary.enlarged += int((scale > 1).sum())
    summary.kept_shares += np.histogram(share, SHARE_BINS, (0, 1))[0]
    square = np.minimum(height, width) / np.maximum(height, width)
    summary.square_shares += np.histogram(square, SHARE_BINS, (0, 1))[0]
    summary.kept_share_sum += float(share.sum())
    summary.square_share_sum += float(square.sum())
    told = [kept.column(name) for name in (Column.CAPTIONS, Column.CAPTION_WEIGHTS, Column.CAPTION_REASONS)]
    summary.captions_dropped += len(out_of_lists(told[2])[1].drop_null())
    caption = pc.utf8_trim_whitespace(out_of_lists(left(*told)[0])[1])
    words = pc.if_else(pc.equal(caption, ""), 0, pc.add(pc.count_substring_regex(caption, r"\s+"), 1)).to_numpy()
    summary.words += np.bincount(np.minimum(words, MOST_WORDS), minlength=MOST_WORDS + 1)


def _hashes(kept: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(area, hash) of the rows that have one."""
    rows = kept.filter(pc.is_valid(kept.column(Column.PERCEPTUAL_HASH)))
    height, width = _pairs(rows, Column.ORIGINAL_SIZE)
    return height * width, rows.column(Column.PERCEPTUAL_HASH).to_numpy()


def _pairs(rows: pa.Table, name: Column) -> tuple[np.ndarray, np.ndarray]:
    """Both numbers of a column of pairs, int64, without the rows that have none."""
    column = rows.column(name).drop_null()
    first, second = (pc.list_element(column, place).to_numpy().astype(np.int64) for place in (0, 1))
    return first, second


def _originals(index: Storage, names: Iterable[str], rejected: list[Row]) -> list[tuple[Row, Row]]:
    """Each rejected duplicate with the kept row that its detail names: path, or source:path."""
    named = [kept_instead(row[Column.REJECT_DETAIL]) for row in rejected]
    paths = pa.array({path for name in named for path in (name, name.partition(":")[2])}, pa.string())
    found: dict[str, Row] = {}
    for file in names if named else ():
        rows = index.read_table(file, [*SHOWN, Column.REJECT_REASON])
        hit = pc.and_(
            pc.is_null(rows.column(Column.REJECT_REASON)), pc.is_in(rows.column(Column.PATH), value_set=paths)
        )
        found |= {f"{row[Column.SOURCE]}:{row[Column.PATH]}": row for row in rows.filter(hit).to_pylist()}
    pairs = []
    for row, name in zip(rejected, named, strict=True):
        original = found.get(f"{row[Column.SOURCE]}:{name}") or found.get(name)
        if original is not None:
            pairs.append((row, original))
    return pairs
