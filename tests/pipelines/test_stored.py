"""Which stored rows count: each wanted key once, whatever files there are, and however little memory there is."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pytest

from pipelines import runs as runs_module
from pipelines.config import DriverConfig
from pipelines.preprocess.stored import Change, Stored, select, stored, want
from pipelines.preprocess.write import write_rows
from pipelines.runs import Work
from pipelines.schema import INDEX_SCHEMA
from pipelines.storage import Storage

FOLDER = "data/x"


@pytest.fixture
def dataset(tmp_path):
    return Storage(str(tmp_path / "dataset"))


def rows(*keys: str) -> pa.Table:
    """Rows whose value follows from their key."""
    return pa.table({"key": pa.array(keys, pa.string()), "value": pa.array([f"v{key}" for key in keys], pa.string())})


def judged(verdicts: dict[str, str | None]) -> pa.Table:
    values = dict.fromkeys(INDEX_SCHEMA.names) | {"source": "s", "path": "p", "file_size": 1}
    reasons = {key: reason and "duplicate" for key, reason in verdicts.items()}
    return pa.Table.from_pylist(
        [values | {"key": k, "reject_reason": reasons[k], "reject_detail": v} for k, v in verdicts.items()],
        INDEX_SCHEMA,
    )


def put(dataset: Storage, name: str, *keys: str) -> str:
    write_rows(rows(*keys), dataset, f"{FOLDER}/{name}", "zstd")
    return f"{FOLDER}/{name}"


def match(dataset: Storage, *keys: str, folder: str = FOLDER) -> Stored:
    work = Work(DriverConfig())
    some = [pa.chunked_array([keys[:2]], pa.string()), pa.chunked_array([keys[2:]], pa.string())]
    return stored(dataset, folder, want(some, work), work)


def chosen(dataset: Storage, *keys: str) -> list[tuple[str, int]]:
    return select(match(dataset, *keys), None, None, "zstd")


def content(dataset: Storage, files) -> list[dict]:
    return [row for name, _ in files for row in dataset.read_table(name).to_pylist()]


def tiny_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every few rows be a run of their own, and a part."""
    monkeypatch.setattr(runs_module, "SHARES", 2**17)  # of 128 MiB: a KiB
    monkeypatch.setattr(runs_module, "SAMPLED", 2)


def test_stored_and_missing_are_told_by_key(dataset):
    names = [put(dataset, "b.parquet", *"cdx"), put(dataset, "a.parquet", *"ba")]
    have = match(dataset, *"aebfc")
    assert have.names == names[::-1]
    assert [have.of(file).tolist() for file in (0, 1)] == [[2, 0], [4, -1, -1]]
    assert (have.there.tolist(), have.missing, have.distinct) == ([True, False, True, False, True], 2, 5)
    assert match(dataset, *"abcd").missing == 0
    assert match(dataset, *"ab", folder="data/nothing").missing == 2
    assert (match(dataset).missing, match(dataset).distinct) == (0, 0)


def test_a_key_that_is_wanted_twice_is_one_row(dataset):
    have = match(dataset, *"acac")
    assert (have.missing, have.distinct, have.there.tolist()) == (2, 2, [False, False, True, True])
    name = put(dataset, "a.parquet", *"ac")
    have = match(dataset, *"acac")
    assert (have.missing, have.distinct, select(have, None, None, None)) == (0, 2, [(name, 2)])


def test_wanted_rows_are_read_once_each_in_the_order_of_files(dataset):
    put(dataset, "a.parquet", *"bxa")
    put(dataset, "b.parquet", *"acbd")
    mask = np.array([True, True, True, False])
    found = list(match(dataset, *"abcd").read_wanted(["key"], mask))
    assert pa.concat_tables(found).column("key").to_pylist() == list("bac")


def test_files_that_are_wanted_whole_are_taken_as_they_are(dataset):
    name = put(dataset, "a.parquet", *"ab")
    put(dataset, "b.parquet", *"cd")
    assert chosen(dataset, *"ab") == [(name, 2)]
    assert len(dataset.list()) == 2


def test_a_file_of_which_less_is_wanted_is_written_again_and_the_old_one_stays(dataset):
    old = put(dataset, "a.parquet", *"abc")
    ((name, count),) = chosen(dataset, *"ac")
    assert (count, name == old, name.startswith(f"{FOLDER}/")) == (2, False, True)
    assert dataset.read_table(name).equals(rows(*"ac"))
    assert dataset.read_table(old).equals(rows(*"abc"))


def test_a_key_twice_in_one_file_counts_once(dataset):
    put(dataset, "a.parquet", *"aab")
    assert content(dataset, chosen(dataset, *"ab")) == rows(*"ab").to_pylist()


def test_of_wanted_keys_some_can_be_asked_for_alone(dataset):
    whole, mixed = put(dataset, "a.parquet", *"ab"), put(dataset, "b.parquet", *"cd")
    have, only = match(dataset, *"abcd"), np.array([True, True, True, False])
    (first, again) = select(have, only, None, "zstd")
    assert (first, again[0] == mixed, again[1]) == ((whole, 2), False, 1)
    assert content(dataset, [again]) == rows("c").to_pylist()


@pytest.mark.parametrize("seed", range(40))
def test_each_wanted_key_counts_once_whatever_files_there_are(dataset, seed, monkeypatch):
    if seed >= 30:
        tiny_pieces(monkeypatch)
    draws = random.Random(seed)
    every = list("abcdefgh") if seed < 30 else [f"{draws.randrange(2**32):08x}" for _ in range(200)]
    for number in range(draws.randint(1, 5)):
        put(dataset, f"{number}.parquet", *draws.sample(every, draws.randint(1, len(every) * 5 // 8)))
    known = {row["key"] for file in dataset.list() for row in dataset.read_table(file.name).to_pylist()}
    wanted = draws.sample(every, draws.randint(0, len(every)))
    files = chosen(dataset, *wanted)
    assert sorted(content(dataset, files), key=str) == sorted(rows(*known.intersection(wanted)).to_pylist(), key=str)
    assert [count for _, count in files] == [dataset.read_table(name).num_rows for name, _ in files]
    assert sorted(chosen(dataset, *wanted)) == sorted(files)


class Given:
    """Verdicts by place."""

    def __init__(self, verdicts: dict[str, str | None], differs: bool) -> None:
        self.rows, self._differs = judged(verdicts), differs

    def differs(self, file: int) -> bool:
        return self._differs

    def of(self, start: int, stop: int) -> Change:
        return lambda rows, places: self.rows.take(pa.array(places))


def test_changed_rows_are_written_under_a_name_that_means_their_content(dataset):
    old = f"{FOLDER}/a.parquet"
    same = {"a": None, "b": None}
    write_rows(judged(same), dataset, old, None)
    have = match(dataset, *"ab")

    def judge(verdicts: dict[str, str | None]) -> str:
        ((name, _),) = select(have, None, Given(verdicts, verdicts != same), None)
        assert dataset.read_table(name).equals(judged(verdicts))
        return name

    assert judge(same) == old
    first, second = {"a": None, "b": "the same as a"}, {"a": None, "b": "the same as c"}
    assert len({judge(first), judge(second), old}) == 3
    assert judge(first) == judge(first)
    assert dataset.read_table(old).equals(judged(same))
