"""Sources that hold many images in a file, for tests: how they are written, and what is listed of them."""

import io
import json
import random
import tarfile

import pyarrow as pa

from pipelines.config import ColumnsConfig, SourceConfig
from pipelines.originals import Originals
from pipelines.preprocess.sources.inputs import INPUT_SCHEMA
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.storage import StorageOptions

OPTIONS = StorageOptions()


def source(path, kind: str = "auto", name: str = "source", **columns) -> SourceConfig:
    return SourceConfig(name=name, path=str(path), kind=kind, columns=ColumnsConfig(**columns))


def inputs(*sources: SourceConfig) -> pa.Table:
    table = pa.concat_tables(list_inputs([survey(one, OPTIONS) for one in sources], OPTIONS))
    assert table.schema == INPUT_SCHEMA
    keys = table.column("key").to_pylist()
    assert len(set(keys)) == len(keys)
    return table


def caption_of(row: dict) -> str | None:
    """The caption of an image that has no more than one."""
    (caption,) = row["captions"] or [None]
    return caption


def listed(config: SourceConfig) -> list[tuple]:
    """(path, caption, the image's bytes or the problem) of each input."""
    originals = Originals([config], OPTIONS)
    rows = inputs(config).to_pylist()
    return [(row["path"], caption_of(row), row["problem"] or originals.read(row)) for row in rows]


def contents(count: int, seed: int = 0) -> list[bytes]:
    """Bytes that do not compress, as images, in sizes around those of a page and of a block of snappy."""
    draws = random.Random(seed)
    return [draws.randbytes(draws.choice([0, 1, 40, 1_000, 65_535, 65_536, 70_000, 200_000])) for _ in range(count)]


def write_tar(path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: str, image: bytes, **told) -> list[tuple[str, bytes]]:
    """A sample as img2dataset writes it."""
    fields = {"key": key, "status": "success", "width": 9, "similarity": float("nan")} | told
    return [
        (f"{key}.jpg", image),
        (f"{key}.txt", str(told.get("caption", "")).encode()),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def weighed(config: SourceConfig) -> list[dict[str, float]]:
    return [dict(zip(row["captions"], row["caption_weights"], strict=True)) for row in inputs(config).to_pylist()]


def save_dataset(folder, table: pa.Table, files: int = 2, stale: bool = False) -> None:
    """As `datasets.Dataset.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05}-of-{files:05}.arrow" for n in range(files)]
    rows = -(-table.num_rows // files)
    for number, name in enumerate(names):
        part = table.slice(number * rows, rows)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            for batch in part.to_batches(max_chunksize=3):
                writer.write_batch(batch)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    if stale:
        (folder / "data-00000-of-00009.arrow").write_bytes(b"of an earlier save")
