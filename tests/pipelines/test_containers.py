"""What holds for every source that has many images in a file: tars, Parquet, saved datasets."""

import io
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.originals import Originals
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.ranges import StorageError
from pipelines.schema import INDEX_SCHEMA
from pipelines.storage import Storage, StorageOptions
from tests.containers import (
    OPTIONS,
    caption_of,
    contents,
    inputs,
    listed,
    sample,
    save_dataset,
    source,
    write_tar,
)


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
        except ValueError as error:  # the damaged byte was in a column's name
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
