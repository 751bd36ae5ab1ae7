"""Ten times the rows: what listing, committing and planning take on the driver, and what a loader's worker holds.

Each size runs in a process of its own (this file, as a program). Rows are made up, and written by the project's own
writer as a run would have left them; images are named and never opened. Peaks of memory are above what the process has
once all is imported; a step's also holds what the allocator keeps of the steps before it. Beside all that is resident
anonymous memory is told, looked at every few milliseconds: files that are mapped are the kernel's to drop. Where it
says read, a row is as large as a test's: bytes and requests of full rows are the business of test_loaders.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pytest

SIZES = (100_000, 1_000_000)  # rows of the index, and of the latents that are planned
SMALL_FILES = (20_000, 200_000)  # images of a folder, each with a text file
LOADED = (10_000, 100_000)  # rows of the latents that a loader reads from
DUPLICATES = 0.3  # share of rows with the content of another
TABLES, INDEX_FILE_ROWS, LATENTS_FILE_ROWS = 100, 1024, 64
STEPS, GLOBAL_SIZE = 200, 64
TENSORS = {"latent_mean": (4, 2, 2), "latent_std": (4, 2, 2), "context": (2, 4), "pooled": (4,)}  # small: rows count


@pytest.mark.timeout(2400)
def test_the_driver(tmp_path: Path) -> None:
    for rows in SIZES:
        folder = tmp_path / str(rows)
        folder.mkdir()
        run("make_driver", rows, folder)
        show(f"driver, {rows:,} rows", rows, run("driver", rows, folder))
        show(f"driver of the VAE, {rows:,} rows", rows, run("make_images", rows, folder))
        show(f"worker of the VAE, {rows:,} rows", rows, run("images", rows, folder))


@pytest.mark.timeout(1200)
def test_a_loaders_worker(tmp_path: Path) -> None:
    for rows in LOADED:
        run("make_worker", rows, tmp_path / str(rows))
        show(f"worker, {rows:,} rows", rows, run("worker", rows, tmp_path / str(rows)))


@pytest.mark.timeout(2400)
def test_many_small_files(tmp_path: Path) -> None:
    for images in SMALL_FILES:
        run("make_files", images, tmp_path / str(images))
        title = f"driver, a folder of {images:,} images with their captions"
        show(title, images, run("files", images, tmp_path / str(images)))


def run(part: str, rows: int, folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.test_scale", part, str(rows), str(folder)],
        cwd=Path(__file__).parent.parent.parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, rows: int, steps: list[dict[str, Any]]) -> None:
    print(f"\n{title:<52}{'seconds':>9}{'CPU':>9}{'peak MiB':>10}{'anonymous':>11}{'bytes/row':>11}")
    for step in steps:
        peak, own = step["peak"] / 2**20, step["anonymous"] / 2**20
        figures = f"{step['wall']:9.2f}{step['cpu']:9.2f}{peak:10.1f}{own:11.1f}{step['peak'] / rows:11.0f}"
        print(f"  {step['name']:<50}{figures}  {step['note']}")


def memory(field: str) -> int:
    """Bytes of this process: VmRSS, or VmHWM for the most since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class Steps:
    """Measures one step after another."""

    def __init__(self) -> None:
        self.base, self.own = memory("VmRSS"), memory("RssAnon")
        self.found: list[dict[str, Any]] = []

    def __call__(self, name: str, work: Callable[[], Any], note: Callable[[Any], str] = lambda _: "") -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak
        with watched() as seen:
            wall, cpu = time.perf_counter(), time.process_time()
            result = work()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peaks = {"peak": memory("VmHWM") - self.base, "anonymous": max(seen) - self.own}
        self.found.append({"name": name, "wall": wall, "cpu": cpu, "note": note(result), **peaks})
        return result


@contextmanager
def watched() -> Iterator[list[int]]:
    """Anonymous memory of this process, over and over until the block ends; the kernel keeps no peak of it."""
    seen, over = [memory("RssAnon")], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            seen.append(memory("RssAnon"))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def setting(folder: Path) -> dict[str, Any]:
    """What `build_index` is told, but for its filters."""
    from pipelines.config import ColumnsConfig, SourceConfig, StageResources
    from pipelines.preprocess.config import AlertConfig, BucketConfig

    columns = ColumnsConfig(caption="caption")
    return {
        "sources": [SourceConfig(name="images", path=str(folder / "source"), kind="parquet", columns=columns)],
        "buckets": BucketConfig(),
        "rows_per_file": INDEX_FILE_ROWS,
        "resources": StageResources(),
        "alerts": AlertConfig(),
        "begin": lambda: pytest.fail("there is nothing left to do"),
    }


