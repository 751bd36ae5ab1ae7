import os
import random

import numpy as np
import pyarrow as pa
import pytest

from pipelines.captions import WEIGHTS, in_lists
from pipelines.schema import (
    INDEX_SCHEMA,
    MANIFEST,
    SCHEMA_VERSION,
    Column,
    DataFile,
    Reject,
    data_files,
    digest,
    latents_schema,
    pair_array,
    pair_column,
    read_manifest,
    require_manifest,
    tensor_array,
    tensor_column,
    tensor_field,
    write_manifest,
)
from pipelines.storage import Storage
from tests.reference import kept_rows

ROW = {
    "key": "k",
    "id": "i",
    "source": "source",
    "path": "a.png",
    "captions": ["a cat"],
    "caption_weights": [1.0],
    "caption_reasons": [None],
    "original_size": [30, 40],
    "bucket": [64, 64],
    "aesthetic_score": 5.5,
    "file_size": 7,
    "reject_reason": None,
    "reject_detail": None,
}
TWO = {"captions": ["a cat", "a dog"], "caption_weights": [1.0, 3.0], "caption_reasons": [None, None]}
LATENTS = latents_schema((4, 2, 3), (5, 6), (7,))


@pytest.fixture
def dataset(tmp_path):
    return Storage(str(tmp_path / "dataset"))


def tensors(*shape: int, seed: int = 0) -> np.ndarray:
    """Every kind of float16, as bits: subnormals, infinities and NaNs too."""
    bits = np.random.default_rng(seed).integers(0, 2**16, shape, dtype=np.uint16)
    return bits.view(np.float16)


def tensor_table(array: np.ndarray) -> pa.Table:
    field = tensor_field(Column.LATENT_MEAN, array.shape[1:])
    return pa.Table.from_arrays([tensor_column(array)], schema=pa.schema([field]))


def index_rows(*changes: dict) -> pa.Table:
    return pa.Table.from_pylist([ROW | change for change in changes], INDEX_SCHEMA)


def commit(dataset: Storage, *files: str, kind: str = "index", **content):
    content = {"counts": {"kept": 1}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}} | content
    return write_manifest(dataset, [DataFile(name=name, rows=1) for name in files], kind=kind, **content)


def kept(dataset: Storage, *tables: pa.Table) -> pa.Table:
    files = [f"data/x/{digest(table.to_pylist())}.parquet" for table in tables]
    for name, table in zip(files, tables, strict=True):
        dataset.write_table(name, table)
    return kept_rows(dataset, commit(dataset, *files))


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float16 and np.array_equal(a.view(np.uint16), b.view(np.uint16))


def test_tensors_there_and_back_bit_for_bit(dataset):
    array = tensors(5, 4, 2, 3)
    table = tensor_table(array)
    assert same_bits(tensor_array(table, Column.LATENT_MEAN), array)
    dataset.write_table("a.parquet", table, compression="lz4")
    assert same_bits(tensor_array(dataset.read_table("a.parquet"), Column.LATENT_MEAN), array)


def test_a_sliced_table_gives_its_own_rows():
    array = tensors(7, 3)
    assert same_bits(tensor_array(tensor_table(array).slice(2, 3), Column.LATENT_MEAN), array[2:5])


def test_several_chunks_are_one_array():
    array = tensors(7, 3)
    chunks = pa.concat_tables([tensor_table(array[:2]), tensor_table(array).slice(2, 4), tensor_table(array[6:])])
    assert chunks.column(0).num_chunks == 3
    assert same_bits(tensor_array(chunks, Column.LATENT_MEAN), array)


def test_rows_that_are_not_contiguous_are_stored_in_their_order():
    array = tensors(6, 3, 4)[::2].transpose(0, 2, 1)
    assert same_bits(tensor_array(tensor_table(array), Column.LATENT_MEAN), array)


def test_no_rows_are_no_rows():
    assert tensor_array(tensor_table(tensors(0, 4, 2)), Column.LATENT_MEAN).shape == (0, 4, 2)


def test_pairs_there_and_back_in_slices_and_chunks():
    field = pa.field(Column.ORIGINAL_SIZE, pa.list_(pa.int32(), 2))
    pairs = [[1, 2], [3, 4], [5, 6], [7, 8]]
    table = pa.Table.from_arrays([pa.array(pairs, field.type)], schema=pa.schema([field]))
    assert pair_array(table.slice(1, 2), Column.ORIGINAL_SIZE).tolist() == pairs[1:3]
    split = pa.concat_tables([table.slice(0, 1), table.slice(1, 3)])
    assert pair_array(split, Column.ORIGINAL_SIZE).tolist() == pairs


