"""The latent store at full SDXL shape: our writer and loader beside a copy in memory and beside plain Parquet.

Sides take turns in one process. Each line gives the median of the rounds, and their minimum and maximum.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.captions import in_lists
from pipelines.config import Size
from pipelines.latents import OF_CAPTIONS
from pipelines.preprocess.pipeline import LATENTS_COMPRESSION
from pipelines.preprocess.write import write_rows
from pipelines.schema import SCHEMA_VERSION, Column, DataFile, latents_schema, tensor_column, write_manifest
from pipelines.storage import Storage
from pipelines.train.batches import LatentReader

ROWS, FILE_ROWS, BATCH, ROUNDS = 256, 64, 16, 5
Shapes = Mapping[Column, tuple[int, ...]]
SHAPES = {
    Column.LATENT_MEAN: (4, 128, 128),
    Column.LATENT_STD: (4, 128, 128),
    Column.CONTEXT: (77, 2048),
    Column.POOLED: (1280,),
}


def tensors_of(number: int, rows: int, shapes: Shapes = SHAPES) -> dict[Column, np.ndarray]:
    draws = np.random.Generator(np.random.PCG64(number))
    return {name: draws.standard_normal((rows, *shape), np.float32) for name, shape in shapes.items()}


def table(number: int, rows: int, shapes: Shapes = SHAPES, bucket: Size = (1024, 1024)) -> pa.Table:
    """The `number`-th file of `rows` latents."""
    pairs = [list(bucket)] * rows
    values = {
        Column.KEY: [f"{number}-{row}" for row in range(rows)],
        Column.ID: [f"{number}-{row}" for row in range(rows)],
        Column.CAPTIONS: [["a caption"]] * rows,
        Column.CAPTION_WEIGHTS: [[1.0]] * rows,
        Column.ORIGINAL_SIZE: pairs,
        Column.CROP: [0] * rows,
        Column.CROP_TOP_LEFT: [[0, 0]] * rows,
        Column.TARGET_SIZE: pairs,
        Column.FLIP: [False] * rows,
        Column.AESTHETIC_SCORE: [5.0] * rows,
    }
    tensors = tensors_of(number, rows, shapes)
    schema = latents_schema(shapes[Column.LATENT_MEAN], shapes[Column.CONTEXT], shapes[Column.POOLED])
    places = np.arange(rows)
    columns = {name: tensor_column(array) for name, array in tensors.items()}
    for name in columns.keys() & OF_CAPTIONS:
        columns[name] = in_lists(rows, places, columns[name], schema.field(name).type)
    arrays = [
        columns[field.name] if field.name in columns else pa.array(values[field.name], field.type) for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def rates(sides: dict[str, Callable[[], None]], megabytes: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, run in sides.items():
            begun = time.perf_counter()
            run()
            found[name].append(megabytes / (time.perf_counter() - begun))
    return {name: values[1:] for name, values in found.items()}  # the first round warms up


def show(title: str, found: dict[str, list[float]], unit: str) -> None:
    print(f"\n{title}")
    for name, values in found.items():
        print(f"  {name:<44} {statistics.median(values):8.0f} {unit}  ({min(values):.0f} to {max(values):.0f})")


def test_write_and_read(tmp_path: Path) -> None:
    tables = [table(number, FILE_ROWS) for number in range(ROWS // FILE_ROWS)]
    row_bytes = 2 * sum(int(np.prod(shape)) for shape in SHAPES.values())
    megabytes = ROWS * row_bytes / 1e6
    dataset = Storage(str(tmp_path / "latents"))
    names = [f"data/x/1024x1024/{number}.parquet" for number in range(len(tables))]

    def write() -> None:
        for name, rows in zip(names, tables, strict=True):
            write_rows(rows, dataset, name, LATENTS_COMPRESSION)

    wide = [
        pa.table(
            {name: pa.FixedSizeListArray.from_arrays(array.ravel(), array[0].size) for name, array in tensors.items()}
        )
        for tensors in (tensors_of(number, FILE_ROWS) for number in range(len(tables)))
    ]

    def write_wide() -> None:
        for number, rows in enumerate(wide):
            pq.write_table(rows, tmp_path / f"{number}.parquet")

    show(
        "write",
        rates({"ours, fp16 bytes, flushed to disk": write, "fp32 lists, Parquet defaults": write_wide}, megabytes),
        "MB/s of fp16",
    )
    files = [DataFile(name=name, rows=FILE_ROWS, bucket=(1024, 1024)) for name in names]
    manifest = write_manifest(
        dataset, files, kind="latents", counts={}, fingerprint={"schema": SCHEMA_VERSION}, parents={}
    )
    order = [
        np.array([[file, row + k] for k in range(BATCH)])
        for file in range(len(files))
        for row in range(0, FILE_ROWS, BATCH)
    ]

    def load() -> None:
        reader = LatentReader(dataset, manifest, seed=0)
        for rows in order:
            reader.read(rows, (1024, 1024), 0)

    reader = LatentReader(dataset, manifest, seed=0)
    for rows in order:
        batch = reader.read(rows, (1024, 1024), 0)
        file, row = rows[0]
        (written,) = tables[file].column(Column.CONTEXT)[row].as_py()
        assert batch.context[0].numpy().tobytes() == written

    def load_wide() -> None:
        for number in range(len(wide)):
            rows = pq.read_table(tmp_path / f"{number}.parquet")
            for name, shape in SHAPES.items():
                rows.column(name).combine_chunks().flatten().to_numpy().reshape(FILE_ROWS, *shape).copy()

    source = np.zeros(ROWS * row_bytes, np.uint8)

    def copy() -> None:
        source.copy()

    show(
        "read to batches of tensors",
        rates({"ours, fp16 tensors, rows in place": load, "fp32 lists": load_wide, "copy in memory": copy}, megabytes),
        "MB/s of fp16",
    )
    ours = sum(file.size for file in dataset.list("data"))
    theirs = sum((tmp_path / f"{number}.parquet").stat().st_size for number in range(len(wide)))
    print(f"\nbytes on disk per row: ours {ours / ROWS:.0f}, fp32 lists {theirs / ROWS:.0f}, ratio {ours / theirs:.2f}")
