"""Sources that hold many images in a file: tars, Parquet, saved datasets. Each image is read by its place alone."""

import io
import json
import os
import random
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import ColumnsConfig, SourceConfig
from pipelines.originals import Originals
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.ranges import StorageError
from pipelines.schema import INDEX_SCHEMA
from pipelines.storage import Storage, StorageOptions

OPTIONS = StorageOptions()


def source(path, kind: str = "auto", name: str = "source", **columns) -> SourceConfig:
    return SourceConfig(name=name, path=str(path), kind=kind, columns=ColumnsConfig(**columns))


def inputs(*sources: SourceConfig) -> pa.Table:
    table = pa.concat_tables(list_inputs([survey(one, OPTIONS) for one in sources], OPTIONS))
    assert table.schema == INPUT_SCHEMA
    keys = table.column("key").to_pylist()
    assert len(set(keys)) == len(keys)
    return table


def caption_of(row: dict) -> str | None:
    """The caption of an image that has no more than one."""
    (caption,) = row["captions"] or [None]
    return caption


def listed(config: SourceConfig) -> list[tuple]:
    """(path, caption, the image's bytes or the problem) of each input."""
    originals = Originals([config], OPTIONS)
    rows = inputs(config).to_pylist()
    return [(row["path"], caption_of(row), row["problem"] or originals.read(row)) for row in rows]


def contents(count: int, seed: int = 0) -> list[bytes]:
    """Bytes that do not compress, as images, in sizes around those of a page and of a block of snappy."""
    draws = random.Random(seed)
    return [draws.randbytes(draws.choice([0, 1, 40, 1_000, 65_535, 65_536, 70_000, 200_000])) for _ in range(count)]


