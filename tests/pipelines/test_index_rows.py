"""From inputs to index rows without a cluster: measuring, filtering, and the verdict on duplicates."""

import errno
import io
import itertools
import random
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from pipelines.config import SourceConfig
from pipelines.images import content_id, decode, decode_reduced
from pipelines.originals import Originals
from pipelines.preprocess.bucket import assign_buckets
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.filter import apply_filters, mark_duplicates
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.schema import INDEX_SCHEMA, Reject
from pipelines.storage import StorageOptions

VERDICT = pa.schema([(name, pa.string()) for name in ("id", "source", "path", "reject_reason", "reject_detail")])


def png(height: int, width: int, colour: str = "red", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (width, height), colour)
    image.paste("white", (0, 0, 1, 8))  # one colour alone would be blank
    image.save(buffer, options.pop("kind", "PNG"), **options)
    return buffer.getvalue()


def claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def input_row(path: str) -> pa.Table:
    known = {"key": "k", "source": "source", "path": path, "captions": ["c"], "caption_weights": [1.0], "file_size": 7}
    return pa.Table.from_pylist([dict.fromkeys(INPUT_SCHEMA.names) | known], INPUT_SCHEMA)


def originals(folder) -> Originals:
    return Originals([SourceConfig(path=str(folder))], StorageOptions())


@pytest.fixture
def index(tmp_path):
    """The index rows of files given by name, with captions from text files beside them."""

    def build(files: dict[str, bytes], captions: str = "a caption", **filters) -> dict[str, dict]:
        for name, data in files.items():
            path = tmp_path / name
            path.write_bytes(data)
            if not path.with_suffix(".txt").exists():
                path.with_suffix(".txt").write_text(captions)
        config = FilterConfig(**filters)
        inputs = pa.concat_tables(
            list_inputs([survey(SourceConfig(path=str(tmp_path)), StorageOptions())], StorageOptions())
        )
        rows = apply_filters(measure(inputs, originals(tmp_path), config), config)
        assert rows.schema == INDEX_SCHEMA
        assert rows.column("key").to_pylist() == inputs.column("key").to_pylist()
        return {row["path"]: row for row in rows.to_pylist()}

    return build


def reasons(rows: dict[str, dict]) -> dict[str, str | None]:
    return {path: row["reject_reason"] for path, row in rows.items()}


def test_a_good_image_is_measured_and_kept(index):
    data = png(30, 40)
    row = index({"a.png": data})["a.png"]
    assert row["id"] == content_id(data)
    assert row["original_size"] == [30, 40]
    assert (row["captions"], row["caption_weights"], row["caption_reasons"]) == (["a caption"], [1.0], [None])
    assert (row["reject_reason"], row["reject_detail"]) == (None, None)


def test_the_original_size_is_upright(index):
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = index({"a.jpg": png(30, 40, kind="JPEG", exif=exif), "b.tif": png(30, 40, kind="TIFF", exif=exif)})
    assert [row["original_size"] for row in rows.values()] == [[40, 30], [40, 30]]


def test_an_orientation_behind_the_pixels_of_a_png_counts(index):
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = png(30, 40), png(30, 40, exif=exif)
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + int.from_bytes(turned[start : start + 4])]
    assert decode(plain[:-12] + chunk + plain[-12:], 10_000).size == (30, 40)
    assert index({"a.png": plain[:-12] + chunk + plain[-12:]})["a.png"]["original_size"] == [40, 30]


@pytest.mark.parametrize(
    ("data", "reason", "detail"),
    [
        (png(30, 40, kind="JPEG")[:400], Reject.UNREADABLE, "Truncated"),
        (b"", Reject.UNREADABLE, "cannot identify"),
        (b"plain text", Reject.UNREADABLE, "cannot identify"),
        (png(101, 100), Reject.TOO_LARGE, "101 x 100"),
        (claiming(60_000, 60_000), Reject.TOO_LARGE, "60000 x 60000"),
        (png(7, 40), Reject.TOO_SMALL, "7 pixels"),
        (png(10, 31), Reject.EXTREME_ASPECT, "3.1, and filters.max_aspect is 3"),
        (png(31, 10), Reject.EXTREME_ASPECT, "3.1, and filters.max_aspect is 3"),
    ],
)
def test_a_rejected_image_says_why(index, data, reason, detail):
    row = index({"a.png": data}, min_side=8, max_aspect=3, max_pixels=10_000)["a.png"]
    assert row["reject_reason"] == reason
    assert detail in row["reject_detail"]


def test_a_header_that_claims_too_much_is_too_large_and_not_unreadable_by_default(index):
    assert reasons(index({"a.png": claiming(60_000, 60_000)})) == {"a.png": Reject.TOO_LARGE}


def test_a_side_that_the_index_cannot_write_down_is_too_large(index):
    wide = bytearray(png(30, 40, kind="BMP"))
    wide[18:22] = (2**32 - 40).to_bytes(4, "little")  # a width of -40, which the decoder takes for this
    row = index({"a.bmp": bytes(wide), "b.png": claiming(2**31 - 1, 2**31 - 1)})["a.bmp"]
    assert (row["reject_reason"], row["original_size"]) == (Reject.TOO_LARGE, None)
    assert "30 x 4294967256" in row["reject_detail"]


