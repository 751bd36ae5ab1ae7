"""The report: what it says is what the index holds, nothing in it runs, and it names no place."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.preprocess.charts import columns, funnel, heat_map, percent, short
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.latents_report import write_latents_report
from pipelines.preprocess.measure import looks
from pipelines.preprocess.report import REPORT, write_report
from pipelines.preprocess.summary import MOST_WORDS, summarize
from pipelines.preprocess.write import write_rows
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, DataFile, Manifest, write_manifest
from pipelines.storage import Storage
from tests.pipelines.test_verdicts import decided

TIMES = {"rows": 9, "seconds": 2.0, "stages": {"measure": 3.0, "write": 0.5}}
SCRIPT = "<script>alert('x')</script> & \"quoted\""


def scene(seed: int, height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


class Dataset:
    """An index in two files, and its pictures."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], bits: int | None = None) -> None:
        self.index, self.images = Storage(str(folder / "index")), Storage(str(folder / "images"))
        blank = dict.fromkeys(INDEX_SCHEMA.names) | {"source": "photos", "file_size": 1}
        blank |= {"captions": ["two words"], "caption_weights": [1.0]}
        rows = [blank | {"key": f"{n:03}", "path": f"{n:03}.png", "id": f"{n:03}"} | row for n, row in enumerate(rows)]
        judged = decided(pa.Table.from_pylist(rows, INDEX_SCHEMA), FilterConfig(near_duplicate_bits=bits))
        names = ["data/x/a.parquet", "data/x/b.parquet"]
        files = [DataFile(name=name, rows=len(range(part, len(rows), 2))) for part, name in enumerate(names)]
        for part, name in enumerate(names):
            write_rows(judged.take(pa.array(range(part, len(rows), 2), pa.int64())), self.index, name, "zstd")
        self.manifest: Manifest = write_manifest(
            self.index,
            files,
            kind="index",
            counts={},
            fingerprint={"schema": SCHEMA_VERSION, "buckets": [[64, 256], [128, 128], [256, 64]]},
            parents={},
        )
        self.reads = 0

    def write(self, times: dict[str, Any] | None = None) -> str:
        def read(row: dict[str, Any]) -> bytes:
            self.reads += 1
            return self.images.read(row["path"])

        return write_report(self.index, self.manifest, times, read)


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Kept pictures of two buckets, an exact and a near duplicate, and one row of each of some other reasons."""
    (tmp_path / "images").mkdir()
    pictures = [scene(n, *size) for n, size in enumerate([(100, 100), (150, 150), (80, 200), (300, 80)])]
    pictures += [pictures[0], pictures[1].resize((90, 90))]
    rows: list[dict[str, Any]] = []
    for number, image in enumerate(pictures):
        image.save(tmp_path / "images" / f"{number:03}.png")
        size = [image.height, image.width]
        bucket = [128, 128] if size[0] == size[1] else [64, 256] if size[0] < size[1] else [256, 64]
        rows.append({"original_size": size, "bucket": bucket, **looks(image)})
    rows[4]["id"] = "000"
    rows[5]["source"] = "others"
    rows[2]["captions"] = [SCRIPT]
    rows.append({"original_size": [20, 20], "bucket": [128, 128], "captions": [""], "distinct_pixels": 9})
    rows.append({"id": None, "reject_reason": "unreadable", "reject_detail": f"cut short {SCRIPT}"})
    rows.append({"original_size": [20, 20], "bucket": [128, 128], "distinct_pixels": 1})
    return Dataset(tmp_path, rows, bits=4)


def test_the_numbers_are_those_of_the_index(dataset):
    summary = summarize(dataset.index, dataset.manifest, examples=2)
    assert summary.reasons == {
        "kept": 4,
        "duplicate": 1,
        "near_duplicate": 1,
        "no_caption": 1,
        "unreadable": 1,
        "blank": 1,
    }
    assert summary.buckets == {(128, 128): 2, (64, 256): 1, (256, 64): 1}
    assert (int(summary.sizes.sum()), summary.small, summary.side) == (8, 7, 128)
    # 80 x 200 becomes 102.4 x 256, of which 64 rows stay; 300 x 80 becomes 256 x 68.27, of which 64 columns stay
    assert summary.kept_share_sum == pytest.approx(1 + 1 + 64 / 102.4 + 64 / (80 * 256 / 300))
    assert summary.square_share_sum == pytest.approx(2 + 80 / 200 + 80 / 300)
    assert summary.enlarged == 2
    assert summary.words.tolist()[:8] == [0, 0, 3, 1, 0, 0, 0, 0]
    assert len(summary.words) == MOST_WORDS + 1
    assert [row["key"] for row in summary.examples["kept"]] == ["000", "001"]
    found = {(rejected["path"], original["path"]) for rejected, original in summary.pairs}
    assert found == {("004.png", "000.png"), ("005.png", "001.png")}


class Texts(HTMLParser):
    """Tags and texts of a page, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_shows_the_pictures_runs_nothing_and_loads_nothing(dataset, tmp_path):
    html = dataset.write(TIMES)
    seen = Texts(html)
    assert {"html", "svg", "table", "figure", "img"} <= set(seen.tags)
    assert "script" not in seen.tags
    assert SCRIPT in seen.texts
    assert any(SCRIPT in text and text.startswith("cut short") for text in seen.texts)
    assert seen.tags.count("img") == len(seen.addresses) >= 6
    assert all(address.startswith("data:image/jpeg;base64,") for address in seen.addresses)
    assert not re.search(r"(?:https?|s3|file):", html)
    assert str(tmp_path) not in html
    assert "the same bytes as 000.png" in seen.texts
    assert any(text.endswith(" of 64 bits from photos:001.png") for text in seen.texts)
    assert {"measure", "3.0", "write", "18.0"} <= set(seen.texts)  # 9 rows in 0.5 s


