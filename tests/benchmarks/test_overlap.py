"""Does cropping on CPUs go on while the encoder encodes? The stages of the latents job on a real cluster of two cores.

Each call writes down when it began and ended. What counts is the share of the crop stage's seconds that lie inside
those of the encoder, and how long the encoder stood still between its first call and its last.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from ray.cloudpickle import register_pickle_by_value as pickle_by_value

from pipelines.config import CropConfig, DriverConfig, SourceConfig, StageResources, TextWeightsConfig, WeightsConfig
from pipelines.images import content_id
from pipelines.originals import Originals
from pipelines.preprocess.bucket import blocks_by_bucket
from pipelines.preprocess.config import EncodeConfig
from pipelines.preprocess.crop import crop_images, rows_of_crops
from pipelines.preprocess.encode import Encoder
from pipelines.preprocess.write import write_units
from pipelines.runs import Work
from pipelines.schema import INDEX_SCHEMA
from pipelines.stages import actors, dataset_of, tasks
from pipelines.storage import Storage, StorageOptions
from tests.conftest import Cluster

pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import it
IMAGES, SIDE, BUCKET = 96, 1500, (256, 256)


class TimedEncoder(Encoder):
    """The encoder, whose calls are written down."""

    def __init__(self, folder: Path, *given: Any) -> None:
        super().__init__(*given)
        self.folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        return noted("encode", self.folder, super().__call__, rows)


def timed_crop(rows: pa.Table, folder: Path, originals: Originals) -> pa.Table:
    return noted("crop", folder, partial(crop_images, originals=originals, crop=CropConfig(), max_pixels=10**8), rows)


def noted(stage: str, folder: Path, call: Any, rows: pa.Table) -> pa.Table:
    begun = time.time()
    made = call(rows)
    (folder / f"{stage}-{uuid.uuid4().hex}").write_text(json.dumps([begun, time.time()]))
    return made


def index_rows(folder: Path) -> pa.Table:
    draws, rows = np.random.Generator(np.random.PCG64(0)), []
    for number in range(IMAGES):
        path = folder / f"{number}.jpg"
        Image.fromarray(draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path, quality=90)
        known = {"key": f"{number:04}", "id": content_id(path.read_bytes()), "source": "source", "path": path.name}
        told = {"captions": [f"caption {number}"], "caption_weights": [1.0], "bucket": list(BUCKET)}
        rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known | told | {"original_size": [SIDE] * 2, "file_size": 1})
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def test_cropping_goes_on_while_the_encoder_encodes(cluster: Cluster, tmp_path: Path) -> None:
    images, notes = tmp_path / "images", tmp_path / "notes"
    images.mkdir()
    notes.mkdir()
    originals = Originals([SourceConfig(path=str(images))], StorageOptions())
    order = {"buckets": [BUCKET], "sources": ["source"], "work": Work(DriverConfig())}
    blocks = list(blocks_by_bucket([rows_of_crops(index_rows(images), 1)], 8, **order))
    weights = WeightsConfig(preset="tiny", seed=1), TextWeightsConfig(preset="tiny", seed=2)
    given = (notes, *weights, EncodeConfig(batch=8), StorageOptions())
    write = partial(write_units, dataset=Storage(str(tmp_path / "latents")), folder="data/x", compression="none")
    stages = (
        dataset_of(blocks)
        .map_batches(partial(timed_crop, folder=notes, originals=originals), **tasks(StageResources()))
        .map_batches(TimedEncoder, fn_constructor_args=given, **actors(StageResources()))
        .map_batches(write, **tasks(StageResources()))
    )
    assert sum(unit["rows"] for unit in stages.iter_rows()) == IMAGES
    found = {
        stage: sorted(json.loads(path.read_text()) for path in notes.glob(f"{stage}-*")) for stage in ("crop", "encode")
    }
    crop, encode = (sum(end - begun for begun, end in found[stage]) for stage in found)
    pairs = product(found["crop"], found["encode"])
    both = sum(max(0.0, min(one[1], other[1]) - max(one[0], other[0])) for one, other in pairs)
    after = [end - begun for begun, end in found["crop"] if begun > found["encode"][0][0]]
    still = found["encode"][-1][1] - found["encode"][0][0] - encode
    print(f"\n{len(blocks)} blocks of 8 images: cropping took {crop:.1f} s of tasks, encoding {encode:.1f} s")
    print(f"  {both:.1f} s of cropping while the encoder encoded, of {sum(after):.1f} s after its first call began")
    print(f"  from its first call to its last the encoder stood still for {still:.1f} s")
