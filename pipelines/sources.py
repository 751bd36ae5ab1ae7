"""Where weights lie, and how they come to this machine: files, runs' output folders and diffusers folders."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from model.publish import SCHEDULER as SCHEDULER_FILE
from model.tensors import PICKLES, SAFETENSORS, read_metadata, weight_files
from model.weights import CONFIG, PIPELINE
from pipelines.checkpoints import newest_checkpoint
from pipelines.storage import Storage, StorageOptions, naming_full_disk

WEIGHTS_FILE = "weights.safetensors"  # what a training run's output folder offers
COPY_BYTES = 64 * 2**20  # per read of a file that is copied


@dataclass(frozen=True)
class Source:
    """One network's weights: one file, or the files of a model folder, which has a config.json."""

    storage: Storage
    names: tuple[str, ...]

    @property
    def is_folder(self) -> bool:
        """Whether it is a model folder of diffusers or transformers."""
        return CONFIG in self.names

    def metadata(self) -> dict[str, str]:
        """A safetensors file's metadata, of which an s3:// file's beginning is read; of others, none."""
        name = self.names[0]
        if self.is_folder or not name.endswith(SAFETENSORS):
            return {}
        if self.storage.is_local:
            return read_metadata(self.storage.path(name))
        with self.storage.filesystem.open_input_stream(self.storage.path(name)) as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little"))
        return json.loads(header).get("__metadata__", {})


def find(path: str, part: str, options: StorageOptions, allow_pickle: bool = False) -> Source:
    """The weights of `part` ("unet", "vae", "text_encoder", "text_encoder_2") at a file or folder.

    Raises FileNotFoundError where there are none.
    """
    where = path.rstrip("/")
    if where.endswith((SAFETENSORS, *PICKLES)):
        parent, _, name = where.rpartition("/")
        storage = Storage(parent or ".", options)
        if storage.exists(name):
            return Source(storage, (name,))
        raise FileNotFoundError(f"no weights at {path}: there is no such file")
    storage = Storage(where, options)
    if storage.exists(WEIGHTS_FILE):
        return Source(storage, (WEIGHTS_FILE,))
    folder = storage.folder(part) if storage.exists(PIPELINE) else storage
    if folder.exists(CONFIG):
        names = {file.name for file in folder.list()}
        files = weight_files(folder.uri, names, folder.read_json, allow_pickle)
        indices = [name for name in names if ".index." in name]
        return Source(folder, (CONFIG, *files, *indices))
    checkpoint = newest_checkpoint(storage)
    raise FileNotFoundError(
        f"no weights at {path}: expected a {SAFETENSORS} file, a finished run's output folder, a U-Net's checkpoint, "
        f"or a diffusers folder with {part}"
        + (f"; of this run, which is not finished, name a checkpoint: {where}/{checkpoint}" if checkpoint else "")
    )


@contextmanager
def local_weights(path: str, part: str, options: StorageOptions, allow_pickle: bool = False) -> Iterator[str]:
    """The file or folder of `find` on this machine; from s3://, a copy of the files that are needed."""
    source = find(path, part, options, allow_pickle)
    if source.storage.is_local:
        yield source.storage.root if source.is_folder else source.storage.path(source.names[0])
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in source.names:
            _download(source.storage, name, directory)
        yield directory if source.is_folder else os.path.join(directory, source.names[0])


@contextmanager
def local_text(source: str, part: str, options: StorageOptions, allow_pickle: bool = False) -> Iterator[str]:
    """A text encoder's file, folder or name; from s3://, a copy."""
    if not source.startswith("s3://"):
        yield source
        return
    with local_weights(source, part, options, allow_pickle) as path:
        yield path


@contextmanager
def local_copy(path: str, options: StorageOptions) -> Iterator[str]:
    """A file on this machine: itself, or a copy of an s3:// file."""
    folder, _, name = path.rpartition("/")
    storage = Storage(folder or ".", options)
    if not storage.exists(name):
        raise FileNotFoundError(f"no weights at {path}: there is no such file")
    if storage.is_local:
        yield storage.path(name)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield _download(storage, name, directory)


def scheduler_json(source: Source) -> dict[str, Any] | None:
    """The scheduler_config.json beside a diffusers U-Net's folder; None where there is none."""
    storage = source.storage
    pipeline = Storage(storage.uri.rstrip("/").rpartition("/")[0] or ".", storage.options)
    return pipeline.read_json(SCHEDULER_FILE) if pipeline.exists(SCHEDULER_FILE) else None


def _download(storage: Storage, name: str, directory: str) -> str:
    copy = os.path.join(directory, name)
    reader = storage.open(name)
    chunk, size = memoryview(bytearray(COPY_BYTES)), reader.size()
    with naming_full_disk(copy), open(copy, "wb") as file:
        for offset in range(0, size, COPY_BYTES):
            part = chunk[: size - offset]
            reader.read_into(part, offset)
            file.write(part)
    return copy
