"""Rows that go to disk in runs come back in parts: all of them, those of a code together, codes in order."""

from __future__ import annotations

import os
import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipelines import runs as module
from pipelines.config import DriverConfig
from pipelines.runs import CODE, InOrder, Runs, Work, codes_of, in_order_of, parts

SCHEMA = pa.schema([pa.field("text", pa.string()), pa.field("number", pa.int64())])


@pytest.fixture
def work(tmp_path, monkeypatch) -> Work:
    monkeypatch.setattr(module, "SHARES", 2**16)  # of 16 MiB: pieces of 256 bytes
    monkeypatch.setattr(module, "SAMPLED", 2)
    return Work(DriverConfig(memory_mib=16, folder=str(tmp_path)))


def filled(work: Work, draws: random.Random, count: int, codes: int) -> tuple[Runs, list[tuple[int, str, int]]]:
    runs, rows, number = work.runs(SCHEMA), [], 0
    while number < count:
        some = min(count - number, draws.randint(1, 7))
        drawn = [draws.randrange(codes) for _ in range(some)]
        texts = [str(draws.random()) for _ in drawn]
        runs.add(np.array(drawn, np.uint64), pa.table([texts, range(number, number + some)], schema=SCHEMA))
        rows += zip(drawn, texts, range(number, number + some), strict=True)
        number += some
    return runs, rows


def as_rows(table: pa.Table) -> list[tuple[int, str, int]]:
    return list(zip(*(table.column(name).to_pylist() for name in (CODE, "text", "number")), strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_all_rows_come_back_those_of_a_code_together_and_as_they_were_added(work, seed):
    draws = random.Random(seed)
    codes = draws.choice([1, 5, 2**64])
    (one, first), (other, second) = (filled(work, draws, draws.randint(0, 200), codes) for _ in range(2))
    for _ in range(2):  # as often as one likes
        found = list(parts(one, other))
        for place, rows in ((0, first), (1, second)):
            given = [row for part in found for row in as_rows(part[place])]
            assert sorted(given) == sorted(rows)
            numbers = {code: [row[2] for row in given if row[0] == code] for code, *_ in given}
            assert all(those == sorted(those) for those in numbers.values())
        spans = [sorted(row[0] for table in part for row in as_rows(table)) for part in found]
        spans = [span for span in spans if span]
        assert all(before[-1] < after[0] for before, after in pairwise(spans))
    if codes == 2**64 and len(first) > 100:
        assert len(found) > 3
    assert [one.rows, other.rows] == [len(first), len(second)]
    assert os.listdir(work.folder) == []  # files are gone as soon as they are written


@pytest.mark.parametrize("seed", range(6))
def test_who_goes_along_gets_each_row_once_and_in_order(work, seed):
    draws = random.Random(seed)
    runs, rows = filled(work, draws, draws.randint(0, 200), 1000)
    along, given = InOrder(runs), []
    for code in sorted(draws.choices(range(1001), k=draws.randint(1, 20))):
        found = as_rows(along.upto(code))
        assert all(row[0] < code for row in found)
        given += found
        assert len(given) == sum(row[0] < code for row in rows)
    assert [row[0] for row in given] == sorted(row[0] for row in given)
    assert sorted(given) == sorted(rows)[: len(given)]


@pytest.mark.parametrize("seed", range(6))
def test_rows_come_in_the_order_of_their_texts_a_few_at_a_time(work, seed):
    draws, count = random.Random(seed), seed * 40
    drawn = [draws.choice(["same", "sam", "é", f"same {draws.random()}"]) for _ in range(count)]
    rows = pa.table([drawn, range(count)], schema=SCHEMA)
    found = list(in_order_of("text", [rows.slice(start, 5) for start in range(0, count, 5)], work))
    together = pa.concat_tables([SCHEMA.empty_table(), *found])
    assert together.column("text").to_pylist() == sorted(drawn, key=str.encode)
    assert sorted(together.to_pylist(), key=str) == sorted(rows.to_pylist(), key=str)
    assert len(found) > 3 or count < 80
    texts = [set(part.column("text").to_pylist()) for part in found]
    assert all(one.isdisjoint(other) for one, other in pairwise(texts))


def test_what_is_skipped_is_not_given(work):
    runs, rows = filled(work, random.Random(0), 200, 1000)
    along, count = InOrder(runs), 0
    for start, stop in [(0, 10), (10, 300), (600, 601), (700, 1000)]:
        along.skip(start)
        found = as_rows(along.upto(stop))
        assert sorted(found) == sorted(row for row in rows if start <= row[0] < stop)
        count += len(found)
    assert 0 < count < 200


def test_codes_are_in_the_order_of_texts_and_of_their_first_bytes():
    texts = ["", "a", "ab", "abcdefgh", "abcdefghi", "b", "ba", "ä", "\U0001f600", "\U0001f601"]
    codes = codes_of(pa.array(texts)).tolist()
    assert codes == [int.from_bytes(text.encode()[:8].ljust(8, b"\0")) for text in texts]
    mixed = pa.chunked_array([["b", None], [], ["a"]], pa.string())
    assert codes_of(mixed.slice(1)).tolist() == [0, codes[1]]
    assert codes_of(pa.array(texts).slice(2, 3)).tolist() == codes[2:5]
    assert codes_of(pa.chunked_array([], pa.string())).tolist() == []


def test_numbers_in_a_file_are_all_as_they_are_filled_and_can_be_changed(work):
    numbers = work.array(1000, np.int64)
    numbers[7] = 3
    assert (numbers.sum(), numbers[7], len(work.array(0, bool))) == (3, 3, 0)
    assert np.isnan(work.array(10, np.float32, fill=np.nan)).all()
    assert work.array(10, bool, fill=True).all()


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"driver.folder: there is no folder {tmp_path}/gone; make it"):
        Work(DriverConfig(folder=f"{tmp_path}/gone"))