def test_the_index_schema_survives_parquet_with_nulls_anywhere(dataset):
    optional = [field.name for field in INDEX_SCHEMA if field.nullable]
    rows = index_rows({}, dict.fromkeys(optional), {"original_size": None}, {"bucket": None}, {"reject_reason": "x"})
    dataset.write_table("a.parquet", rows, compression="zstd")
    back = dataset.read_table("a.parquet")
    assert back.schema == INDEX_SCHEMA
    assert back.to_pylist() == rows.to_pylist()


def test_the_latents_schema_survives_parquet_with_its_shapes(dataset):
    columns = {
        "key": ["a", "b"],
        "id": ["i", "j"],
        "captions": [["c"], ["d", "e"]],
        "caption_weights": pa.array([[1.0], [0.25, 0.75]], WEIGHTS),
        "original_size": pa.array([[1, 2], [3, 4]], LATENTS.field("original_size").type),
        "crop": pa.array([0, 1], pa.int32()),
        "crop_top_left": pa.array([[0, 1], [2, 0]], LATENTS.field("crop_top_left").type),
        "target_size": pa.array([[8, 8], [8, 8]], LATENTS.field("target_size").type),
        "flip": [True, False],
        "aesthetic_score": pa.array([None, 5.0], pa.float32()),
        "latent_mean": tensor_column(tensors(2, 4, 2, 3, seed=1)),
        "latent_std": tensor_column(tensors(2, 4, 2, 3, seed=2)),
        "context": in_lists(
            2, np.array([0, 1, 1]), tensor_column(tensors(3, 5, 6, seed=3)), LATENTS.field("context").type
        ),
        "pooled": in_lists(2, np.array([0, 1, 1]), tensor_column(tensors(3, 7, seed=4)), LATENTS.field("pooled").type),
    }
    table = pa.table(columns, schema=LATENTS)
    dataset.write_table("a.parquet", table)
    back = dataset.read_table("a.parquet")
    assert back.schema == LATENTS
    assert [field.metadata for field in back.schema] == [field.metadata for field in LATENTS]
    assert back.equals(table)
    shapes = {name: tensor_array(back, Column(name)).shape for name in ("latent_mean", "context", "pooled")}
    assert shapes == {"latent_mean": (2, 4, 2, 3), "context": (3, 5, 6), "pooled": (3, 7)}


def test_a_digest_is_the_same_on_every_machine():
    assert digest({"b": [1, None, "ä"], "a": 0.5}) == digest({"a": 0.5, "b": [1, None, "ä"]})
    assert digest({"b": [1, None, "ä"], "a": 0.5}) == "ad0b5fe37d2050a3361db635d2212fcf"  # sha256sum
    assert digest([1, 2]) != digest([2, 1])
    assert digest(["a", None]) != digest(["a", "null"])


def test_a_folder_without_a_manifest_is_no_dataset(dataset):
    dataset.write("data/x/orphan.parquet", b"")
    assert read_manifest(dataset, "index") is None
    with pytest.raises(FileNotFoundError, match="no finished index"):
        require_manifest(dataset, "index")


def test_a_committed_manifest_is_read_back(dataset):
    written = commit(dataset, "data/b", "data/a", facts={"x": 1}, failed={"p": "why"})
    assert read_manifest(dataset, "index") == written
    assert written.rows == 2
    assert [file.name for file in data_files(dataset, written)] == ["data/a", "data/b"]


def test_data_files_keep_their_buckets(dataset):
    files = [DataFile(name="a", rows=2, bucket=(64, 128)), DataFile(name="b", rows=3)]
    content = {"kind": "latents", "counts": {}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}}
    assert data_files(dataset, write_manifest(dataset, files, **content)) == files


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_commit_that_fails_anywhere_leaves_the_dataset_as_it_was(dataset, monkeypatch, written):
    before = commit(dataset, "data/a")
    replace, left = os.replace, [written]

    def fail_after(source, target):
        if left[0] == 0:
            raise OSError("interrupted")
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as broken:
        broken.setattr("os.replace", fail_after)
        with pytest.raises(OSError, match="interrupted"):
            commit(dataset, "data/a", "data/b")
    assert read_manifest(dataset, "index") == before
    after = commit(dataset, "data/a", "data/b")
    assert read_manifest(dataset, "index") == after


