"""Sources of every kind in one index, through Ray; what is kept is cropped and trained on from where it lies."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import (
    ColumnsConfig,
    CropConfig,
    DriverConfig,
    SourceConfig,
    StageResources,
    TextWeightsConfig,
    WeightsConfig,
)
from pipelines.lease import lease
from pipelines.originals import Originals
from pipelines.preprocess.config import AlertConfig, BucketConfig, EncodeConfig, FilterConfig, ScoreLimits
from pipelines.preprocess.crop import crop_images, rows_of_crops
from pipelines.preprocess.pipeline import Outcome, build_index, build_latents
from pipelines.preprocess.write import FAILURE
from pipelines.runs import Work
from pipelines.schema import data_files
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import ImageReader, LatentReader
from pipelines.train.listed import list_images
from tests.conftest import Cluster
from tests.containers import sample, save_dataset, write_tar
from tests.reference import kept_rows

KEPT = 9
MAX_PIXELS = 10_000


def picture(number: int) -> bytes:
    draws = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def sources(tmp_path) -> list[SourceConfig]:
    """Nine pictures that are kept; a duplicate, a broken tar, a picture with a watermark, a row without one."""
    (tmp_path / "folder").mkdir()
    for number in (0, 1):
        (tmp_path / f"folder/{number}.png").write_bytes(picture(number))
        (tmp_path / f"folder/{number}.txt").write_text(f"caption {number}")
    tar = [sample(str(n), picture(n), caption=f"caption {n}", pwatermark=0.9 if n == 4 else 0.1) for n in (2, 3, 4)]
    write_tar(tmp_path / "tars/0.tar", [member for members in tar for member in members])
    (tmp_path / "tars/1.tar").write_bytes((tmp_path / "tars/0.tar").read_bytes()[:700])
    (tmp_path / "tables").mkdir()
    table = {"jpg": [picture(n) for n in (5, 6, 0)] + [None], "caption": [f"caption {n}" for n in (5, 6, 0, 9)]}
    pq.write_table(pa.table(table), tmp_path / "tables/t.parquet")
    texts = [["caption 7"], ["caption 8", "another of 8", "far too long a caption of 8"], ["caption 10", None]]
    saved = {"image": [picture(n) for n in (7, 8, 10)], "text": texts, "odds": [[1], [3, 1, 4], None]}
    save_dataset(tmp_path / "saved", pa.table(saved))
    watermark = ColumnsConfig(scores={"watermark": "pwatermark"})
    columns = {"tars": watermark, "saved": ColumnsConfig(caption="text", caption_weights="odds")}
    return [
        SourceConfig(
            name=name,
            path=str(tmp_path / name),
            columns=columns.get(name, ColumnsConfig()),
            weight=2.0 if name == "tables" else 1.0,
        )
        for name in ("folder", "tars", "tables", "saved")
    ]


def test_every_kind_of_source_becomes_one_index_that_later_stages_read_by(cluster: Cluster, sources, tmp_path) -> None:
    dataset = Storage(str(tmp_path / "index"))

    def run() -> Outcome:
        with lease(dataset) as held:
            return build_index(
                sources=sources,
                filters=FilterConfig(scores={"watermark": ScoreLimits(max=0.5)}, max_caption_characters=20),
                buckets=BucketConfig(resolution=32, table="square", multiple=8),
                held=held,
                rows_per_file=8,
                resources=StageResources(),
                alerts=AlertConfig(),
                begin=lambda: None,
            )

    first = run()
    assert first.manifest.counts == {"kept": KEPT, "duplicate": 1, "high_score": 1, "unreadable": 2}
    assert first.manifest.facts == {"captions": {"kept": KEPT + 1, "long_caption": 1}}
    listings = {file.name: file.modified_us for file in dataset.list("listings")}
    assert len(listings) == 5
    again = run()
    assert (again.done, again.manifest.digest) == (0, first.manifest.digest)
    assert {file.name: file.modified_us for file in dataset.list("listings")} == listings

    kept = kept_rows(dataset, first.manifest)
    originals, crop = Originals(sources, StorageOptions()), CropConfig()
    expected = {f"caption {n}": picture(n) for n in (0, 1, 2, 3, 5, 6, 7, 8, 10)}
    assert {row["captions"][0]: originals.read(row) for row in kept.to_pylist()} == expected
    (several,) = [row for row in kept.to_pylist() if len(row["captions"]) > 1]
    assert (several["captions"], several["caption_weights"]) == (["caption 8", "another of 8"], [0.75, 0.25])
    cropped = crop_images(rows_of_crops(kept, 1), originals, crop, MAX_PIXELS)
    assert cropped.column(FAILURE).null_count == KEPT
    list_images(output := Storage(str(tmp_path / "run")), dataset, first.manifest, originals, Work(DriverConfig()))
    reader = ImageReader(output, originals, crop, MAX_PIXELS)
    assert [(file.rows, file.weight) for file in reader.files] == [(2, 1.0), (3, 1.0), (2, 2.0), (2, 1.0)]  # by source
    rows = np.array([[number, row] for number, file in enumerate(reader.files) for row in range(file.rows)])
    assert reader.read(rows, (32, 32), first=0).image.shape == (KEPT, 3, 32, 32)
    assert sorted(reader.names(rows))[:3] == ["folder:0.png", "folder:1.png", "saved:data-00000-of-00002.arrow#0"]

    latents_of_two_crops(dataset, sources, tmp_path)
    write_tar(tmp_path / "tars/1.tar", sample("11", picture(11), caption="caption 11", pwatermark=0.1))
    later = run()
    assert (later.done, later.manifest.counts["kept"], later.manifest.counts["unreadable"]) == (1, KEPT + 1, 1)
    assert len(listings.keys() & {file.name for file in dataset.list("listings")}) == 4
    pq.write_table(pa.table({"jpg": [picture(12)]}), tmp_path / "tables/without.parquet")
    with pytest.raises(ValueError, match=r"^\S*without.parquet: source.columns.caption is 'caption'") as error:
        run()
    assert "Traceback" not in str(error.value)


def latents_of_two_crops(index: Storage, sources: list[SourceConfig], folder: Path) -> None:
    """Two crops of each image but of one, which changes after it was indexed: counted in, out, and between."""
    dataset, changing = Storage(str(folder / "latents")), folder / "folder/1.png"
    before, data = changing.stat(), changing.read_bytes()

    def run() -> Outcome:
        with lease(dataset) as held:
            return build_latents(
                vae=WeightsConfig(preset="tiny", seed=1),
                text=TextWeightsConfig(preset="tiny", seed=2),
                crop=CropConfig(flip_chance=0.5),
                encode=EncodeConfig(crops=2, rows_per_file=8, batch=8),
                max_pixels=MAX_PIXELS,
                sources=sources,
                index=index,
                held=held,
                resources=StageResources(),
                begin=lambda: None,
            )

    changing.write_bytes(b"changed")
    first = run()
    assert (first.done, first.manifest.rows) == (2 * KEPT - 2, 2 * KEPT - 2)
    assert set(first.manifest.failed) == {"folder:1.png", "folder:1.png, crop 1"}
    # Blocks of 8, 8 and 2 rows of all sources; of the ten captions the nine of other images, once each.
    assert first.told.counts == {"vae_slots": 24, "vae_slots_filled": 16, "captions": 18, "captions_encoded": 9}
    changing.write_bytes(data)
    os.utime(changing, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = run()
    assert (second.done, second.manifest.rows, dict(second.manifest.failed)) == (2, 2 * KEPT, {})
    assert {file.weight for file in data_files(dataset, second.manifest)} == {1.0, 2.0}
    reader = LatentReader(dataset, second.manifest, seed=0)
    rows = np.array([[number, row] for number, file in enumerate(reader.files) for row in range(file.rows)])
    assert len(set(reader.names(rows))) == 2 * KEPT
    seen = {batch.tobytes() for first in range(20) for batch in reader.read(rows, (32, 32), first).pooled.numpy()}
    assert len(seen) == KEPT + 1
