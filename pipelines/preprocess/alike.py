"""Near-duplicates among more rows than memory holds: whom near.py would keep of all hashes at once, part by part.

Rows are ranked by what makes one the better picture; from there on a row is its rank, and its hash and leader lie in
files that are mapped to memory. Hashes that agree in some bands meet on disk, and the pairs that are found are gone
through in the order of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preprocess.filter import near_detail, sides
from pipelines.preprocess.near import choices, near_of
from pipelines.preprocess.stored import NUMBER
from pipelines.runs import CODE, InOrder, Runs, Work, codes_of, in_order_of, parts
from pipelines.schema import INDEX_SCHEMA, ROWS_AT_A_TIME, Column, Reject

WISH, CONTENT, RANK, LATER, BITS = "wish", "content", "rank", "later", "bits"
MOST_AREA = 10**18  # pixels: differences from it have as many digits, so that they are in order as texts
ASKED = [Column.ID, Column.SOURCE, Column.PATH, Column.KEY, Column.ORIGINAL_SIZE, Column.PERCEPTUAL_HASH]
RANKED = pa.schema([pa.field(RANK, pa.int64()), INDEX_SCHEMA.field(Column.PERCEPTUAL_HASH)])
PAIRS = pa.schema([pa.field(LATER, pa.int64())])
LED = pa.schema(
    [
        pa.field(NUMBER, pa.int64()),
        pa.field(CONTENT, pa.uint64()),
        INDEX_SCHEMA.field(Column.SOURCE),
        pa.field(BITS, pa.uint8()),
    ]
)
VERDICTS = pa.schema([LED.field(NUMBER), *map(INDEX_SCHEMA.field, (Column.REJECT_REASON, Column.REJECT_DETAIL))])


def near_duplicates(rows: Iterable[pa.Table], bits: int, work: Work) -> Runs:
    """The verdicts on those rows that look like others: NUMBER, reason and detail, with the codes of their contents.

    Of rows whose hashes are within `bits` the one with the largest area is kept, of equals the smallest (source, path);
    near.py says what follows for the rest. Rows have the columns ASKED and NUMBER.
    """
    ranked = [work.keep(part) for part in in_order_of(WISH, map(_with_wish, rows), work)]
    hashes = work.array(sum(part.num_rows for part in ranked), np.uint64)
    for start, part in _placed(ranked):
        hashes[start : start + part.num_rows] = part.column(Column.PERCEPTUAL_HASH).to_numpy()
    leaders, led = _leaders(hashes, bits, work), work.runs(LED)
    for start, part in _placed(ranked):
        leader = leaders[leaders[start : start + part.num_rows]]  # of a hash that comes again, the first one's
        near = np.flatnonzero(leader != start + np.arange(part.num_rows))
        differing = np.bitwise_count(hashes[start + near] ^ hashes[leader[near]])
        led.add(
            leader[near].astype(np.uint64),
            part.select(LED.names[:-1]).take(pa.array(near)).append_column(BITS, pa.array(differing)),
        )
    verdicts, along = work.runs(VERDICTS), InOrder(led)
    for start, part in _placed(ranked):
        found = along.upto(start + part.num_rows)
        kept = part.take(pa.array(found.column(CODE).to_numpy().astype(np.int64) - start))
        reason = pa.repeat(pa.scalar(str(Reject.NEAR_DUPLICATE)), found.num_rows)
        told = [found.column(NUMBER), reason, near_detail(found.column(BITS), found, kept)]
        verdicts.add(found.column(CONTENT).to_numpy(), pa.table(told, VERDICTS.names))
    return verdicts


def _with_wish(rows: pa.Table) -> pa.Table:
    """Rows with a text by which those are first that are rather kept."""
    height, width = (pc.cast(side, pa.int64()) for side in sides(rows))
    area = pc.cast(pc.subtract(MOST_AREA, pc.multiply(height, width)), pa.string())
    names = (rows.column(name) for name in (Column.SOURCE, Column.PATH, Column.KEY))
    content = pa.array(codes_of(rows.column(Column.ID)))
    told = rows.select([NUMBER, Column.SOURCE, Column.PATH, Column.PERCEPTUAL_HASH]).append_column(CONTENT, content)
    return told.append_column(WISH, pc.binary_join_element_wise(area, *names, "\0"))


def _leaders(hashes: np.ndarray, bits: int, work: Work) -> np.ndarray:
    """For each hash, uint64 [N], the place of the one that is kept for it, as near.py's `leaders`; but that a hash
    which comes again has the place where it comes first, whose leader is its own."""
    leaders = work.array(len(hashes), np.int64)
    for start in range(0, len(hashes), ROWS_AT_A_TIME):
        leaders[start : start + ROWS_AT_A_TIME] = np.arange(start, min(len(hashes), start + ROWS_AT_A_TIME))
    for codes, part in _meeting(hashes, leaders, work, ~np.uint64(0)):
        order = np.lexsort((part.column(RANK).to_numpy(), codes))
        ranks, first = part.column(RANK).to_numpy()[order], np.append(True, codes[order][1:] != codes[order][:-1])
        leaders[ranks] = ranks[np.flatnonzero(first)[np.cumsum(first) - 1]]
    for (part,) in parts(_pairs(hashes, leaders, bits, work)):
        earlier, later = part.column(CODE).to_numpy().astype(np.int64), part.column(LATER).to_numpy()
        order = np.lexsort((later, earlier))
        for one, other in zip(earlier[order].tolist(), later[order].tolist(), strict=True):
            if leaders[one] == one and leaders[other] == other:
                leaders[other] = one
    return leaders


def _pairs(hashes: np.ndarray, leaders: np.ndarray, bits: int, work: Work) -> Runs:
    """The pairs of distinct hashes within `bits`: LATER, with the place of the earlier one as the code."""
    pairs = work.runs(PAIRS)
    for choice in choices(len(hashes), bits):
        for codes, part in _meeting(hashes, leaders, work, choice.mask):
            ranks = part.column(RANK).to_numpy()
            for one, other in near_of(codes, part.column(Column.PERCEPTUAL_HASH).to_numpy(), choice, bits):
                first, second = np.minimum(ranks[one], ranks[other]), np.maximum(ranks[one], ranks[other])
                pairs.add(first.astype(np.uint64), pa.table([second], schema=PAIRS))
    return pairs


def _meeting(
    hashes: np.ndarray, leaders: np.ndarray, work: Work, mask: np.uint64
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """(hashes under the mask, RANKED) of those that lead themselves, those together that are equal under the mask."""
    runs = work.runs(RANKED)
    for start in range(0, len(hashes), ROWS_AT_A_TIME):
        some = leaders[start : start + ROWS_AT_A_TIME]
        ranks = start + np.flatnonzero(some == np.arange(start, start + len(some)))
        runs.add(hashes[ranks] & mask, pa.table([ranks, hashes[ranks]], schema=RANKED))
    for (part,) in parts(runs):
        if part.num_rows:
            yield part.column(CODE).to_numpy(), part


def _placed(ranked: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """(rank of the first row, rows) of each part."""
    start = 0
    for part in ranked:
        yield start, part
        start += part.num_rows
