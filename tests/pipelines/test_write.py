import random
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from pipelines.preprocess.write import (
    FAILURE,
    UNIT,
    UNIT_ROWS,
    collect_garbage,
    cut,
    cut_all,
    write_rows,
    write_units,
)
from pipelines.schema import (
    SCHEMA_VERSION,
    DataFile,
    data_files,
    read_manifest,
    tensor_array,
    tensor_column,
    tensor_field,
    write_manifest,
)
from pipelines.storage import Storage

FOLDER = "data/x"


@pytest.fixture
def dataset(tmp_path):
    return Storage(str(tmp_path / "dataset"))


def rows(*keys: str) -> pa.Table:
    """Rows whose value follows from their key."""
    return pa.table({"key": pa.array(keys, pa.string()), "value": pa.array([f"v{key}" for key in keys], pa.string())})


def put(dataset: Storage, name: str, *keys: str) -> str:
    write_rows(rows(*keys), dataset, f"{FOLDER}/{name}", "zstd")
    return f"{FOLDER}/{name}"


def commit(dataset: Storage, *names: str):
    files = [DataFile(name=name, rows=dataset.read_table(name, ["key"]).num_rows) for name in names]
    return write_manifest(
        dataset, files, kind="index", counts={}, fingerprint={"schema": SCHEMA_VERSION}, parents={}
    ), files


def test_rows_are_cut_into_units_that_know_their_size():
    units = cut(rows(*"abcdefg"), 3)
    assert [unit.column("key").to_pylist() for unit in units] == [list("abc"), list("def"), list("g")]
    assert [set(unit.column(UNIT_ROWS).to_pylist()) for unit in units] == [{3}, {3}, {1}]
    assert len({unit.column(UNIT)[0].as_py() for unit in units}) == 3


def test_a_units_name_is_its_keys():
    names = [unit.column(UNIT)[0].as_py() for unit in cut(rows(*"abcd"), 2)]
    assert [unit.column(UNIT)[0].as_py() for unit in cut(rows(*"abcd"), 2)] == names
    assert [unit.column(UNIT)[0].as_py() for unit in cut(rows(*"cdab"), 2)] == names[::-1]


def test_nothing_is_cut_into_nothing():
    assert cut(rows(), 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_units_do_not_depend_on_the_tables_that_rows_come_in(seed):
    draws, every = random.Random(seed), rows(*"abcdefghijk")
    ends = sorted(draws.choices(range(12), k=draws.randint(0, 6)))
    tables = [every.slice(start, end - start) for start, end in pairwise([0, *ends, 11])]
    assert list(cut_all(tables, 3)) == cut(every, 3)
    assert list(cut_all([], 3)) == list(cut_all([rows()], 3)) == []


def test_a_unit_becomes_one_file_without_the_columns_of_its_journey(dataset):
    units = cut(rows(*"abcde"), 2)
    report = write_units(pa.concat_tables([units[1], units[0]]), dataset, FOLDER, "zstd")
    assert sorted(report.column("rows").to_pylist()) == [2, 2]
    assert report.column("failures").to_pylist() == [[], []]
    assert [file.name for file in dataset.list()] == sorted(
        f"{FOLDER}/{unit.column(UNIT)[0].as_py()}.parquet" for unit in units[:2]
    )
    found = [row for file in dataset.list() for row in dataset.read_table(file.name).to_pylist()]
    assert sorted(found, key=lambda row: row["key"]) == rows(*"abcd").to_pylist()


def test_a_torn_unit_is_refused_and_not_written(dataset):
    (unit,) = cut(rows(*"abc"), 3)
    with pytest.raises(RuntimeError, match="2 of 3 rows"):
        write_units(unit.slice(0, 2), dataset, FOLDER, None)
    with pytest.raises(RuntimeError, match="4 of 3 rows"):
        write_units(pa.concat_tables([unit, unit.slice(0, 1)]), dataset, FOLDER, None)
    assert dataset.list() == []


def with_failures(unit: pa.Table, failures: dict[str, str]) -> pa.Table:
    keys = unit.column("key").to_pylist()
    unit = unit.append_column("path", pa.array([f"{key}.png" for key in keys]))
    unit = unit.append_column("source", pa.array(["s"] * len(keys)))
    unit = unit.append_column("crop", pa.array(range(len(keys)), pa.int32()))
    return unit.append_column(FAILURE, pa.array([failures.get(key) for key in keys], pa.string()))


def test_failed_rows_are_reported_and_not_written(dataset):
    (unit,) = cut(rows(*"abc"), 3)
    report = write_units(with_failures(unit, {"b": "broken"}), dataset, FOLDER, None).to_pylist()
    assert [(line["rows"], line["failures"]) for line in report] == [
        (2, [{"source": "s", "path": "b.png", "crop": 1, "failure": "broken"}])
    ]
    (file,) = dataset.list()
    assert dataset.read_table(file.name, ["key", "value"]).equals(rows(*"ac"))


def test_a_unit_that_failed_whole_leaves_no_file(dataset):
    (unit,) = cut(rows(*"ab"), 2)
    report = write_units(with_failures(unit, {"a": "x", "b": "y"}), dataset, FOLDER, None).to_pylist()
    assert [(line["rows"], len(line["failures"])) for line in report] == [(0, 2)]
    assert dataset.list() == []


def test_a_unit_written_again_is_the_same_file(dataset):
    (unit,) = cut(rows(*"ab"), 2)
    for _ in range(2):
        write_units(unit, dataset, FOLDER, "zstd")
        assert len(dataset.list()) == 1


@pytest.mark.parametrize("compression", ["lz4", "zstd", "none"])
def test_tensor_rows_are_written_and_read(dataset, compression):

    array = np.arange(24, dtype=np.float16).reshape(4, 2, 3)
    schema = pa.schema([pa.field("key", pa.string()), tensor_field("latent_mean", (2, 3))])
    table = pa.Table.from_arrays([pa.array(list("abcd")), tensor_column(array)], schema=schema)
    write_rows(table, dataset, f"{FOLDER}/a.parquet", compression)
    assert np.array_equal(tensor_array(dataset.read_table(f"{FOLDER}/a.parquet"), "latent_mean"), array)


def test_garbage_is_what_no_manifest_ever_named(dataset):
    a, b, c = (put(dataset, f"{name}.parquet", name) for name in "abc")
    orphan = put(dataset, "orphan.parquet", "o")
    other = "data/y/of-another-fingerprint.parquet"
    write_rows(rows("z"), dataset, other, None)
    first, _ = commit(dataset, a, b)
    _, files = commit(dataset, b, c)
    assert collect_garbage(dataset, FOLDER, files) == 1
    assert not dataset.exists(orphan)
    assert dataset.exists(other)
    pinned = read_manifest(dataset, "index", first.digest)
    assert [dataset.read_table(file.name).num_rows for file in data_files(dataset, pinned)] == [1, 1]
    assert dataset.exists(c)
    assert collect_garbage(dataset, FOLDER, files) == 0


def test_files_about_to_be_committed_are_no_garbage(dataset):
    a = put(dataset, "a.parquet", "a")
    assert collect_garbage(dataset, FOLDER, [DataFile(name=a, rows=1)]) == 0
    assert dataset.exists(a)
