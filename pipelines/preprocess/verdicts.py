"""The verdicts on all rows of an index, of which a part at a time is in memory.

Rows are judged by themselves file by file (preprocess/filter.py). Those that nothing rejects meet on disk by their
content, and of equals one is kept. What is left of it all: numbers for the manifest, which files hold other verdicts
than they should, and the rejected duplicates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.preprocess.alert import Change
from pipelines.preprocess.alike import ASKED, near_duplicates
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.filter import caption_counts, garbled, judge, mark_duplicates
from pipelines.preprocess.stored import AMENDED, NUMBER, PLACE, Stored, first_ones
from pipelines.preprocess.stored import Change as ChangeRows
from pipelines.runs import CODE, InOrder, Runs, codes_of, parts
from pipelines.schema import INDEX_SCHEMA, Column

JUDGED = [  # what verdicts follow from
    Column.KEY,
    Column.ID,
    Column.SOURCE,
    Column.PATH,
    Column.CAPTIONS,
    Column.CAPTION_REASONS,
    Column.ORIGINAL_SIZE,
    Column.AESTHETIC_SCORE,
    Column.SCORES,
    Column.DISTINCT_PIXELS,
    Column.CONTRAST,
    Column.PERCEPTUAL_HASH,
    Column.REJECT_REASON,
    Column.REJECT_DETAIL,
]
FIRST, FRESH = "first", "fresh"  # whether a row stands for its key, and whether the committed index lacks that
WAS = {Column.REJECT_REASON: "was_reason", Column.REJECT_DETAIL: "was_detail"}  # the verdict that is stored
COMPARED = [Column.ID, Column.SOURCE, Column.PATH, *AMENDED]  # columns of rows that are compared with others
LOOKS = [Column.KEY, Column.ORIGINAL_SIZE, Column.PERCEPTUAL_HASH]  # and of those that are compared by looks
OPEN = [
    *(pa.field(name, pa.string()) for name in WAS.values()),
    *(pa.field(name, pa.int64()) for name in (PLACE, NUMBER)),
    *(pa.field(name, pa.bool_()) for name in (FIRST, FRESH)),
]
DUPLICATES = pa.schema([INDEX_SCHEMA.field(name) for name in WAS])


class Scores:
    """The scores that were computed of wanted rows, by their numbers."""

    def __init__(self, have: Stored) -> None:
        count, self._columns = len(have.there), (Column.CLIP_SIMILARITY, Column.AESTHETIC_SCORE)
        seen = have.work.array(count, bool)
        self._scores = {name: have.work.array(count, np.float32, fill=np.nan) for name in self._columns}
        for files, rows in have.read(self._columns):
            numbers = have.numbers[have.starts[files.start] : have.starts[files.stop]]
            first = first_ones(numbers, seen)
            for name, scores in self._scores.items():
                scores[numbers[first]] = pc.fill_null(rows.column(name), np.nan).to_numpy()[first]

    def add(self, rows: pa.Table, numbers: np.ndarray) -> pa.Table:
        """Index rows with clip_similarity, and aesthetic_score where it is null."""
        similarity, aesthetic = (
            pa.chunked_array([pa.array(self._scores[name][numbers], from_pandas=True)]) for name in self._columns
        )
        aesthetic = pc.coalesce(rows.column(Column.AESTHETIC_SCORE), aesthetic)
        return _with(rows, Column.AESTHETIC_SCORE, aesthetic).append_column(Column.CLIP_SIMILARITY, similarity)


@dataclass
class Verdicts:
    """What was decided, as `select` asks for it."""

    have: Stored
    filters: FilterConfig
    scores: Scores | None
    differing: np.ndarray
    """Which files hold other verdicts than they should: bool [files]."""
    duplicates: Runs
    """Reason and detail of the rejected duplicates, by their places."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Rows by reject reason; "kept" for those without."""
    captions: Counter[str] = field(default_factory=Counter)
    """Captions of kept rows: those that are kept, and those that are left out, by reason."""
    new: Counter[str] = field(default_factory=Counter)
    """As `reasons`, of the rows whose keys the committed index lacks."""
    garbled: int = 0
    """Rows, kept or not, with a caption of which bytes were no text."""
    _along: InOrder | None = None

    def change(self, kept_before: int) -> Change:
        """What a commit would do to the index, which has kept that many rows."""
        new = self.new.total()
        return Change(new=new, new_rejected=new - self.new["kept"], kept_before=kept_before, kept=self.reasons["kept"])

    def differs(self, file: int) -> bool:
        """Whether a file holds other verdicts than it should."""
        return bool(self.differing[file])

    def of(self, start: int, stop: int) -> ChangeRows:
        """What gives rows of these places their verdicts."""
        self._along = self._along or InOrder(self.duplicates)
        self._along.skip(start)
        duplicates = self._along.upto(stop)
        found = duplicates.column(CODE).to_numpy().astype(np.int64)

        def decided(rows: pa.Table, places: np.ndarray) -> pa.Table:
            facts = rows.select(JUDGED)
            if self.scores is not None:
                facts = self.scores.add(facts, self.have.numbers[places])
            verdicts = _overlaid(judge(facts, self.filters), duplicates, pc.index_in(pa.array(places), pa.array(found)))
            for name in AMENDED:
                rows = _with(rows, name, verdicts.column(name))
            return rows

        return decided

    def tally(self, rows: pa.Table, fresh: np.ndarray) -> None:
        """Count rows, each of them once, with their verdicts."""
        reasons = pc.fill_null(rows.column(Column.REJECT_REASON), "kept")
        self.captions.update(caption_counts(rows))
        for counter, some in ((self.reasons, reasons), (self.new, reasons.filter(pa.array(fresh)))):
            counter.update({row["values"]: row["counts"] for row in pc.value_counts(some).to_pylist()})


