"""Tables as a source, Parquet files and saved datasets: each image is read alone, by its place."""

import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.preprocess.sources.survey import survey
from tests.containers import (
    OPTIONS,
    caption_of,
    contents,
    inputs,
    listed,
    save_dataset,
    source,
    weighed,
)


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("layout", ["bytes", "struct", "required"])
def test_each_image_of_a_parquet_file_is_read_alone(tmp_path, codec, version, layout):
    images: list[bytes | None] = [*contents(60), None, b"twice" * 999, b"twice" * 999, *contents(9, seed=2)]
    if layout == "required":
        images.remove(None)
        field = pa.field("image", pa.binary(), nullable=False)
    else:
        field = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    if layout == "struct":
        structs = [None if image is None else {"bytes": image, "path": "x.png"} for image in images]
        values = pa.array(structs, field.type)
    else:
        field = field if layout == "required" else pa.field("image", pa.binary())
        values = pa.array(images, pa.binary())
    captions = pa.array([f"caption {n}" for n in range(len(images))])
    table = pa.table([captions, values], schema=pa.schema([pa.field("caption", pa.string()), field]))
    options = {"data_page_version": version, "data_page_size": 100_000, "write_batch_size": 4, "row_group_size": 50}
    pq.write_table(table, tmp_path / "a.parquet", compression=codec, dictionary_pagesize_limit=90_000, **options)
    found = listed(source(tmp_path))
    assert [row[2] for row in found] == ["the row has no image" if image is None else image for image in images]
    assert [row[:2] for row in found] == [(f"a.parquet#{n}", f"caption {n}") for n in range(len(images))]


def test_an_image_of_a_snappy_page_costs_little_more_than_itself(tmp_path):
    images = [random.Random(n).randbytes(100_000) for n in range(64)]
    pq.write_table(pa.table({"jpg": images, "caption": ["c"] * 64}), tmp_path / "a.parquet")  # one page, by default
    rows = inputs(source(tmp_path)).to_pylist()
    assert {row["codec"] for row in rows} == {"snappy"}
    assert max(row["length"] for row in rows) < 100_000 + 2 * 65_536 + 100


def test_bytes_that_compress_are_read_from_whole_pages_if_need_be(tmp_path):
    images = [bytes([n]) * 150_000 + random.Random(n).randbytes(n) for n in range(20)]
    pq.write_table(pa.table({"jpg": images, "caption": ["c"] * 20}), tmp_path / "a.parquet", use_dictionary=False)
    assert [row[2] for row in listed(source(tmp_path))] == images


