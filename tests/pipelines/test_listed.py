"""The list of a run's images: those that the index keeps, in an order that nothing but their set decides."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pytest

from pipelines import runs
from pipelines.config import DriverConfig, SourceConfig
from pipelines.heldout import is_held_out
from pipelines.originals import Originals
from pipelines.preprocess.write import write_rows
from pipelines.runs import Work
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, Column, DataFile, Manifest, write_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train import listed as module
from pipelines.train.listed import FOLDER, KEPT, LIST, ListedImages, list_images, listed_ids
from pipelines.train.validation import HELD_OUT, hold_out
from tests.reference import kept_rows

BUCKETS = [(32, 16), (16, 32), (24, 24)]
SOURCES = {"one": 1.0, "two": 2.5}
IN_ORDER = itemgetter(Column.BUCKET, Column.SOURCE, Column.ID)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files of 7 rows, blocks of 3, and runs and parts of a few."""
    monkeypatch.setattr(module, "FILE_ROWS", 7)
    monkeypatch.setattr(module, "BLOCK_ROWS", 3)
    monkeypatch.setattr(module, "HELD_BLOCKS", 2)
    monkeypatch.setattr(runs, "SHARES", 2**14)  # of 16 MiB: pieces of a kilobyte
    monkeypatch.setattr(runs, "SAMPLED", 2)


def images(draws: random.Random, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        image_id = f"{draws.getrandbits(128):032x}"
        packed = draws.random() < 0.5
        known = {"key": f"{number}", "id": image_id, "source": draws.choice(list(SOURCES)), "path": f"{number}.png"}
        known |= {"file": "a.tar", "offset": number, "length": 9, "codec": "snappy", "skip": 1} if packed else {}
        known |= {"captions": ["c"], "caption_weights": [1.0], "caption_reasons": [None], "file_size": number}
        known |= {"original_size": [1, 2], "bucket": list(draws.choice(BUCKETS))}
        known |= {"reject_reason": "blank" if draws.random() < 0.2 else None}
        rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known)
    return rows


def committed(index: Storage, draws: random.Random, rows: list[dict]) -> Manifest:
    """An index of these rows, in files of any length."""
    files, left = [], draws.sample(rows, len(rows))
    while left:
        some, left = left[:9], left[9:]
        files.append(DataFile(name=f"data/x/{len(files)}.parquet", rows=len(some)))
        write_rows(pa.Table.from_pylist(some, INDEX_SCHEMA), index, files[-1].name, "zstd")
    kept = sum(row["reject_reason"] is None for row in rows)
    fingerprint = {"schema": SCHEMA_VERSION, "buckets": [list(size) for size in BUCKETS]}
    return write_manifest(index, files, kind="index", counts={"kept": kept}, fingerprint=fingerprint, parents={})


def originals() -> Originals:
    told = [SourceConfig(name=name, path="nowhere", weight=weight) for name, weight in SOURCES.items()]
    return Originals(told, StorageOptions())


def listed(folder, manifest: Manifest, name: str = "run") -> Storage:
    output, work = Storage(f"{folder}/{name}"), Work(DriverConfig(memory_mib=16))
    list_images(output, Storage(f"{folder}/index"), manifest, originals(), work)
    return output


@pytest.mark.parametrize("seed", range(8))
def test_the_list_is_all_kept_rows_by_bucket_source_and_content(tmp_path, seed):
    draws, index = random.Random(seed), Storage(f"{tmp_path}/index")
    manifest = committed(index, draws, images(draws, draws.choice([0, 1, 150])))
    expected = sorted(kept_rows(index, manifest).to_pylist(), key=IN_ORDER)
    output = listed(tmp_path, manifest)
    found = ListedImages(output, originals())
    places = np.array([(n, row) for n, file in enumerate(found.files) for row in range(file.rows)], int).reshape(-1, 2)
    assert [found.row(file, row) for file, row in places.tolist()] == [
        {name: row[name] for name in (*KEPT, Column.SOURCE)} for row in expected
    ]
    shuffled = np.random.default_rng(seed).permutation(places)
    with ThreadPoolExecutor(4) as pool:
        assert found.rows(shuffled, pool) == [found.row(file, row) for file, row in shuffled.tolist()]
    assert [image_id for _, ids in listed_ids(output) for image_id in ids] == [row["id"] for row in expected]
    assert [name for name, _ in listed_ids(output)] == [file.name for file in found.files]
    files = iter(found.files)
    for (bucket, source), members in groupby(expected, key=itemgetter(Column.BUCKET, Column.SOURCE)):
        count = len(list(members))
        own = [next(files) for _ in range(-(-count // 7))]  # as few as hold them, and of one size
        assert {(file.bucket, file.weight) for file in own} == {(tuple(bucket), SOURCES[source])}
        assert sum(file.rows for file in own) == count
        assert max(file.rows for file in own) - min(file.rows for file in own) <= 1
    assert list(files) == []


def test_the_list_depends_neither_on_the_files_of_the_index_nor_on_what_a_killed_run_left(tmp_path):
    rows, outputs = images(random.Random(0), 100), []
    for seed in (1, 2):
        manifest = committed(Storage(f"{tmp_path}/{seed}/index"), random.Random(seed), rows)
        Storage(f"{tmp_path}/{seed}/run").write(f"{FOLDER}/00009{seed}", b"left")
        outputs.append(listed(f"{tmp_path}/{seed}", manifest))
    first, second = (ListedImages(output, originals()) for output in outputs)
    assert first.files == second.files
    for number, file in enumerate(first.files):
        assert all(first.row(number, row) == second.row(number, row) for row in range(file.rows))
    names = [{file.name for file in output.list(FOLDER)} for output in outputs]
    assert names == [{file.name for file in first.files}] * 2


def test_held_out_rows_of_an_index_are_those_of_its_list(tmp_path):
    draws, index = random.Random(3), Storage(f"{tmp_path}/index")
    manifest = committed(index, draws, images(draws, 120))
    output = listed(tmp_path, manifest)
    count, found = hold_out(output, index, manifest, 0.3), ListedImages(output, originals())
    numbers = {file.name: number for number, file in enumerate(found.files)}
    hidden = output.read_table(HELD_OUT).to_pylist()
    assert len(hidden) == count
    assert all(found.row(numbers[row["file"]], row["row"])[Column.ID] == row["id"] for row in hidden)
    kept = kept_rows(index, manifest).column(Column.ID).to_pylist()
    assert {row["id"] for row in hidden} == {image_id for image_id in kept if is_held_out(image_id, 0.3)}


def test_a_source_that_the_settings_lack_is_named_before_there_is_a_list(tmp_path):
    draws, index = random.Random(0), Storage(f"{tmp_path}/index")
    manifest, output = committed(index, draws, images(draws, 20)), Storage(f"{tmp_path}/run")
    one = Originals([SourceConfig(name="one", path="nowhere")], StorageOptions())
    with pytest.raises(ValueError, match="images of the source 'two', and the settings name 'one'"):
        list_images(output, index, manifest, one, Work(DriverConfig()))
    assert not output.exists(LIST)