def write_tar(path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, image: bytes, **told) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    fields = {"key": key, "status": "success", "width": 9, "similarity": float("nan")} | told
    return [
        (f"{key}.jpg", image),
        (f"{key}.txt", str(told.get("caption", "")).encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tars_samples_are_inputs_with_what_their_json_says(tmp_path, kind):
    one, two, three = contents(3)
    long_name = "deep/" + "x" * 120
    write_tar(tmp_path / "00000.tar", sample("0", one, caption=" a cat ", pwatermark=0.25, aesthetic_score=6), kind)
    others = [*sample("b.c/1", two, caption="a dog"), (f"{long_name}.png", three), (f"{long_name}.txt", b"beside")]
    write_tar(tmp_path / "sub/00001.tar", [("__notes.py", b"x"), *others, ("no-image.txt", b"words")], kind)
    config = source(tmp_path, scores={})
    assert listed(config) == [
        ("00000.tar/0.jpg", "a cat", one),
        ("sub/00001.tar/b.c/1.jpg", "a dog", two),
        (f"sub/00001.tar/{long_name}.png", "beside", three),
        ("sub/00001.tar/no-image", "words", "the sample has no image"),
    ]
    (row, *_) = inputs(source(tmp_path / "00000.tar", scores={"watermark": "pwatermark"})).to_pylist()
    assert (row["aesthetic_score"], row["scores"], row["file_size"]) == (6.0, [("watermark", 0.25)], len(one))


def test_members_of_a_sample_need_not_lie_side_by_side(tmp_path):
    one, two = contents(2)
    write_tar(tmp_path / "a.tar", [("1.jpg", one), ("2.jpg", two), ("2.txt", b"two"), ("1.txt", b"one")])
    assert listed(source(tmp_path)) == [("a.tar/1.jpg", "one", one), ("a.tar/2.jpg", "two", two)]


def test_a_mark_of_the_coding_is_no_part_of_a_tars_texts(tmp_path):
    (one,) = contents(1)
    told = b'\xef\xbb\xbf{"caption": "a cat"}'
    write_tar(tmp_path / "a.tar", [("1.jpg", one), ("1.json", told), ("2.jpg", one), ("2.txt", b"\xef\xbb\xbfa dog")])
    assert listed(source(tmp_path)) == [("a.tar/1.jpg", "a cat", one), ("a.tar/2.jpg", "a dog", one)]


def test_of_several_images_in_a_sample_one_has_to_be_named(tmp_path):
    one, two = contents(2)
    write_tar(tmp_path / "a.tar", [("1.seg.png", one), ("1.jpg", two), ("1.txt", b"one")])
    ((_, _, problem),) = listed(source(tmp_path))
    assert problem == "the sample has several images, seg.png, jpg: name one in columns.image"
    assert listed(source(tmp_path, image="jpg")) == [("a.tar/1.jpg", "one", two)]
    with pytest.raises(ValueError, match=r"source.columns.image is 'webp', and there is only seg.png, jpg"):
        inputs(source(tmp_path, image="webp"))


def test_what_a_tar_does_not_say_is_named_with_what_it_does(tmp_path):
    write_tar(tmp_path / "a.tar", sample("0", b"x", caption="c"))
    with pytest.raises(
        ValueError, match=r"a\.tar: source.columns.scores.unsafe is 'punsafe', .* only txt, key, status"
    ):
        inputs(source(tmp_path, scores={"unsafe": "punsafe"}))
    write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.json", b'{"title": "c"}')])
    with pytest.raises(ValueError, match=r"source.columns.caption is 'caption', and there is only title"):
        inputs(source(tmp_path))
    assert listed(source(tmp_path, caption="title")) == [("a.tar/1.jpg", "c", b"x")]
    assert listed(source(tmp_path, caption="")) == [("a.tar/1.jpg", None, b"x")]
    write_tar(tmp_path / "a.tar", sample("0", b"x", caption="c", aesthetic_score="high"))
    with pytest.raises(ValueError, match=r"a\.tar, 0: aesthetic_score is 'high', and a number was expected"):
        inputs(source(tmp_path))


def test_a_tar_that_breaks_off_keeps_its_whole_samples_and_says_so(tmp_path):
    images = contents(4, seed=1)
    members = [pair for n, image in enumerate(images) for pair in sample(str(n), image + b"end", caption=f"c{n}")]
    write_tar(tmp_path / "a.tar", members)
    whole = (tmp_path / "a.tar").read_bytes()
    for cut in (*range(512, len(whole) - 10_240, 9_973), len(whole) - 10_240):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        *rows, (path, _, problem) = listed(source(tmp_path))
        assert path == "a.tar"
        assert problem.endswith("and what follows is unknown") or "unexpected end" in problem
        assert [found[2] for found in rows] == [image + b"end" for image in images[: len(rows)]]
    for other in (b"", b"no tar at all" * 99, whole[:99]):
        (tmp_path / "a.tar").write_bytes(other)
        ((_, _, problem),) = listed(source(tmp_path))
        assert problem.startswith("the tar cannot be read to its end")


def test_odd_members_are_problems_of_their_own_sample(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("1.jpg", b"x"), ("1.txt", b"words"), ("1.json", b"{broken"), ("2.jpg", b"y"), ("2.jpg", b"z")],
    )
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("3.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        tar.addfile(tarfile.TarInfo("4\udcff.jpg"))
    assert [caption for _, caption, _ in listed(source(tmp_path, caption=""))] == [None] * 4
    problems = [problem for _, _, problem in listed(source(tmp_path, caption=""))]
    assert problems[0].startswith("1.json is not JSON")
    assert problems[1:] == ["2.jpg is there twice", "3.jpg is a link or has holes", b""]


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


def weighed(config: SourceConfig) -> list[dict[str, float]]:
    return [dict(zip(row["captions"], row["caption_weights"], strict=True)) for row in inputs(config).to_pylist()]


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


def test_a_tars_json_may_have_a_list_of_captions_and_its_text_one_in_each_line(tmp_path):
    told = sample("1", b"x", caption=["a cat", "a pet"], odds=[1, 3])
    write_tar(tmp_path / "a.tar", [*told, ("2.jpg", b"y"), ("2.txt", b"one\ntwo\n")])
    assert weighed(source(tmp_path, caption_weights="odds")) == [{"a cat": 1, "a pet": 3}, {"one\ntwo": 1}]
    assert weighed(source(tmp_path, caption_per_line=True))[1] == {"one": 0.5, "two": 0.5}
    assert weighed(source(tmp_path, caption={"caption": 1.0, "txt": 1.0}, caption_per_line=True))[1] == {
        "one": 0.5,
        "two": 0.5,
    }


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
    [({"compression": "lz4"}, "compressed with LZ4"), ({"column_encoding": "DELTA_LENGTH_BYTE_ARRAY"}, "number 6")],
)
def test_a_parquet_layout_that_is_not_read_is_refused_by_name(tmp_path, options, words):
    pq.write_table(
        pa.table({"image": contents(9), "caption": ["c"] * 9}), tmp_path / "a.parquet", use_dictionary=False, **options
    )
    with pytest.raises(ValueError, match=words):
        inputs(source(tmp_path))


def save_dataset(folder, table: pa.Table, files: int = 2, stale: bool = False) -> None:
    """As `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{files:05}.arrow" for n in range(files)]
    rows = -(-table.num_rows // files)
    for number, name in enumerate(names):
        part = table.slice(number * rows, rows)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            for batch in part.to_batches(max_chunksize=3):
                writer.write_batch(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    if stale:
        (folder / "data-00000-of-00009.arrow").write_bytes(b"of an earlier save")


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


@pytest.mark.parametrize(
    ("files", "kind", "error", "words"),
    [
        ([], "auto", FileNotFoundError, "there is no such folder, or it is empty"),
        (["notes.txt"], "auto", FileNotFoundError, "no image with a suffix"),
        (["a.png"], "webdataset", FileNotFoundError, r"no \.tar file"),
        (["a.png", "b.tar"], "auto", ValueError, "holds 1 images and 1 other sources; set kind"),
        (["a.png", "b.parquet"], "auto", ValueError, "holds 1 images and 1 other sources; set kind"),
        (["a.tar.gz"], "auto", ValueError, "a.tar.gz: a packed tar cannot be read in places"),
    ],
)
def test_a_folder_that_is_no_source_says_why(tmp_path, files, kind, error, words):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(error, match=f"source 'photos', {tmp_path}.*{words}"):
        inputs(source(tmp_path, kind=kind, name="photos"))


def test_a_file_of_another_kind_is_no_source(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"photos\.zip: is a file; a folder, a \.tar or a \.parquet file was expected"):
        survey(source(tmp_path / "photos.zip"), OPTIONS)


def test_an_empty_container_is_no_source(tmp_path):
    write_tar(tmp_path / "a.tar", [("readme.md", b"x")])
    with pytest.raises(FileNotFoundError, match=r"no image in a\.tar"):
        inputs(source(tmp_path))


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (40, 30), colour)
    image.putpixel((0, 0), (1, 2, 3))
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_kinds_mix_and_what_is_measured_lies_where_the_index_says(tmp_path):
    colours = ["red", "green", "blue", "white"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").write_bytes(png("red"))
    (tmp_path / "folder/a.txt").write_text("red")
    write_tar(tmp_path / "tars/0.tar", [("1.png", png("green")), ("1.txt", b"green"), ("2.png", b"broken")])
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"image": [png("blue"), None], "caption": ["blue", "none"]}), tmp_path / "tables/t.parquet")
    save_dataset(tmp_path / "saved", pa.table({"image": [png("white")], "caption": ["white"]}), files=1)
    sources = [source(tmp_path / name, name=name) for name in ("folder", "tars", "tables", "saved")]
    originals = Originals(sources, OPTIONS)
    rows = measure(inputs(*sources), originals, FilterConfig())
    assert rows.schema == INDEX_SCHEMA
    kept = [row for row in rows.to_pylist() if row["reject_reason"] is None]
    assert [(row["source"], caption_of(row)) for row in kept] == list(
        zip([one.name for one in sources], colours, strict=True)
    )
    assert [originals.read(row) for row in kept] == [png(colour) for colour in colours]
    assert [row["file_size"] for row in kept] == [len(png(colour)) for colour in colours]
    assert [row["original_size"] for row in kept] == [[30, 40]] * 4
    rejected = {row["path"]: row["reject_detail"] for row in rows.to_pylist() if row["reject_reason"]}
    assert rejected["t.parquet#1"] == "the row has no image"
    assert "cannot identify" in rejected["0.tar/2.png"]


def test_from_s3_the_same_images_are_found_and_each_is_read_by_its_range(tmp_path, s3):
    images = contents(12, seed=4)
    table = pa.table({"image": images, "caption": ["c"] * 12})
    write_tar(tmp_path / "tars/0.tar", [pair for n, one in enumerate(images) for pair in sample(f"{n}", one)])
    write_tar(tmp_path / "tars/1.tar", sample("1", random.Random(1).randbytes(3 * 2**20)) + sample("2", b"after"))
    (tmp_path / "tables").mkdir()
    pq.write_table(table, tmp_path / "tables/0.parquet")
    save_dataset(tmp_path / "saved", table)
    options = StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1")
    bucket = Storage(f"s3://{s3.bucket}/containers", options)
    for path in tmp_path.rglob("*.*"):
        bucket.write(str(path.relative_to(tmp_path)), path.read_bytes())
    for name in ("tars", "tables", "saved"):
        local, remote = source(tmp_path / name), source(f"{bucket.uri}/{name}")
        found, expected = pa.concat_tables(list_inputs([survey(remote, options)], options)), inputs(local)
        assert found.drop_columns(["key"]).equals(expected.drop_columns(["key"]))  # times differ, and so keys
        originals = Originals([remote], options)
        assert [originals.read(row) for row in found.to_pylist()] == [image for _, _, image in listed(local)]


@pytest.mark.parametrize("kind", ["tar", "parquet", "arrow"])
def test_damage_anywhere_is_an_input_with_its_problem_or_columns_that_are_not_there(tmp_path, kind):
    images, draws = contents(8, seed=5), random.Random(6)
    if kind == "tar":
        members = [pair for n, image in enumerate(images) for pair in sample(str(n), image[:3_000], caption="c")]
        write_tar(tmp_path / "0.tar", members)
    elif kind == "parquet":
        table = pa.table({"image": [image[:9_000] for image in images], "caption": ["c"] * 8})
        pq.write_table(table, tmp_path / "0.parquet", data_page_size=3_000, write_batch_size=2)
    else:
        table = pa.table({"image": [image[:3_000] for image in images], "caption": ["c"] * 8})
        save_dataset(tmp_path / "saved", table, files=1)
    (file,) = tmp_path.rglob(f"*.{kind}")
    whole, refused = file.read_bytes(), []
    for _ in range(60):
        damaged = bytearray(whole[: draws.choice([len(whole), draws.randrange(len(whole))])])
        for _ in range(3 * bool(damaged)):
            near = draws.choice([draws.randrange(len(damaged)), draws.randrange(min(900, len(damaged)))])
            damaged[draws.choice([near, len(damaged) - 1 - near])] = draws.randrange(256)
        file.write_bytes(bytes(damaged))
        try:
            assert listed(source(file.parent))
        except ValueError as error:  # the damaged byte was in a column's name, or in that of an encoding
            refused.append(str(error))
    assert all(message.startswith(f"{file}: ") for message in refused)
    assert len(refused) < 10


def test_a_failing_storage_is_not_a_damaged_file(tmp_path, monkeypatch):
    write_tar(tmp_path / "0.tar", sample("1", b"x", caption="c"))
    pq.write_table(pa.table({"image": [b"x"], "caption": ["c"]}), tmp_path / "0.parquet")

    def fail(*_: object) -> None:
        raise OSError("connection reset")

    monkeypatch.setattr("pipelines.storage.RangeReader.read_into", fail)
    for name in ("0.tar", "0.parquet"):
        with pytest.raises(StorageError, match=f"{name} cannot be read: connection reset"):
            inputs(source(tmp_path / name))


def test_a_changed_container_gets_new_keys_and_a_moved_source_keeps_them(tmp_path):
    for name in ("0", "1"):
        write_tar(tmp_path / f"a/{name}.tar", sample(name, b"x", caption="c"))
    before = inputs(source(tmp_path / "a")).column("key").to_pylist()
    (tmp_path / "a").rename(tmp_path / "b")
    assert inputs(source(tmp_path / "b")).column("key").to_pylist() == before
    write_tar(tmp_path / "b/1.tar", sample("1", b"other", caption="c"))
    after = inputs(source(tmp_path / "b")).column("key").to_pylist()
    assert [one == other for one, other in zip(before, after, strict=True)] == [True, False]