def decide_all(have: Stored, filters: FilterConfig, scores: Scores | None, committed: Set[str]) -> Verdicts:
    """The verdict on every wanted row. `committed` are the files of the index as it is.

    It depends on the set of rows and the settings alone, not on the order of rows or on earlier verdicts.
    """
    work, by_looks = have.work, filters.near_duplicate_bits is not None
    columns = COMPARED + LOOKS * by_looks
    open_rows = work.runs(pa.schema([*(INDEX_SCHEMA.field(name).with_nullable(True) for name in columns), *OPEN]))
    verdicts = Verdicts(have, filters, scores, np.zeros(len(have.names), bool), work.runs(DUPLICATES))
    known, told = _known(have, committed), work.array(len(have.there), np.uint64)
    seen = work.array(len(have.there), bool)
    for files, stored in have.read(JUDGED):
        start, stop = have.starts[files.start], have.starts[files.stop]
        numbers = have.numbers[start:stop]
        wanted = numbers >= 0
        places, numbers, facts = start + np.flatnonzero(wanted), numbers[wanted], stored.filter(pa.array(wanted))
        rows = judge(facts if scores is None else scores.add(facts, numbers), filters)
        passed = pc.is_null(rows.column(Column.REJECT_REASON))
        _compare(verdicts, files, places, rows.select(AMENDED), _cleared(facts, passed))
        first, fresh, outcomes = first_ones(numbers, seen), ~known[numbers], _outcomes(rows)
        told[numbers[first]] = outcomes[first]
        other = outcomes != told[numbers]  # measured otherwise the second time: the first one stands for the key
        have.numbers[places[other]] = -1
        rejected = pc.and_(pa.array(first), pc.invert(passed))
        verdicts.tally(rows.filter(rejected), fresh[rejected.to_numpy()])
        verdicts.garbled += int(np.count_nonzero(garbled(facts).to_numpy() & first))
        for judged, was in WAS.items():
            rows = rows.append_column(was, facts.column(judged))
        for name, values in ((PLACE, places), (NUMBER, numbers), (FIRST, first), (FRESH, fresh)):
            rows = rows.append_column(name, pa.array(values))
        rows = rows.filter(pc.and_(passed, pa.array(~other))).select([*columns, *(column.name for column in OPEN)])
        open_rows.add(codes_of(rows.column(Column.ID)), rows)
    alike = []
    if filters.near_duplicate_bits is not None:
        alike = [near_duplicates(_unlike(open_rows), filters.near_duplicate_bits, work)]
    for rows, *near in parts(open_rows, *alike):
        _settle(verdicts, rows, near)
    return verdicts


