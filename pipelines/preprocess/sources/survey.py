"""What a source's folder holds, before anything of it is read: its kind, and the containers that hold its images."""

from __future__ import annotations

import posixpath
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.config import SourceConfig
from pipelines.originals import source_folder
from pipelines.preprocess.sources.inputs import IMAGE_NAME, listed, stamps_of
from pipelines.schema import SCHEMA_VERSION, digest
from pipelines.storage import Storage, StorageOptions

Kind = Literal["folder", "parquet", "webdataset", "huggingface"]
SUFFIXES = {"webdataset": ".tar", "parquet": ".parquet", "huggingface": ".arrow"}
PACKED_TAR = r"\.(tar\.(gz|bz2|xz|zst)|tgz)$"
STATE, SPLITS = "state.json", "dataset_dict.json"  # what Hugging Face's datasets write beside a saved dataset
LISTINGS = "listings"  # folder of the index in which the lists of containers are kept
LISTING_VERSION = 4  # raised when lists of containers change; 2 has keys, 3 each image of a sample, 4 each sample


@dataclass(frozen=True)
class Container:
    """A file that holds many images."""

    source: SourceConfig
    kind: Kind
    name: str
    """Name below the source's folder."""
    size: int
    """Bytes."""
    stamp: str
    """Size and time of its last change."""

    @property
    def listing(self) -> str:
        """Name of its list: another one for whatever would make another list."""
        versions, read = [SCHEMA_VERSION, LISTING_VERSION], [self.source.name, asdict(self.source.columns)]
        return f"{LISTINGS}/{digest([*versions, self.kind, self.name, self.stamp, *read])}.parquet"


@dataclass(frozen=True)
class Survey:
    """What a source's folder holds, before any of it is read."""

    source: SourceConfig
    kind: Kind
    files: pa.Table
    """All files below its folder: name, size, modified_us."""
    containers: tuple[Container, ...]
    """Those that hold images."""

    @cached_property
    def stamps(self) -> pa.ChunkedArray:
        """The stamp of each file."""
        return stamps_of(self.files)


def survey(config: SourceConfig, options: StorageOptions) -> Survey:
    """Look what kind of source it is, and what it holds.

    Raises FileNotFoundError where there is nothing of its kind, ValueError where the kind is in doubt.
    """
    storage, single = source_folder(config.path, options)
    try:
        files = storage.list_table()
    except NotADirectoryError as error:
        raise ValueError(f"{where_is(config)}: is a file; a folder, a .tar or a .parquet file was expected") from error
    if single is not None:
        files = files.filter(pc.equal(files.column("name"), single))
    kind = _kind(config, files.column("name"), single)
    if kind == "folder":
        return Survey(config, kind, files, ())
    found = files.filter(pc.ends_with(pc.utf8_lower(files.column("name")), SUFFIXES[kind]))
    if kind == "huggingface":
        found = files.filter(pc.is_in(files.column("name"), _saved_files(config, storage, files.column("name"))))
    if not found.num_rows:
        raise FileNotFoundError(f"{where_is(config)}: no {SUFFIXES[kind]} file")
    rows = zip(*(column.to_pylist() for column in (*found.select(["name", "size"]), stamps_of(found))), strict=True)
    return Survey(config, kind, files, tuple(Container(config, kind, *row) for row in rows))


def _kind(config: SourceConfig, names: pa.ChunkedArray, single: str | None) -> Kind:
    if config.kind != "auto" and single is None:
        return config.kind
    if not len(names):
        raise FileNotFoundError(f"{where_is(config)}: there is no such folder, or it is empty")

    def matching(pattern: str) -> pa.ChunkedArray:
        return names.filter(pc.match_substring_regex(names, pattern, ignore_case=True))

    if pc.any(pc.equal(names, STATE)).as_py() and len(matching(r"^[^/]*\.arrow$")):
        return "huggingface"
    if pc.any(pc.equal(names, SPLITS)).as_py():
        splits = sorted(posixpath.dirname(name) for name in matching(rf"^[^/]*/{STATE}$").to_pylist())
        example = f"{config.path}/{splits[0]}" if splits else "its folder"
        raise ValueError(f"{where_is(config)}: holds the splits {listed(splits)}; name one, as {example}")
    images, tars, tables = (len(matching(pattern)) for pattern in (IMAGE_NAME, r"\.tar$", r"\.parquet$"))
    if images and (tars or tables):
        raise ValueError(f"{where_is(config)}: holds {images} images and {tars or tables} other sources; set kind")
    if packed := matching(PACKED_TAR).to_pylist():
        raise ValueError(f"{where_is(config)}: {packed[0]}: a packed tar cannot be read in places; unpack it to .tar")
    return "webdataset" if tars else "parquet" if tables else "folder"


def _saved_files(config: SourceConfig, storage: Storage, names: pa.ChunkedArray) -> pa.Array:
    """The names of a saved dataset's files, which may be fewer than those that lie there."""
    state = storage.read_json(STATE)
    if "_data_files" not in state:
        raise ValueError(f"{where_is(config)}: {STATE} is not that of a saved dataset; it has {listed(state)}")
    if state.get("_indices_data_files"):
        raise ValueError(f"{where_is(config)}: rows are selected by indices; call flatten_indices() before saving it")
    saved = pa.array([file["filename"] for file in state["_data_files"]], pa.string())
    if missing := saved.filter(pc.invert(pc.is_in(saved, names))).to_pylist():
        raise FileNotFoundError(f"{where_is(config)}: {STATE} names {listed(missing)}, and there is no such file")
    return saved


def where_is(config: SourceConfig) -> str:
    """A source, for messages."""
    return f"source {config.name!r}, {config.path}"