def make_driver(rows: int, folder: Path) -> None:
    """A source, the lists of its tables, and the files of an index and of latents: all but the commits."""
    import pyarrow.parquet as pq

    from pipelines.captions import in_lists
    from pipelines.preprocess.bucket import assign_buckets, bucket_table
    from pipelines.preprocess.sources.listing import NUMBER, list_inputs, write_listings
    from pipelines.preprocess.sources.survey import survey
    from pipelines.preprocess.write import cut, write_units
    from pipelines.schema import INDEX_SCHEMA, Column
    from pipelines.storage import Storage, StorageOptions

    share = rows // TABLES
    (folder / "source").mkdir()
    for number in range(TABLES):
        names = [f"/images/{number * share + row:012d}.jpg" for row in range(share)]
        captions = [f"a caption as they are found beside pictures on the web, number {name}" for name in names]
        pq.write_table(pa.table({"image": names, "caption": captions}), folder / "source" / f"{number:05d}.parquet")
    index, told = Storage(str(folder / "index")), setting(folder)
    surveys = [survey(source, StorageOptions()) for source in told["sources"]]
    write_listings(pa.table({NUMBER: range(TABLES)}), surveys[0].containers, index)
    inputs = pa.concat_tables(list_inputs(surveys, StorageOptions()))
    draws = np.random.Generator(np.random.PCG64(0))
    sides = np.exp(draws.normal(np.log(900), 0.3, (rows, 2))).astype(np.int32)
    contents = np.where(draws.random(rows) < DUPLICATES, draws.integers(0, rows, rows), np.arange(rows))
    made: dict[str, pa.Array | pa.ChunkedArray] = {name: inputs.column(name) for name in inputs.column_names}
    made |= {
        Column.ID: inputs.column(Column.KEY).take(pa.array(contents)),
        Column.CAPTION_REASONS: in_lists(rows, np.arange(rows), pa.nulls(rows, pa.string())),
        Column.ORIGINAL_SIZE: pa.array(list(sides), INDEX_SCHEMA.field(Column.ORIGINAL_SIZE).type),
        Column.FILE_SIZE: pa.array(draws.integers(10_000, 900_000, rows)),
        Column.DISTINCT_PIXELS: pa.array(np.full(rows, 256)),
        Column.CONTRAST: pa.array(draws.uniform(10, 90, rows)),
        Column.PERCEPTUAL_HASH: pa.array(draws.integers(0, 2**64, rows, np.uint64)),
    }
    table = pa.table(
        [made.get(field.name, pa.nulls(rows)).cast(field.type) for field in INDEX_SCHEMA], schema=INDEX_SCHEMA
    )
    table = assign_buckets(table, bucket_table(told["buckets"]))
    for unit in cut(table, INDEX_FILE_ROWS):
        write_units(unit, index, "data/x", "zstd")


@patch("pipelines.preprocess.pipeline._folder", lambda fingerprint: "data/x")
def driver(rows: int, folder: Path) -> list[dict[str, Any]]:
    from pipelines.lease import lease
    from pipelines.preprocess import pipeline
    from pipelines.preprocess.config import FilterConfig
    from pipelines.runs import give_memory_back
    from pipelines.storage import Storage

    give_memory_back()  # as every job does
    index, told, step = Storage(str(folder / "index")), setting(folder), Steps()

    def build(**filters: Any) -> Any:
        with lease(index) as held:
            return pipeline.build_index(held=held, filters=FilterConfig(**filters), **told).manifest

    listing(step, index, told)
    manifest = step("the index job: first commit", build, lambda made: f"{made.counts['kept']:,} kept")
    step("the index job: nothing is new", build)
    step("the index job: another threshold", lambda: build(min_side=500), lambda made: f"{made.counts['kept']:,} kept")
    planning(step, index, manifest, told["sources"])
    step("the index job: near-duplicates", lambda: build(near_duplicate_bits=3), lambda made: str(dict(made.counts)))
    return step.found