def _unlike(open_rows: Runs) -> Iterator[pa.Table]:
    """The rows that are compared by looks: each key and content once."""
    for (part,) in parts(open_rows):
        rows = mark_duplicates(part.filter(part.column(FIRST)))
        compared = pc.and_(
            pc.is_null(rows.column(Column.REJECT_REASON)), pc.is_valid(rows.column(Column.PERCEPTUAL_HASH))
        )
        yield rows.filter(compared).select([NUMBER, *ASKED])


def _outcomes(rows: pa.Table) -> np.ndarray:
    """What was found out about each row by itself, as a number: its content, or why it is rejected. uint64 [N]."""
    words = pc.binary_join_element_wise(
        *(pc.fill_null(rows.column(name), "") for name in (Column.ID, *WAS)), "\n"
    ).combine_chunks()
    coded = words.dictionary_encode() if isinstance(words, pa.Array) else words.chunk(0).dictionary_encode()
    numbers = [int.from_bytes(blake2b(word.encode(), digest_size=8).digest()) for word in coded.dictionary.to_pylist()]
    return np.array(numbers, np.uint64)[coded.indices.to_numpy()] if numbers else np.empty(0, np.uint64)


def _settle(verdicts: Verdicts, rows: pa.Table, near: Sequence[pa.Table]) -> None:
    """Decide of rows that nothing else rejects, all of a content among them, which are kept. `near` are the verdicts on
    those of them that look like others."""
    firsts = rows.filter(rows.column(FIRST))
    judged = mark_duplicates(firsts)
    for some in near:
        judged = _overlaid(judged, some, pc.index_in(judged.column(NUMBER), some.column(NUMBER)))
    verdicts.tally(judged, judged.column(FRESH).to_numpy())
    if not rows.num_rows:
        return
    rows = _overlaid(rows, judged, pc.index_in(rows.column(NUMBER), firsts.column(NUMBER)))
    other = np.zeros(rows.num_rows, bool)
    for name, was in WAS.items():
        now, before = (pc.fill_null(rows.column(one), "") for one in (name, was))
        other |= pc.not_equal(now, before).to_numpy()
    places = rows.column(PLACE).to_numpy()
    verdicts.differing[np.searchsorted(verdicts.have.starts, places[other], "right") - 1] = True
    rejected = rows.filter(pc.is_valid(rows.column(Column.REJECT_REASON)))
    verdicts.duplicates.add(rejected.column(PLACE).to_numpy().astype(np.uint64), rejected.select(list(WAS)))


def _known(have: Stored, committed: Set[str]) -> np.ndarray:
    """Which wanted numbers the committed files have."""
    known = have.work.array(len(have.there), bool)
    for file, name in enumerate(have.names):
        if name in committed:
            numbers = have.of(file)
            known[numbers[numbers >= 0]] = True
    return known


def _compare(verdicts: Verdicts, files: range, places: np.ndarray, now: pa.Table, before: pa.Table) -> None:
    """Note the files in which the verdicts on rows by themselves are other ones than before."""
    ends = np.searchsorted(places, verdicts.have.starts[files.start : files.stop + 1])
    for file, start, stop in zip(files, ends, ends[1:], strict=False):
        if not now.slice(start, stop - start).equals(before.slice(start, stop - start)):
            verdicts.differing[file] = True


def _cleared(facts: pa.Table, passed: pa.ChunkedArray) -> pa.Table:
    """The stored verdicts, without those that only a comparison with other rows could give again."""
    rows = facts.select(AMENDED)
    for name in WAS:
        rows = _with(rows, name, pc.if_else(passed, pa.scalar(None, pa.string()), rows.column(name)))
    return rows


def _overlaid(rows: pa.Table, others: pa.Table, at: pa.ChunkedArray | pa.Array) -> pa.Table:
    """Rows with the verdicts of `others`, `at` which each finds its own; with their own where that is null."""
    for name in WAS:
        rows = _with(rows, name, pc.if_else(pc.is_valid(at), others.column(name).take(at), rows.column(name)))
    return rows


def _with(rows: pa.Table, name: str, values: pa.ChunkedArray | pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), INDEX_SCHEMA.field(name), values)