def test_what_a_manifest_names_is_there_before_it(dataset, monkeypatch):
    order, replace = [], os.replace

    def record(source, target):
        order.append(os.path.relpath(target, dataset.root))
        replace(source, target)

    monkeypatch.setattr("os.replace", record)
    manifest = commit(dataset, "data/a")
    assert order == [manifest.files, f"manifests/{manifest.digest}.json", MANIFEST]


def test_a_pinned_manifest_outlives_newer_ones(dataset):
    first = commit(dataset, "data/a")
    second = commit(dataset, "data/a", "data/b")
    assert first.digest != second.digest
    assert read_manifest(dataset, "index") == second
    pinned = read_manifest(dataset, "index", first.digest)
    assert pinned == first
    assert [file.name for file in data_files(dataset, pinned)] == ["data/a"]
    assert read_manifest(dataset, "index", "0" * 32) is None


def test_the_same_commit_again_is_the_same_manifest(dataset):
    assert commit(dataset, "data/a", "data/b").digest == commit(dataset, "data/b", "data/a").digest
    assert len(dataset.list("manifests")) == 1


def test_a_dataset_of_another_kind_is_refused(dataset):
    commit(dataset, "data/a", kind="latents")
    with pytest.raises(ValueError, match=r"'latents'.*'index' was expected"):
        read_manifest(dataset, "index")


def test_a_dataset_of_another_schema_is_refused(dataset):
    commit(dataset, "data/a", fingerprint={"schema": SCHEMA_VERSION + 1})
    with pytest.raises(
        ValueError, match=rf"schema {SCHEMA_VERSION + 1}, .* reads {SCHEMA_VERSION}: make it anew with jobs.preprocess"
    ):
        read_manifest(dataset, "index")


def test_kept_rows_are_those_without_a_reason(dataset):
    rows = index_rows({"id": "a"}, {"id": "b", "reject_reason": Reject.TOO_SMALL}, {"id": "c"})
    assert sorted(kept(dataset, rows).column("id").to_pylist()) == ["a", "c"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "j"},
        {"captions": ["a dog"]},
        TWO,
        {"bucket": [64, 128]},
        {"aesthetic_score": 5.6},
        {"bucket": [128, 64]},
    ],
)
def test_a_latents_key_changes_with_what_its_row_is_made_of(dataset, change):
    (before,) = kept(dataset, index_rows({})).column("key").to_pylist()
    (after,) = kept(dataset, index_rows(change)).column("key").to_pylist()
    assert before != after


@pytest.mark.parametrize("change", [{"path": "moved/b.png"}, {"key": "l"}, {"file_size": 8}])
def test_a_latents_key_stays_where_the_row_would_be_the_same(dataset, change):
    before = kept(dataset, index_rows({})).column("key").to_pylist()
    assert kept(dataset, index_rows(change)).column("key").to_pylist() == before


def test_kept_rows_have_the_captions_that_are_kept_and_their_chances(dataset):
    bare = {"captions": [], "caption_weights": [], "caption_reasons": []}
    rows = index_rows(
        TWO, TWO | {"caption_reasons": ["long_caption", None]}, TWO | {"caption_reasons": ["x", "x"]}, bare
    )
    one, *others = (kept(dataset, rows.slice(place, 1)).to_pylist()[0] for place in range(4))
    assert (one["captions"], one["caption_weights"]) == (["a cat", "a dog"], [0.25, 0.75])
    found = [(row["captions"], row["caption_weights"]) for row in others]
    assert found == [(["a dog"], [1.0]), ([""], [1.0]), ([""], [1.0])]
    heavier = kept(dataset, index_rows(TWO | {"caption_weights": [2.0, 6.0]})).to_pylist()[0]
    assert heavier["key"] == one["key"]


def test_kept_rows_do_not_depend_on_the_files_they_lie_in(dataset):
    rows = [{"id": f"{n}", "source": "s", "path": f"{n}.png", "captions": [f"c{n % 3}"]} for n in range(12)]
    whole = kept(dataset, index_rows(*rows))
    assert whole.column("key").to_pylist() == sorted(set(whole.column("key").to_pylist()))
    random.Random(0).shuffle(rows)
    assert kept(dataset, index_rows(*rows[:5]), index_rows(*rows[5:])).to_pylist() == whole.to_pylist()


def test_an_index_without_files_keeps_nothing(dataset):
    assert kept(dataset).num_rows == 0


def test_pairs_or_nulls_make_a_column():
    assert pair_column([(1, 2), None]).to_pylist() == [[1, 2], None]
