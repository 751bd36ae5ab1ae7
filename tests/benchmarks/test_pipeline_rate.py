"""C10: the stages of the index through Ray Data beside the same functions in a pool of processes.

Both sides take the same units of the same images, with as many processes, and write the same rows. Processes are there
and have imported all before the clock starts. Images are 24 drawn ones of 1 MP under many names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.config import SourceConfig, StageResources
from pipelines.originals import Originals
from pipelines.preprocess.bucket import assign_buckets, bucket_table
from pipelines.preprocess.config import BucketConfig, FilterConfig
from pipelines.preprocess.measure import measure
from pipelines.preprocess.pipeline import INDEX_COMPRESSION
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.preprocess.write import cut, write_units
from pipelines.stages import attempt, dataset_of, tasks
from pipelines.storage import Storage, StorageOptions
from tests.benchmarks.test_decode import photograph
from tests.conftest import LOGICAL_CPUS

SECONDS, UNIT_ROWS, DISTINCT = 60, 64, 24
Stage = Callable[[pa.Table], pa.Table]


def stages(source: SourceConfig, dataset: Storage, tries: Callable[[], int] | None) -> list[Stage]:
    originals = Originals([source], StorageOptions())
    return [
        partial(measure, originals=originals, filters=FilterConfig(), attempt=tries),
        partial(assign_buckets, table=bucket_table(BucketConfig())),
        partial(write_units, dataset=dataset, folder="data/x", compression=INDEX_COMPRESSION),
    ]


def through(functions: list[Stage], unit: pa.Table) -> int:
    for function in functions:
        unit = function(unit)
    return unit.column("rows")[0].as_py()


def rows_of(dataset: Storage) -> list[dict]:
    tables = [dataset.read_table(file.name) for file in dataset.list("data")]
    return pa.concat_tables(tables).sort_by("key").to_pylist()


@pytest.mark.timeout(900)
def test_the_index_through_ray(cluster, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(DISTINCT):
        (images / f"{number}.jpg").write_bytes(photograph(896, 1152, number))
    source = SourceConfig(path=str(images))
    begun = time.perf_counter()
    warm = pa.concat_tables(list_inputs([survey(source, StorageOptions())], StorageOptions()))
    measure(warm, Originals([source], StorageOptions()), FilterConfig())
    each = (time.perf_counter() - begun) / DISTINCT  # threads of one process; several processes share the cores
    for number in range(DISTINCT, int(SECONDS / each)):
        os.link(images / f"{number % DISTINCT}.jpg", images / f"{number}.jpg")
    units = cut(pa.concat_tables(list_inputs([survey(source, StorageOptions())], StorageOptions())), UNIT_ROWS)
    count = sum(unit.num_rows for unit in units)
    sides = {name: Storage(str(tmp_path / name)) for name in ("pool", "ray")}

    def pool_side(units: list[pa.Table]) -> int:
        return sum(pool.map(partial(through, stages(source, sides["pool"], None)), units))

    def ray_side(units: list[pa.Table]) -> int:
        dataset = dataset_of(units)
        for stage in stages(source, sides["ray"], attempt):
            dataset = dataset.map_batches(stage, **tasks(StageResources()))
        return sum(row["rows"] for row in dataset.iter_rows())

    with ProcessPoolExecutor(LOGICAL_CPUS, get_context("spawn")) as pool:
        seconds = {}
        for name, run in (("pool", pool_side), ("ray", ray_side)):
            run(units[:LOGICAL_CPUS])
            begun = time.perf_counter()
            assert run(units) == count
            seconds[name] = time.perf_counter() - begun
    assert rows_of(sides["pool"]) == rows_of(sides["ray"])
    print(f"\nC10: {count:,} images in units of {UNIT_ROWS}, {LOGICAL_CPUS} processes, {os.cpu_count()} cores, one run")
    for name, taken in seconds.items():
        print(f"  {name:<6}{taken:8.1f} s {count / taken:8.1f} images/s {seconds['pool'] / taken:6.2f}")