def test_an_image_whose_name_is_no_text_is_a_verdict(index, tmp_path):
    Path(f"{tmp_path}/caf\udce9.png").write_bytes(png(30, 40))
    assert reasons(index({"a.png": png(9, 9)})) == {"a.png": None, "caf\\xe9.png": Reject.UNREADABLE}


@pytest.mark.parametrize(
    "data",
    ["a café\r\n".encode("utf-8-sig"), "a café".encode("utf-16"), b"\xfe\xff" + "a café".encode("utf-16-be")],
)
def test_the_mark_of_a_text_file_says_its_encoding_and_is_no_caption(index, tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert index({"a.png": png(9, 9)})["a.png"]["captions"] == ["a café"]


def test_the_limits_themselves_are_kept(index):
    files = {"a.png": png(8, 24), "b.png": png(100, 100)}
    assert set(reasons(index(files, min_side=8, max_aspect=3, max_pixels=10_000)).values()) == {None}


@pytest.mark.parametrize(
    ("caption", "kept"), [("", False), ("  \n", False), ("ab", False), (" ab ", False), ("abc", True)]
)
def test_a_caption_counts_without_its_white_space(index, caption, kept):
    row = index({"a.png": png(9, 9)}, captions=caption, min_caption_characters=3)["a.png"]
    assert row["reject_reason"] == (None if kept else Reject.NO_CAPTION)


def test_images_without_captions_can_be_kept(index, tmp_path):
    assert reasons(index({"a.png": png(9, 9)}, captions="", min_caption_characters=0)) == {"a.png": None}


def test_small_images_are_kept_by_default(index):
    assert reasons(index({"a.png": png(1, 2)})) == {"a.png": None}


def test_what_filters_ask_about_pixels_is_measured_once(index):
    def stored(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    flat = Image.new("RGB", (40, 30), "red")
    dot, ramp = flat.copy(), Image.linear_gradient("L")
    dot.putpixel((39, 29), (254, 0, 0))
    rows = index({"dot.png": stored(dot), "flat.png": stored(flat), "ramp.png": stored(ramp)})
    assert [rows[name]["distinct_pixels"] for name in rows] == [2, 1, 256]
    assert [rows[name]["reject_reason"] for name in rows] == [None, Reject.BLANK, None]
    assert rows["flat.png"]["contrast"] == 0
    assert rows["ramp.png"]["contrast"] == pytest.approx(256 / 12**0.5, rel=0.01)
    assert [rows[name]["perceptual_hash"] is None for name in rows] == [True, True, False]


def test_every_input_gives_exactly_one_row(index, tmp_path):
    files = {f"{n}.png": png(8 + n, 9, kind="PNG") for n in range(20)}
    files |= {"broken.jpg": b"\xff\xd8\xff", "text.gif": b"text"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gone.png", "caption": "gone"}\n')
    rows = index(files)
    assert set(rows) == {*files, "gone.png"}
    assert reasons(rows)["gone.png"] == Reject.UNREADABLE
    assert rows["gone.png"]["id"] is None
    assert sum(reason is None for reason in reasons(rows).values()) == 20


@pytest.mark.parametrize("name", ["a.png/below-a-file.png", "x" * 300 + ".png", "nul\\u0000.png", "", "../outside.png"])
def test_a_name_that_no_file_has_is_a_verdict_and_not_the_end_of_the_job(index, tmp_path, name):
    (tmp_path.parent / "outside.png").write_bytes(png(9, 9))
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "caption": "c"}}\n')
    rows = index({"a.png": png(9, 9)})
    assert sorted(map(str, reasons(rows).values())) == ["None", "unreadable"]


@pytest.mark.parametrize(
    "name",
    [
        "/dev/null/a.png",
        "/" + "x" * 300,
        "/nul\0.png",
        "s3://bucket",
        "s3://bucket/",
        "s3:///a.png",
        "s3://bucket/a//b.png",
    ],
)
def test_an_absolute_name_that_no_file_can_have_is_a_verdict(tmp_path, name):
    inputs = input_row(name)
    inputs = inputs.set_column(inputs.schema.get_field_index("file"), "file", pa.array([name]))
    (row,) = measure(inputs, originals(tmp_path), FilterConfig()).to_pylist()
    assert (row["reject_reason"], row["id"]) == (Reject.UNREADABLE, None)
    assert str(tmp_path) not in row["reject_detail"]


def test_an_error_of_the_storage_is_not_a_verdict(tmp_path, monkeypatch):
    """A listed file whose read fails otherwise than by being gone: recorded, it would stay rejected for ever."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "input or output")

    monkeypatch.setattr("pipelines.storage.opened", fail)
    with pytest.raises(OSError, match="input or output"):
        measure(input_row("a.png"), originals(tmp_path), FilterConfig())


def test_a_file_that_went_since_it_was_listed_is_unreadable(tmp_path):
    (row,) = measure(input_row("gone.png"), originals(tmp_path), FilterConfig()).to_pylist()
    assert row["reject_reason"] == Reject.UNREADABLE


def test_a_rejected_row_keeps_what_is_known_about_it(index):
    row = index({"a.png": png(7, 40)}, min_side=8)["a.png"]
    assert (row["original_size"], row["captions"], row["id"] is None) == ([7, 40], ["a caption"], False)
    rows = INDEX_SCHEMA.empty_table().from_pylist([row], INDEX_SCHEMA)
    assert assign_buckets(rows, ((8, 8), (8, 32))).column("bucket").to_pylist() == [[8, 32]]


def test_an_earlier_verdict_stands():
    row = dict.fromkeys(INDEX_SCHEMA.names) | {
        "key": "k",
        "source": "s",
        "path": "a",
        "file_size": 1,
        "reject_reason": "unreadable",
    }
    rows = pa.Table.from_pylist([row | {"reject_detail": "why"}], INDEX_SCHEMA)
    assert apply_filters(rows, FilterConfig()).equals(rows)


def test_several_filters_that_reject_give_one_reason(index):
    assert reasons(index({"a.png": png(2, 40)}, captions="", min_side=8, max_aspect=2)) == {"a.png": Reject.NO_CAPTION}


def verdicts(rows: list[dict]) -> dict[str, tuple]:
    marked = mark_duplicates(pa.Table.from_pylist(rows, VERDICT))
    assert marked.column("path").to_pylist() == [row["path"] for row in rows]
    return {row["path"]: (row["reject_reason"], row["reject_detail"]) for row in marked.to_pylist()}


def row(image: str | None, path: str, reason: str | None = None, detail: str | None = None, source: str = "s") -> dict:
    return {"id": image, "source": source, "path": path, "reject_reason": reason, "reject_detail": detail}


def test_of_equal_images_the_smallest_path_is_kept():
    found = verdicts([row("x", "b"), row("x", "c"), row("x", "a"), row("y", "d")])
    assert found["a"] == found["d"] == (None, None)
    assert found["b"] == found["c"] == (Reject.DUPLICATE, "the same bytes as a")


def test_of_equal_images_in_several_sources_the_first_sources_is_kept():
    rows = [row("x", "a", source="two"), row("x", "b", source="one"), row("x", "c", source="one")]
    marked = mark_duplicates(pa.Table.from_pylist(rows, VERDICT))
    assert marked.column("reject_detail").to_pylist() == ["the same bytes as one:b", None, "the same bytes as b"]


def test_the_verdict_depends_on_the_set_of_rows_alone():
    rows = [
        row("x", "c"),
        row("x", "a"),
        row("x", "b", "duplicate", "old"),
        row("y", "d"),
        row(None, "e", "unreadable"),
    ]
    expected = verdicts(rows)
    assert all(verdicts(list(order)) == expected for order in itertools.permutations(rows))


def test_a_verdict_judged_again_is_the_same():
    draws = random.Random(0)
    rows = [row(draws.choice("xyz"), f"{n:02}", draws.choice([None, None, "too_small"])) for n in range(40)]
    once = mark_duplicates(pa.Table.from_pylist(rows, VERDICT))
    assert mark_duplicates(once).equals(once)
    kept = [r for r in once.to_pylist() if r["reject_reason"] is None]
    assert sorted(r["id"] for r in kept) == ["x", "y", "z"]


def test_a_duplicate_whose_original_is_gone_is_kept_again():
    assert verdicts([row("x", "b", "duplicate", "the same bytes as a")]) == {"b": (None, None)}


def test_a_smaller_path_that_comes_later_takes_the_place():
    found = verdicts([row("x", "b"), row("x", "c", "duplicate", "the same bytes as b"), row("x", "a")])
    assert [found[path][1] for path in "abc"] == [None, "the same bytes as a", "the same bytes as a"]


def test_a_rejected_image_is_nobodys_original():
    found = verdicts([row("x", "a", "no_caption", "why"), row("x", "b"), row("x", "c")])
    assert found == {"a": ("no_caption", "why"), "b": (None, None), "c": ("duplicate", "the same bytes as b")}


def test_unreadable_files_are_not_duplicates_of_each_other():
    rows = [row(None, "a", "unreadable", "1"), row(None, "b", "unreadable", "2")]
    assert verdicts(rows) == {"a": ("unreadable", "1"), "b": ("unreadable", "2")}


def test_no_rows_have_no_duplicates():
    assert mark_duplicates(VERDICT.empty_table()).num_rows == 0


def test_a_dot_that_averages_away_where_a_jpeg_is_reduced_is_no_blank_image(index):
    image = Image.new("RGB", (2304, 2304), (128, 128, 128))
    image.putpixel((1001, 1002), (150, 150, 150))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=100)
    reduced, scale = decode_reduced(buffer.getvalue(), 10**8, (96, 96))
    assert (scale, reduced.getcolors(2)) == (8, [(288 * 288, (128, 128, 128))])
    row = index({"a.jpg": buffer.getvalue()})["a.jpg"]
    assert row["distinct_pixels"] > 1
    assert (row["reject_reason"], row["original_size"]) == (None, [2304, 2304])
