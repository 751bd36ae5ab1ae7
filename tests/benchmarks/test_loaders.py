"""The latents loader and writer beside webdataset, MDS, npz files and Hugging Face's datasets, on the same rows.

Rows have the full shape of SDXL at 1024 x 1024. Each side gives batches of the same tensors, ready in memory, in an
order that it shuffles itself; all run in one process, in turns. A peer that is not installed is told as skipped; none
is a dependency. They can be put beside the environment without touching it:

    uv pip install --no-deps --target PEERS webdataset braceexpand datasets dill multiprocess xxhash \
        mosaicml-streaming python-snappy cramjam zstd Brotli catalogue multidict
    PYTHONPATH=PEERS make bench ARGS="-k loaders"
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.preprocess.pipeline import LATENTS_COMPRESSION
from pipelines.preprocess.write import write_rows
from pipelines.schema import SCHEMA_VERSION, Column, DataFile, require_manifest, tensor_array, write_manifest
from pipelines.storage import Storage
from pipelines.train.batches import LatentReader
from pipelines.train.config import BatchConfig
from pipelines.train.plan import Plan
from tests.benchmarks.test_latent_store import SHAPES, table

FILES, FILE_ROWS, BATCH, ROUNDS, RESUMED_AT = 8, 64, 16, 5, 0.9
BUCKET, SHUFFLED = (1024, 1024), 128  # rows that a streaming peer shuffles among
CONDITIONS = (Column.ORIGINAL_SIZE, Column.CROP_TOP_LEFT, Column.TARGET_SIZE)
Sample = dict[str, np.ndarray]
Batch = dict[str, torch.Tensor]


class Ours:
    """Parquet by this project's writer; rows in place, in the order of the plan."""

    name = "ours"

    def __init__(self, folder: Path) -> None:
        self.dataset = Storage(str(folder))

    def write(self, tables: list[pa.Table]) -> None:
        files = [DataFile(name=f"data/x/{n}.parquet", rows=FILE_ROWS, bucket=BUCKET) for n in range(len(tables))]
        for file, rows in zip(files, tables, strict=True):
            write_rows(rows, self.dataset, file.name, LATENTS_COMPRESSION)
        write_manifest(
            self.dataset, files, kind="latents", counts={}, fingerprint={"schema": SCHEMA_VERSION}, parents={}
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        reader = LatentReader(self.dataset, require_manifest(self.dataset, "latents"), seed=0)
        plan = Plan(reader.files, BatchConfig(global_size=BATCH, micro_size=BATCH))
        for step in range(plan.steps_before(epoch) + start, plan.steps_before(epoch + 1)):
            batch = reader.read(plan.step(step).rows, BUCKET, 0)
            conditions = torch.cat([batch.conditions[name] for name in CONDITIONS], 1)
            tensors = (batch.mean, batch.std, batch.context, batch.pooled)
            yield dict(zip(SHAPES, tensors, strict=True)) | {"conditions": conditions}


class WebDataset:
    """Tars of .npy files, shuffled as they stream."""

    name = needs = "webdataset"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tables: list[pa.Table]) -> None:
        import webdataset

        self.folder.mkdir(exist_ok=True)
        for number, rows in enumerate(tables):
            with webdataset.TarWriter(str(self.folder / f"{number:04d}.tar")) as tar:
                for place, sample in enumerate(samples(rows)):
                    fields = {f"{name}.npy": value for name, value in sample.items()}
                    tar.write({"__key__": f"{number:04d}{place:04d}"} | fields)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        import webdataset

        tars = sorted(str(path) for path in self.folder.glob("*.tar"))
        stream = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=epoch).shuffle(SHUFFLED, seed=epoch)
        rest = islice(iter(stream), start * BATCH, None)  # skipped before anything of it is decoded
        decode = webdataset.autodecode.Decoder([])
        decoded = (decode(sample) for sample in rest)
        yield from stacked({name: sample[f"{name}.npy"] for name in (*SHAPES, "conditions")} for sample in decoded)


class Npz:
    """One uncompressed .npz a row, read in a drawn order."""

    name, needs = "npz", "numpy"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tables: list[pa.Table]) -> None:
        self.folder.mkdir(exist_ok=True)
        for number, rows in enumerate(tables):
            for place, sample in enumerate(samples(rows)):
                np.savez(self.folder / f"{number:04d}{place:04d}.npz", **sample)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        files = sorted(self.folder.glob("*.npz"))
        order = np.random.Generator(np.random.PCG64(epoch)).permutation(len(files))[start * BATCH :]
        yield from stacked(dict(np.load(files[place])) for place in order)


class Mds:
    """MosaicML's shards, shuffled by its own sampler."""

    name = needs = "streaming"

    def __init__(self, folder: Path) -> None:
        self.folder, self.dataset = folder, None

    def write(self, tables: list[pa.Table]) -> None:
        from streaming import MDSWriter

        columns = {name: f"ndarray:float16:{','.join(map(str, shape))}" for name, shape in SHAPES.items()}
        columns["conditions"] = "ndarray:float32:6"
        with MDSWriter(out=str(self.folder), columns=columns, exist_ok=True) as shards:
            for rows in tables:
                for sample in samples(rows):
                    shards.write(sample)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        from streaming import StreamingDataset

        if self.dataset is None:  # it counts its epochs itself
            self.dataset = StreamingDataset(local=str(self.folder), shuffle=True, batch_size=BATCH)
        yield from islice(stacked(iter(self.dataset)), start, None)


