"""Near-duplicates part by part: those of all rows at once."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from pipelines import runs
from pipelines.config import DriverConfig
from pipelines.preprocess.alike import ASKED, near_duplicates
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.stored import NUMBER
from pipelines.runs import CODE, Work, codes_of, parts
from pipelines.schema import INDEX_SCHEMA
from tests.reference import mark_near_duplicates


@pytest.fixture
def work(monkeypatch) -> Work:
    """Rows go to disk in runs, and come back in parts, of a dozen or so."""
    monkeypatch.setattr(runs, "SHARES", 2**14)
    monkeypatch.setattr(runs, "SAMPLED", 2)
    monkeypatch.setattr(runs, "SAMPLES", 3)
    return Work(DriverConfig(memory_mib=16))


def pictures(draws: random.Random, count: int) -> pa.Table:
    """Rows of which many look alike, some in chains, and some exactly."""
    rows: list[dict] = []
    for _ in range(count):
        looks = draws.getrandbits(64)
        if rows and draws.random() < 0.7:
            looks = draws.choice(rows)["perceptual_hash"]
            for bit in draws.sample(range(64), draws.choice([0, 1, 1, 2, 3, 5])):
                looks ^= 1 << bit
        size = [draws.choice([9, 10, 100, 3000]), draws.choice([9, 10])]
        known = {"key": f"{draws.random()}", "id": f"{draws.getrandbits(128):032x}", "path": f"{draws.random()}"}
        known |= {"source": draws.choice(["a", "ab"]), "original_size": size, "perceptual_hash": looks, "file_size": 1}
        rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known)
    return pa.Table.from_pylist(rows, INDEX_SCHEMA).append_column(NUMBER, pa.array(range(count)))


@pytest.mark.parametrize(("seed", "bits"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3), (5, 7), (6, 12)])
def test_near_duplicates_part_by_part_are_those_of_all_rows_at_once(work, seed, bits):
    rows = pictures(random.Random(seed), 400)
    judged = mark_near_duplicates(rows, FilterConfig(near_duplicate_bits=bits)).to_pylist()
    expected = {row[NUMBER]: row["reject_detail"] for row in judged if row["reject_reason"] == "near_duplicate"}
    asked = rows.select([NUMBER, *ASKED])
    pieces = [asked.slice(start, 7) for start in range(0, rows.num_rows, 7)]
    found = near_duplicates(pieces, bits, work)
    several = list(parts(found))
    verdicts = {row[NUMBER]: row for (part,) in several for row in part.to_pylist()}
    assert {number: row["reject_detail"] for number, row in verdicts.items()} == expected
    assert {row["reject_reason"] for row in verdicts.values()} == {"near_duplicate"}
    assert found.rows == len(expected) > 50
    assert len(several) > 3
    numbers = list(verdicts)
    assert np.array_equal(
        [verdicts[number][CODE] for number in numbers], codes_of(rows.take(pa.array(numbers)).column("id"))
    )


def test_without_rows_there_are_no_verdicts(work):
    assert near_duplicates([], 3, work).rows == 0