def test_a_table_may_name_files(tmp_path):
    (tmp_path / "meta").mkdir()
    for name in ("meta/a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path.parent / "elsewhere.png").write_bytes(b"elsewhere")
    names = ["a.png", "../b.png", f"{tmp_path.parent}/elsewhere.png", "gone.png", "../../elsewhere.png", None, ""]
    pq.write_table(pa.table({"file_name": names, "caption": ["c"] * 7}), tmp_path / "meta/metadata.parquet")
    config = source(tmp_path, kind="parquet")
    assert [row[2] for row in listed(config)] == [
        b"meta/a.png",
        b"b.png",
        b"elsewhere",
        *["there is no such file"] * 2,
        *["the row has no image"] * 2,
    ]
    before = inputs(config).column("key").to_pylist()
    (tmp_path / "b.png").write_bytes(b"other pixels")
    changed = [one != other for one, other in zip(before, inputs(config).column("key").to_pylist(), strict=True)]
    assert changed == [False, True, False, False, False, False, False]
    os.utime(tmp_path / "meta/metadata.parquet", (1, 1))  # so that what lies elsewhere is looked at again
    after = inputs(config).column("key").to_pylist()
    assert [one != other for one, other in zip(before, after, strict=True)][:4] == [False, True, True, False]


@pytest.mark.parametrize("address", ["http://169.254.169.254/x.png", "https://example.com/x.png", "file:///etc/passwd"])
def test_nothing_is_fetched_from_the_web(tmp_path, address):
    pq.write_table(pa.table({"url": ["a.png", address], "caption": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet, row 1: {address}: nothing is fetched from the web"):
        inputs(source(tmp_path, image="url"))


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        (
            {"x": ["a"], "caption": ["c"]},
            {},
            "source.columns.image is not set, and none of image, .*file_name is there; there is only",
        ),
        ({"image": [b"a"]}, {"image": "jpg", "caption": ""}, "source.columns.image is 'jpg'; there is only image"),
        ({"image": [b"a"], "text": ["c"]}, {}, "source.columns.caption is 'caption', and there is only image, text"),
        ({"image": [[b"a"]], "caption": ["c"]}, {}, "image is of type list"),
        ({"image": [1], "caption": ["c"]}, {}, "image is of type int64; bytes, names of files"),
        ({"image": [b"a"], "caption": [[["c"]]]}, {}, "caption is of type list.*, and string was expected"),
        ({"image": [b"a"], "caption": ["c"], "aesthetic_score": ["high"]}, {}, "aesthetic_score is of type string"),
        ({"image": [b"a"], "caption": ["c"], "s": [float("inf")]}, {"scores": {"s": "s"}}, "s is infinite in row 0"),
    ],
)
def test_a_table_with_other_columns_is_refused_with_what_there_is(tmp_path, table, columns, words):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet: {words}"):
        inputs(source(tmp_path, **columns))


@pytest.mark.parametrize(
    ("kind", "saved"),  # Arrow cannot read a null of a fixed-size list back from Parquet
    [(pa.list_, False), (pa.large_list, False), (pa.list_, True), (lambda text: pa.list_(text, 2), True)],
)
def test_a_tables_row_may_have_a_list_of_captions_and_one_of_weights(tmp_path, kind, saved):
    captions = [[" a cat ", "a pet"], [None, "left"], None, ["same", "same"], ["never", "ever"], ["alike", "too"]]
    weights = [[3, 1], [5, 2], [9], [1, 1], [0, 1], None]
    columns = {
        "image": [b"x"] * 6,
        "captions": pa.array(captions, kind(pa.string())),
        "odds": weights,
        "tag": list("abcdef"),
    }
    if saved:
        save_dataset(tmp_path / "saved", pa.table(columns))
    else:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=4)
    place = tmp_path / "saved" if saved else tmp_path
    assert weighed(source(place, caption="captions", caption_weights="odds")) == [
        {"a cat": 3, "a pet": 1},
        {"left": 2},
        {},
        {"same": 2},
        {"ever": 1},
        {"alike": 0.5, "too": 0.5},
    ]
    shared = weighed(source(place, caption={"captions": 2.0, "tag": 1.0}))
    assert shared[:4] == [{"a cat": 1, "a pet": 1, "a": 1}, {"left": 2, "b": 1}, {"c": 1}, {"same": 2, "d": 1}]


@pytest.mark.parametrize(
    ("odds", "words"),
    [
        ([[1.0]], "row 1: caption has 2, and odds 1"),
        ([[1.0, -2.0]], r"row 1: odds holds -2\.0, and weights are numbers, 0 or more"),
        ([[1.0, float("nan")]], "row 1: odds holds nan"),
        (["x"], "odds is of type string, and double was expected"),
    ],
)
def test_weights_that_do_not_fit_their_captions_are_refused_by_row(tmp_path, odds, words):
    table = {"image": [b"x"] * 2, "caption": [None, ["a", "b"]], "odds": [None, *odds]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=words):
        inputs(source(tmp_path, caption_weights="odds"))


def test_scores_of_a_table_are_numbers_of_any_width_and_nan_is_none(tmp_path):
    scores = {"p": pa.array([0.5, float("nan"), None]), "aesthetic_score": pa.array([1, 2, None], pa.int8())}
    pq.write_table(pa.table({"image": [b"a", b"b", b"c"], "caption": [1, 2, 3], **scores}), tmp_path / "a.parquet")
    rows = inputs(source(tmp_path, scores={"q": "p"})).to_pylist()
    assert [(caption_of(row), row["aesthetic_score"], row["scores"]) for row in rows] == [
        ("1", 1.0, [("q", 0.5)]),
        ("2", 2.0, []),
        ("3", None, []),
    ]


def test_a_damaged_parquet_file_is_an_input_with_its_problem(tmp_path):
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"image": contents(40), "caption": ["c"] * 40}), tmp_path / name)
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", whole[:-9], whole[:4] + bytes(2_000) + whole[2_004:]):
        (tmp_path / "a.parquet").write_bytes(damaged)
        (first, *rest) = listed(source(tmp_path))
        assert (first[0], first[2].startswith("the file is damaged: ")) == ("a.parquet", True)
        assert [row[2] for row in rest] == contents(40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compression": "lz4"}, "compressed with LZ4"),
        ({"column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}, "DELTA_LENGTH_BYTE_ARRAY, is not read"),
    ],
)
def test_a_parquet_layout_that_is_not_read_is_refused_by_name(tmp_path, options, words):
    pq.write_table(
        pa.table({"image": contents(9), "caption": ["c"] * 9}), tmp_path / "a.parquet", use_dictionary=False, **options
    )
    with pytest.raises(ValueError, match=words):
        inputs(source(tmp_path))


def test_a_page_that_claims_an_encoding_which_its_column_has_not_is_damage(tmp_path):
    table = pa.table({"image": contents(9), "caption": ["c"] * 9})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    chunk = pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    told = data.index(b"\x2c\x15\x12\x15\x00", chunk.data_page_offset)  # a data page's 9 values, and PLAIN
    data[told + 4] = 2 * 6
    (tmp_path / "a.parquet").write_bytes(data)
    ((name, _, problem),) = listed(source(tmp_path))
    assert (name, "claims the encoding number 6" in problem) == ("a.parquet", True)


@pytest.mark.parametrize("kind", ["struct", "binary", "large_binary"])
def test_each_image_of_a_saved_dataset_is_read_alone(tmp_path, kind):
    images: list[bytes | None] = [*contents(20), None, *contents(3, seed=3)]
    if kind == "struct":
        values = pa.array(
            [{"bytes": image, "path": None} for image in images],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        )
    else:
        values = pa.array(images, getattr(pa, kind)())
    table = pa.table({"image": values, "text": [f"c{n}" for n in range(len(images))]})
    save_dataset(tmp_path / "saved", table, stale=True)
    found = listed(source(tmp_path / "saved", caption="text"))
    assert [row[2] for row in found] == ["the row has no image" if image is None else image for image in images]
    assert [row[1] for row in found] == [f"c{n}" for n in range(len(images))]
    assert found[0][0] == "data-00000-of-00002.arrow#0"


def test_a_saved_dataset_with_splits_asks_for_one(tmp_path):
    for split in ("test", "train"):
        save_dataset(tmp_path / split, pa.table({"image": [b"x"], "caption": ["c"]}), files=1)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=rf"holds the splits test, train; name one, as {tmp_path}/test"):
        survey(source(tmp_path), OPTIONS)
    assert len(listed(source(tmp_path / "train"))) == 1


def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path):
    save_dataset(tmp_path / "a", pa.table({"image": [b"x"] * 4, "caption": ["c"] * 4}))
    (tmp_path / "a/data-00001-of-00002.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"state.json names data-00001-of-00002.arrow"):
        survey(source(tmp_path / "a"), OPTIONS)
    (tmp_path / "a/state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    with pytest.raises(ValueError, match="call flatten_indices"):
        survey(source(tmp_path / "a"), OPTIONS)


def test_a_compressed_arrow_file_is_refused_and_a_damaged_one_is_a_problem(tmp_path):
    table = pa.table({"image": contents(6), "caption": ["c"] * 6})
    save_dataset(tmp_path / "a", table, files=1)
    (file,) = (tmp_path / "a").glob("*.arrow")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert [row[2].startswith("the file is damaged") for row in listed(source(tmp_path / "a"))] == [True]
    with pa.ipc.new_stream(str(file), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="the Arrow file is compressed"):
        inputs(source(tmp_path / "a"))