def test_an_unchanged_index_is_not_read_again_and_a_changed_one_is(dataset, tmp_path):
    html = dataset.write(TIMES)
    reads = dataset.reads
    assert dataset.write() == html == dataset.index.read(REPORT).decode()
    assert dataset.reads == reads
    other = Dataset(tmp_path, [{"original_size": [9, 9], "bucket": [128, 128], "path": "000.png"}])
    changed = other.write()
    assert other.manifest.digest in changed
    assert "measure" in Texts(changed).texts  # the times of the run before stay


def test_a_picture_that_is_gone_or_too_large_is_said_to_be_none(tmp_path):
    sizes = [[9, 9], [10_000, 6_000]]
    dataset = Dataset(tmp_path, [{"original_size": size, "bucket": [128, 128]} for size in sizes])
    assert Texts(dataset.write()).texts.count("no picture") == 2
    assert dataset.reads == 1  # one whose header says that it is huge is not even read


@pytest.mark.parametrize("rows", [[], [{"id": None, "reject_reason": "unreadable", "reject_detail": "x"}]])
def test_an_index_without_a_kept_row_has_a_report(tmp_path, rows):
    assert "Index report" in Dataset(tmp_path, rows).write()


def test_latents_have_a_page_of_their_own(tmp_path):
    latents = Storage(str(tmp_path))
    fingerprint = {"schema": SCHEMA_VERSION, "buckets": [[64, 256], [128, 128]], "dtype": "bfloat16"}
    content = {"fingerprint": fingerprint, "parents": {}, "failed": {f"photos:{SCRIPT}": f"not finite {SCRIPT}"}}
    manifest = write_manifest(latents, [], kind="latents", counts={"128x128": 3}, **content)
    seen = Texts(write_latents_report(latents, manifest, {"rows": 3, "seconds": 2.0, "stages": {"encode": 1.5}}))
    assert {"128 x 128: 3", "64 x 256: 0", "1 of 2", "bfloat16", "encode", "2.0"} <= set(seen.texts)
    assert {f"photos:{SCRIPT}", f"not finite {SCRIPT}"} <= set(seen.texts)
    assert "script" not in seen.tags
    assert write_latents_report(latents, manifest, None) == latents.read(REPORT).decode()


def test_charts_scale_to_what_they_show():
    assert [short(n) for n in (0, 9_999, 12_345, 3_400_000, 2.5e9)] == ["0", "9,999", "12.3k", "3.4M", "2.5G"]
    assert (percent(1, 8), percent(1, 0)) == ("12.5%", "none")
    widths = [
        float(width) for width in re.findall(r'width="([\d.]+)" height="20.0"', funnel([("a", 8, 0), ("b", 6, 2)]))
    ]
    assert widths[1] + widths[2] == pytest.approx(widths[0])
    assert widths[1] / widths[0] == pytest.approx(6 / 8, abs=0.001)
    heights = [float(h) for h in re.findall(r'height="([\d.]+)" fill', columns(["a", "b"], [1, 4], axis=""))]
    assert heights[1] == pytest.approx(4 * heights[0])
    counts = np.zeros((8, 8), int)
    counts[2, 5] = 3
    assert "3 of height 4 to 8, width 32 to 64" in heat_map(counts, [2.0**n for n in range(9)], mark=16)
