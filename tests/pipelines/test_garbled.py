"""Captions of which bytes are no text: images are kept with what can be read of them, and counted in the index."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from jobs.preprocess import _describe
from pipelines.config import ColumnsConfig, SourceConfig, StageResources
from pipelines.lease import lease
from pipelines.originals import Originals
from pipelines.preprocess.config import AlertConfig, BucketConfig, FilterConfig
from pipelines.preprocess.pipeline import build_index
from pipelines.preprocess.report import write_report
from pipelines.schema import Manifest, data_files
from pipelines.storage import Storage, StorageOptions
from tests.in_process import without_ray

WORDS = "ein grüner Käse"
LATIN = WORDS.encode("latin-1")


def png(number: int, side: int = 16) -> bytes:
    image = Image.new("RGB", (side, side), (number, 0, 0))
    image.putpixel((0, 0), (255, 255, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sources(tmp_path) -> list[SourceConfig]:
    """A folder and a tar of pictures with captions in several encodings."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (name, text) in enumerate(
        {"latin": LATIN, "utf8": WORDS.encode(), "wide": WORDS.encode("utf-16")}.items()
    ):
        (folder / f"{name}.png").write_bytes(png(number))
        (folder / f"{name}.txt").write_bytes(text)
    (folder / "small.png").write_bytes(png(9, side=8))
    (folder / "small.txt").write_bytes(LATIN)
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for name, data in {"one.png": png(5), "one.txt": LATIN, "two.png": png(6), "two.txt": WORDS.encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    columns = ColumnsConfig(caption="caption")
    tars = SourceConfig(name="tars", path=str(tmp_path / "tars"), columns=columns)
    return [SourceConfig(name="images", path=str(folder)), tars]


def test_captions_that_are_no_utf8_are_kept_and_counted(sources, tmp_path, monkeypatch):
    without_ray(monkeypatch)
    index = Storage(str(tmp_path / "index"))

    def build() -> Manifest:
        with lease(index) as held:
            return build_index(
                sources=sources,
                filters=FilterConfig(min_side=10),
                buckets=BucketConfig(resolution=64, multiple=8),
                held=held,
                rows_per_file=2,
                resources=StageResources(),
                alerts=AlertConfig(),
                begin=lambda: None,
            ).manifest

    def report(manifest: Manifest) -> str:
        return write_report(index, manifest, None, Originals(sources, StorageOptions()).read)

    manifest = build()
    rows = [row for file in data_files(index, manifest) for row in index.read_table(file.name).to_pylist()]
    told = {row["path"]: row["captions"] for row in rows}
    assert told["latin.png"] == told["a.tar/one.png"] == ["ein gr\ufffdner K\ufffdse"]
    assert told["utf8.png"] == told["wide.png"] == told["a.tar/two.png"] == [WORDS]
    assert manifest.facts["garbled_captions"] == 3
    assert _describe(manifest) == "6 rows (5 kept, 1 too_small), captions of 3 images are not UTF-8"
    said = "Captions of 3 images, kept or not, have bytes that are no UTF-8"
    assert said in report(manifest)
    assert all(name in report(manifest).partition(said)[2][:200] for name in ("images:latin.png", "tars:a.tar/one.png"))
    (Path(sources[0].path) / "one.heic").touch()
    manifest = build()
    assert manifest.facts["files_passed_over"] == {".heic": 1}
    assert _describe(manifest).endswith("are not UTF-8; files passed over for their suffix: 1 .heic")
    assert "files passed over for their suffix: 1 .heic" in report(manifest)
    for name in ("latin", "small"):
        (Path(sources[0].path) / f"{name}.txt").write_text(WORDS)
    assert build().facts["garbled_captions"] == 1
    del sources[1]
    manifest = build()
    assert "garbled_captions" not in manifest.facts
    assert _describe(manifest).startswith("4 rows (3 kept, 1 too_small); files passed over")
    assert "UTF-8" not in report(manifest)