def make_images(rows: int, folder: Path) -> list[dict[str, Any]]:
    """The list of a run's images, as the driver writes it before a VAE is trained."""
    from pipelines.config import DriverConfig
    from pipelines.originals import Originals
    from pipelines.runs import Work
    from pipelines.schema import require_manifest
    from pipelines.storage import Storage
    from pipelines.train.listed import list_images

    index, run, step = Storage(str(folder / "index")), Storage(str(folder / "run")), Steps()
    told = (require_manifest(index, "index"), Originals(setting(folder)["sources"], index.options))
    step(
        "list the kept images",
        lambda: list_images(run, index, *told, Work(DriverConfig())),
        lambda _: f"{sum(file.size for file in run.list()) / rows:.0f} bytes a row of the index",
    )
    return step.found


def images(rows: int, folder: Path) -> list[dict[str, Any]]:
    """A worker of the VAE, but for the pixels."""
    from pipelines.originals import Originals
    from pipelines.storage import Storage
    from pipelines.train.config import BatchConfig
    from pipelines.train.listed import ListedImages
    from pipelines.train.plan import Plan

    run, step = Storage(str(folder / "run")), Steps()
    originals = Originals(setting(folder)["sources"], run.options)
    found = step("open the list", lambda: ListedImages(run, originals), lambda found: f"{len(found.files):,} files")
    batch = BatchConfig(global_size=GLOBAL_SIZE, micro_size=GLOBAL_SIZE)
    plan = step("the batch plan", lambda: Plan(found.files, batch))

    def read() -> int:
        with ThreadPoolExecutor(8) as pool:
            return sum(len(found.rows(plan.step(number).rows, pool)) for number in range(STEPS))

    step(f"look up {STEPS} batches of {GLOBAL_SIZE}", read, lambda count: f"{count:,} rows")
    return step.found


def listing(step: Steps, index: Any, told: dict[str, Any]) -> None:
    from pipelines.config import DriverConfig
    from pipelines.preprocess.sources.listing import Inputs
    from pipelines.preprocess.sources.survey import survey
    from pipelines.preprocess.stored import stored, want
    from pipelines.runs import Work
    from pipelines.storage import StorageOptions

    work = Work(DriverConfig())
    surveys = step("survey the source", lambda: [survey(source, StorageOptions()) for source in told["sources"]])
    inputs = Inputs(surveys, index, work.keep)
    wanted = step("list inputs, with their keys", lambda: want(inputs.keys(), work), lambda found: f"{found.count:,}")
    have = step(
        "what is stored, and missing",
        lambda: stored(index, "data/x", wanted, work),
        lambda found: f"{len(found.names):,} files, {found.missing:,} rows missing",
    )
    everything = np.ones(wanted.count, bool)
    step(
        "all inputs, as if they were missing",
        lambda: sum(rows.num_rows for rows in inputs.rows(everything)),
        lambda count: f"{count:,}",
    )
    assert have.missing == 0


def make_files(images: int, folder: Path) -> None:
    """Names of images and of their captions, a thousand in a folder, and nothing in them."""
    for number in range(images):
        parent = folder / f"images/{number // 1000:04}"
        if number % 1000 == 0:
            parent.mkdir(parents=True)
        for suffix in (".jpg", ".txt"):
            (parent / f"{number:08}{suffix}").touch()


def files(images: int, folder: Path) -> list[dict[str, Any]]:
    from pipelines.config import DriverConfig, SourceConfig
    from pipelines.preprocess.sources.listing import Inputs
    from pipelines.preprocess.sources.survey import survey
    from pipelines.preprocess.stored import want
    from pipelines.runs import Work
    from pipelines.storage import Storage, StorageOptions

    step, work, source = Steps(), Work(DriverConfig()), SourceConfig(path=str(folder / "images"))
    surveys = step("list the folder", lambda: [survey(source, StorageOptions())])
    inputs = Inputs(surveys, Storage(str(folder / "index")), work.keep)
    step("list inputs, with their keys", lambda: want(inputs.keys(), work), lambda found: f"{found.count:,}")
    return step.found