class HuggingFace:
    """Arrow files with a column of bytes for each tensor, mapped to memory, read in a drawn order."""

    name = needs = "datasets"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tables: list[pa.Table]) -> None:
        import datasets

        datasets.disable_progress_bars()
        columns = [
            {name: [sample[name].tobytes() for sample in samples(rows)] for name in (*SHAPES, "conditions")}
            for rows in tables
        ]
        merged = {name: [value for part in columns for value in part[name]] for name in columns[0]}
        arrow = pa.table({name: pa.array(values, pa.large_binary()) for name, values in merged.items()})
        datasets.Dataset(arrow).save_to_disk(str(self.folder), num_shards=len(tables))

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        import datasets

        dataset = datasets.load_from_disk(str(self.folder)).shuffle(seed=epoch)
        shapes = {name: (np.float16, shape) for name, shape in SHAPES.items()} | {"conditions": (np.float32, (6,))}
        for place in range(start * BATCH, dataset.num_rows, BATCH):
            read = dataset[place : place + BATCH]
            yield {
                name: torch.from_numpy(np.frombuffer(bytearray().join(read[name]), kind).reshape(-1, *shape))
                for name, (kind, shape) in shapes.items()
            }


PEERS = (WebDataset, Npz, Mds, HuggingFace)


def samples(rows: pa.Table) -> Iterator[Sample]:
    tensors = {name: tensor_array(rows, name) for name in SHAPES}
    sizes = np.array(
        [[side for name in CONDITIONS for side in row[name]] for row in rows.select(CONDITIONS).to_pylist()]
    )
    for place in range(rows.num_rows):
        row = {str(name): array[place] for name, array in tensors.items()}
        yield row | {"conditions": sizes[place].astype(np.float32)}


def stacked(rows: Iterator[Sample]) -> Iterator[Batch]:
    while group := list(islice(rows, BATCH)):
        yield {name: torch.from_numpy(np.stack([row[name] for row in group])) for name in (*SHAPES, "conditions")}


def seen(batches: Iterator[Batch]) -> list[bytes]:
    """A digest of each row that came, in ascending order: some of every tensor, and all of its sizes."""
    digests = []
    for batch in batches:
        assert {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in batch.items() if name in SHAPES} == {
            name: (torch.float16, torch.Size(shape)) for name, shape in SHAPES.items()
        }
        parts = [tensor.flatten(1)[:, :: max(1, tensor[0].numel() // 97)] for tensor in batch.values()]
        digests += [b"".join(part[row].numpy().tobytes() for part in parts) for row in range(len(parts[0]))]
    return sorted(digests)


def timed(sides: list, work: Callable, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) of `work` on each side, by round, after one that warms up."""
    found: dict[str, list[tuple[float, float]]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides:
            wall, cpu = time.perf_counter(), time.process_time()
            work(side, number)
            found[side.name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: values[1:] for name, values in found.items()}


def show(title: str, found: dict[str, list[tuple[float, float]]], megabytes: float | None = None) -> None:
    """Prints MB/s, or milliseconds where no size is given: by the clock, by CPU time, and the ratios of both."""
    print(f"\n{title}: by the clock (least to greatest), by CPU time, and how many times better ours is")
    unit = "ms" if megabytes is None else "MB/s"
    medians: dict[str, list[float]] = {}
    for name, rounds in found.items():
        columns = []
        for kind in zip(*rounds, strict=True):
            values = [1000 * taken if megabytes is None else megabytes / taken for taken in kind]
            medians.setdefault(name, []).append(middle := statistics.median(values))
            columns.append(f"{middle:8.1f} {unit} ({min(values):.1f} to {max(values):.1f})".ljust(36))
        for own, theirs in zip(medians["ours"], medians[name], strict=True):
            columns.append(f"{theirs / own if megabytes is None else own / theirs:6.1f}")
        print(f"  {name:<12}{''.join(columns)}")


def test_loaders(tmp_path: Path, subtests: pytest.Subtests) -> None:
    tables = [table(number, FILE_ROWS) for number in range(FILES)]
    megabytes = FILES * FILE_ROWS * 2 * sum(int(np.prod(shape)) for shape in SHAPES.values()) / 1e6
    sides = [Ours(tmp_path / "ours")]
    for peer in PEERS:
        with subtests.test(peer.name):
            pytest.importorskip(peer.needs)
            sides.append(peer(tmp_path / peer.name))
    writers = [side for side in sides if side.name in ("ours", "webdataset", "npz")]
    show("write", timed(writers, lambda side, _: side.write(tables), 3), megabytes)
    for side in sides:
        if side not in writers:
            side.write(tables)

    expected = seen(sides[0].batches(0))
    assert expected == seen(stacked(row for rows in tables for row in samples(rows)))
    assert all(seen(side.batches(0)) == expected for side in sides)

    def epoch(side, number: int) -> None:
        assert sum(len(batch["conditions"]) for batch in side.batches(number)) == FILES * FILE_ROWS

    show("read an epoch, shuffled", timed(sides, epoch, ROUNDS), megabytes)
    start = int(RESUMED_AT * FILES * FILE_ROWS / BATCH)
    streaming = [side for side in sides if side.name in ("ours", "webdataset")]
    show(
        f"first batch after {RESUMED_AT:.0%} of an epoch",
        timed(streaming, lambda side, number: next(side.batches(number, start)), ROUNDS),
    )