def planning(step: Steps, index: Any, manifest: Any, sources: list[Any]) -> None:
    from pipelines.config import DriverConfig
    from pipelines.originals import Originals
    from pipelines.preprocess.bucket import blocks_by_bucket
    from pipelines.preprocess.kept import Kept
    from pipelines.preprocess.stored import stored, want
    from pipelines.runs import Work
    from pipelines.schema import DataFile
    from pipelines.train.config import BatchConfig
    from pipelines.train.plan import Plan

    work, files = Work(DriverConfig()), []
    kept = Kept(index, manifest, 1, Originals(sources, index.options), work)
    wanted = step(
        "kept rows, with the keys of their latents", lambda: want(kept.keys(), work), lambda w: f"{w.count:,}"
    )
    have = stored(index, "data/none", wanted, work)

    def by_bucket() -> int:
        order = {"buckets": manifest.fingerprint["buckets"], "sources": ["images"], "work": work}
        for block in blocks_by_bucket(kept.rows(~have.there), LATENTS_FILE_ROWS, **order):
            name = block.column("unit")[0].as_py()
            height, width = name.split("/")[0].split("x")
            files.append(DataFile(name=name, rows=block.num_rows, bucket=(int(height), int(width))))
        return len(files)

    step("the latents job: blocks of one bucket", by_bucket, lambda count: f"{count:,} blocks")
    batch = BatchConfig(global_size=2048, micro_size=16)
    plan = step("the batch plan of latents", lambda: Plan(files, batch), lambda made: f"{made.steps_before(1)} steps")
    step("its first 20 steps, and 20 at nine tenths", lambda: first_and_late(plan))


def first_and_late(plan: Any) -> None:
    for start in (0, plan.steps_before(1) * 9 // 10):
        for number in range(start, start + 20):
            plan.step(number)


def make_worker(rows: int, folder: Path) -> None:
    """Latents of small tensors in files of 64 rows."""
    from pipelines.captions import in_lists
    from pipelines.latents import OF_CAPTIONS
    from pipelines.preprocess.write import write_rows
    from pipelines.schema import SCHEMA_VERSION, DataFile, latents_schema, tensor_column, write_manifest
    from pipelines.storage import Storage

    dataset = Storage(str(folder / "latents"))
    buckets = [(1024, 1024), (896, 1152), (1152, 896), (832, 1216)]
    schema = latents_schema(TENSORS["latent_mean"], TENSORS["context"], TENSORS["pooled"])

    def write(number: int) -> DataFile:
        bucket, count = buckets[number % len(buckets)], LATENTS_FILE_ROWS
        name = f"data/x/{bucket[0]}x{bucket[1]}/{number:06d}.parquet"
        keys = [f"{number:016x}{row:016x}" for row in range(count)]
        values = {
            **dict.fromkeys(("key", "id"), keys),
            "captions": [[key] for key in keys],
            "caption_weights": [[1.0]] * count,
            **dict.fromkeys(("original_size", "crop_top_left", "target_size"), [bucket] * count),
            "crop": [0] * count,
            "flip": [False] * count,
            "aesthetic_score": [5.0] * count,
        }
        arrays = []
        for field in schema:
            if field.name in TENSORS:
                values[field.name] = tensor_column(np.full((count, *TENSORS[field.name]), number, np.float16))
            if field.name in OF_CAPTIONS:
                values[field.name] = in_lists(count, np.arange(count), values[field.name], field.type)
            arrays.append(pa.array(values[field.name], field.type))
        write_rows(pa.Table.from_arrays(arrays, schema=schema), dataset, name, "none")
        return DataFile(name=name, rows=count, bucket=bucket)

    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(write, range(rows // LATENTS_FILE_ROWS)))
    write_manifest(dataset, files, kind="latents", counts={}, fingerprint={"schema": SCHEMA_VERSION}, parents={})


def worker(rows: int, folder: Path) -> list[dict[str, Any]]:
    from itertools import islice

    from pipelines.schema import require_manifest
    from pipelines.storage import Storage
    from pipelines.train.batches import LatentReader, Slices
    from pipelines.train.config import BatchConfig
    from pipelines.train.plan import Plan

    dataset = Storage(str(folder / "latents"))
    step = Steps()
    manifest = require_manifest(dataset, "latents")
    reader = step(
        "open the dataset",
        lambda: LatentReader(dataset, manifest, seed=0),
        lambda reader: f"{len(reader.files):,} files",
    )
    plan = step(
        "the batch plan", lambda: Plan(reader.files, BatchConfig(global_size=GLOBAL_SIZE, micro_size=GLOBAL_SIZE))
    )

    def read() -> int:
        slices = Slices(reader, plan, rank=0, world=1, step=0)
        return sum(sum(batch.count for batch, _ in part) for part in islice(slices, STEPS))

    step(f"read {STEPS} batches of {GLOBAL_SIZE}", read, lambda count: f"{count:,} rows")
    return step.found


if __name__ == "__main__":
    parts = {
        part.__name__: part
        for part in (make_driver, driver, make_files, files, make_images, images, make_worker, worker)
    }
    print(json.dumps(parts[sys.argv[1]](int(sys.argv[2]), Path(sys.argv[3]))))
