"""The two datasets, index and latents: their columns, their files, and the manifest that makes files a dataset.

A dataset is a folder:

    manifest.json               the dataset as it is now; replaced whole by each commit
    manifests/<digest>.json     every manifest there has been: a training run pins the one that it started from
    files/<digest>.parquet      the manifest's list of data files
    data/<fingerprint>/...      Parquet files of rows; one that no manifest names is not part of the dataset
    lease/...                   who writes it now
    plan/...                    what a run in progress is making (preprocess/plan.py)
    report.html, times.json     what it holds, for a person, and what its last run took

Nothing inside is absolute, so a copied folder is the same dataset.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.config import CONTEXT_LENGTH
from pipelines.captions import TEXTS, WEIGHTS, left
from pipelines.storage import Storage

JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)
ROWS_AT_A_TIME = 16_384  # that are in memory as Python values
KEY_LENGTH = 32  # hex digits of a key, as of every digest
SCHEMA_VERSION = 4  # raised when a column changes its meaning; part of every fingerprint
MANIFEST = "manifest.json"
PASSED_OVER = "files_passed_over"  # fact of an index: how many files of its folders are no inputs, by suffix
GARBLED = "garbled_captions"  # fact of an index: its rows, kept or not, with a caption of which bytes were no text
COMPUTED = "computed_scores"  # fact of an index: the folder of the scores that its verdicts were made with


class Column(StrEnum):
    """Names of all columns."""

    KEY = "key"  # what makes the row this row: a hash of the input and all that it is made of
    ID = "id"  # sha256 of the image file's bytes, 32 hex digits; null where they could not be read
    SOURCE = "source"  # name of the source that the image is of
    PATH = "path"  # the image's name in its source: a file below its folder, FILE/MEMBER of a tar, FILE#ROW of a table
    FILE = "file"  # file that holds the image, below the source's folder or absolute; null where PATH is it
    OFFSET = "offset"  # first byte of the image in FILE, or of the span that holds it; null where the whole file is it
    LENGTH = "length"  # bytes from there
    CODEC = "codec"  # how the span is packed; null for not at all
    SKIP = "skip"  # bytes of the unpacked span before the image
    CAPTIONS = "captions"  # texts; an image is seen with one of them at a time
    CAPTION_WEIGHTS = "caption_weights"  # how often each is drawn beside the others; in latents they sum to 1
    CAPTION_REASONS = "caption_reasons"  # a Reject of each; null = kept
    ORIGINAL_SIZE = "original_size"  # (height, width) in pixels, upright, before any resize
    BUCKET = "bucket"  # (height, width) in pixels
    AESTHETIC_SCORE = "aesthetic_score"  # null where the source has none
    SCORES = "scores"  # further scores that the source has, by name
    CLIP_SIMILARITY = "clip_similarity"  # cosine of image and caption; computed, in files beside the index
    FILE_SIZE = "file_size"  # bytes of the image as it is stored; -1 where there is none
    DISTINCT_PIXELS = "distinct_pixels"  # distinct pixel values of the image; 256 stands for all above
    CONTRAST = "contrast"  # standard deviation of brightness, of 255, over a thumbnail of 32 x 32
    PERCEPTUAL_HASH = "perceptual_hash"  # 64 bits of the thumbnail; null where it has hardly any contrast
    REJECT_REASON = "reject_reason"  # a Reject; null = kept
    REJECT_DETAIL = "reject_detail"  # what exactly was wrong, for a person
    LATENT_MEAN = "latent_mean"  # unscaled posterior, float16 [4, h, w]
    LATENT_STD = "latent_std"  # likewise
    CONTEXT = "context"  # float16 [77, channels], CLIP-L then bigG
    POOLED = "pooled"  # float16 [channels]
    TOKENS = "tokens"  # uint16 [2, 77], ids of CLIP-L's and of bigG's tokens, in place of context and pooled
    CROP = "crop"  # number of the crop among those of its image, from 0
    CROP_TOP_LEFT = "crop_top_left"  # (top, left) in pixels of the resized image, or of its mirror image
    TARGET_SIZE = "target_size"  # (height, width) in pixels: the bucket
    FLIP = "flip"  # whether the resized image was mirrored left to right before the crop


class Reject(StrEnum):
    """Why an input is not kept, in the order in which reasons are looked for: the first is an image's."""

    UNREADABLE = "unreadable"
    TOO_LARGE = "too_large"
    KILLS_DECODER = "kills_decoder"
    NO_CAPTION = "no_caption"
    LONG_CAPTION = "long_caption"
    TOO_SMALL = "too_small"
    EXTREME_ASPECT = "extreme_aspect"
    BLANK = "blank"
    NO_SCORE = "no_score"
    LOW_SCORE = "low_score"
    HIGH_SCORE = "high_score"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"


PAIR = pa.list_(pa.int32(), 2)
NULLABLE_PAIR = pa.list_(pa.int32())  # Arrow writes a null of a fixed-size list to Parquet and cannot read it back
SCORES = pa.map_(pa.string(), pa.float32())
PLACE = (  # where the bytes of an image lie; FILE_SIZE says how many they are
    pa.field(Column.FILE, pa.string()),
    pa.field(Column.OFFSET, pa.int64()),
    pa.field(Column.LENGTH, pa.int64()),
    pa.field(Column.CODEC, pa.string()),
    pa.field(Column.SKIP, pa.int64()),
)

INDEX_SCHEMA = pa.schema(
    [
        pa.field(Column.KEY, pa.string(), nullable=False),
        pa.field(Column.ID, pa.string()),
        pa.field(Column.SOURCE, pa.string(), nullable=False),
        pa.field(Column.PATH, pa.string(), nullable=False),
        *PLACE,
        pa.field(Column.CAPTIONS, TEXTS),
        pa.field(Column.CAPTION_WEIGHTS, WEIGHTS),
        pa.field(Column.CAPTION_REASONS, TEXTS),
        pa.field(Column.ORIGINAL_SIZE, NULLABLE_PAIR),
        pa.field(Column.BUCKET, NULLABLE_PAIR),
        pa.field(Column.AESTHETIC_SCORE, pa.float32()),
        pa.field(Column.SCORES, SCORES),
        pa.field(Column.FILE_SIZE, pa.int64(), nullable=False),
        pa.field(Column.DISTINCT_PIXELS, pa.int32()),
        pa.field(Column.CONTRAST, pa.float32()),
        pa.field(Column.PERCEPTUAL_HASH, pa.uint64()),
        pa.field(Column.REJECT_REASON, pa.string()),
        pa.field(Column.REJECT_DETAIL, pa.string()),
    ]
)

INDEX_ONLY = (  # what no later stage asks for
    Column.SCORES,
    Column.DISTINCT_PIXELS,
    Column.CONTRAST,
    Column.PERCEPTUAL_HASH,
    Column.REJECT_DETAIL,
)

LATENTS_IDENTITY = (  # what a latents row is made of
    *(Column.ID, Column.CAPTIONS, Column.CAPTION_WEIGHTS),
    *(Column.BUCKET, Column.AESTHETIC_SCORE),
)


def tensor_field(name: Column, shape: Sequence[int], several: bool = False, dtype: str = "float16") -> pa.Field:
    """A column of tensors of one shape, two bytes a number, or of lists of them: bytes, with the shape beside them.

    Arrow's own tensor columns read and write ten times slower; docs/decisions/ has the figures.
    """
    kind = pa.binary(2 * int(np.prod(shape)))
    metadata = {"dtype": dtype, "shape": ",".join(map(str, shape))}
    listed = pa.list_(pa.field("element", kind, nullable=False))
    return pa.field(name, listed if several else kind, nullable=False, metadata=metadata)


def latents_schema(
    latent: Sequence[int], context: Sequence[int] | None = None, pooled: Sequence[int] | None = None
) -> pa.Schema:
    """The schema of a latents file, for tensors of these shapes (without the dimensions of rows and captions).

    Without shapes of embeddings it holds tokens.
    """
    if context is None or pooled is None:
        text = [tensor_field(Column.TOKENS, (2, CONTEXT_LENGTH), several=True, dtype="uint16")]
    else:
        shapes = {Column.CONTEXT: context, Column.POOLED: pooled}
        text = [tensor_field(name, shape, several=True) for name, shape in shapes.items()]
    return pa.schema(
        [
            pa.field(Column.KEY, pa.string(), nullable=False),
            pa.field(Column.ID, pa.string(), nullable=False),
            pa.field(Column.CAPTIONS, TEXTS, nullable=False),
            pa.field(Column.CAPTION_WEIGHTS, WEIGHTS, nullable=False),
            pa.field(Column.ORIGINAL_SIZE, PAIR, nullable=False),
            pa.field(Column.CROP, pa.int32(), nullable=False),
            pa.field(Column.CROP_TOP_LEFT, PAIR, nullable=False),
            pa.field(Column.TARGET_SIZE, PAIR, nullable=False),
            pa.field(Column.FLIP, pa.bool_(), nullable=False),
            pa.field(Column.AESTHETIC_SCORE, pa.float32()),
            tensor_field(Column.LATENT_MEAN, latent),
            tensor_field(Column.LATENT_STD, latent),
            *text,
        ]
    )


def tensor_column(array: np.ndarray, dtype: type[np.generic] = np.float16) -> pa.Array:
    """Rows [N, ...] as a column of fixed-size bytes, two a number."""
    rows = np.ascontiguousarray(array, dtype=dtype)
    size = rows[0].nbytes if len(rows) else 2 * int(np.prod(rows.shape[1:]))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(rows), [None, pa.py_buffer(rows)])


def tensor_shape(schema: pa.Schema, name: Column) -> tuple[int, ...]:
    """The shape of one row of a tensor column."""
    return tuple(int(side) for side in schema.field(name).metadata[b"shape"].decode().split(","))


def tensor_array(table: pa.Table, name: Column) -> np.ndarray:
    """A tensor column of a table as an array [N, ...], lists one after another; a view where it is one chunk."""
    shape = tensor_shape(table.schema, name)
    column = table.column(name)
    chunk = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
    if pa.types.is_list(chunk.type):
        chunk = chunk.flatten()
    buffer = chunk.buffers()[1]
    width = chunk.type.byte_width
    dtype = table.schema.field(name).metadata[b"dtype"].decode()
    flat = np.frombuffer(buffer, dtype, len(chunk) * width // 2, chunk.offset * width)
    return flat.reshape(len(chunk), *shape)


def pair_column(pairs: Sequence[Sequence[int] | None]) -> pa.Array:
    """Pairs such as (height, width), or nulls, as a column."""
    return pa.array(pairs, NULLABLE_PAIR)


def pair_array(table: pa.Table, name: Column) -> np.ndarray:
    """A column of pairs without nulls as int32 [N, 2]."""
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy().reshape(-1, 2)


def digest(value: Any) -> str:
    """32 hex digits that stand for a JSON value: the same for equal values, on every machine."""
    return hashlib.sha256(JSON.encode(value).encode()).hexdigest()[:KEY_LENGTH]


def row_digests(rows: pa.Table) -> pa.ChunkedArray:
    """The digest of each row: of its values, in the order of the columns."""
    keys = [
        pa.array(map(digest, zip(*(column.to_pylist() for column in batch.columns), strict=True)), pa.string())
        for batch in rows.to_batches(ROWS_AT_A_TIME)
    ]
    return pa.chunked_array(keys, pa.string())


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """One data file of a dataset."""

    name: str
    """Name below the dataset's folder."""
    rows: int
    """Rows in it."""
    bucket: tuple[int, int] | None = None
    """(height, width) of all its rows in pixels; None in an index."""
    weight: float = 1.0
    """How often training sees each of its rows in an epoch, on average."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset is: its files, what made it, and what is in it."""

    kind: str
    """"index" or "latents"."""
    rows: int
    """Rows of the dataset."""
    counts: Mapping[str, int]
    """Index: rows kept, and rows per reject reason. Latents: rows per bucket, as HEIGHTxWIDTH."""
    fingerprint: Mapping[str, Any]
    """All that determines a row besides the input: weights, bucket table, crops, schema version."""
    parents: Mapping[str, str]
    """Digests of the manifests that this dataset was made from."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Numbers about the rows that a later stage asks for."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Latents: source:path of kept rows that could not be encoded, and why. They are tried again by the next run."""
    files: str
    """Name of the Parquet file that lists the data files."""
    digest: str = ""
    """The manifest's identity: the digest of its document, as it was written, in which this field is not."""


def write_manifest(
    dataset: Storage, files: Sequence[DataFile], check: Callable[[], None] | None = None, **content: Any
) -> Manifest:
    """Commit `files` as the dataset: the list first, then the history, and manifest.json last.

    `check` may still refuse, once the history names the files, so that no garbage collector takes them.
    """
    ordered = sorted(files, key=lambda file: file.name)
    listing = pa.table(
        {
            "name": pa.array([file.name for file in ordered], pa.string()),
            "rows": pa.array([file.rows for file in ordered], pa.int64()),
            "bucket": pair_column([file.bucket for file in ordered]),
            "weight": pa.array([file.weight for file in ordered], pa.float64()),
        }
    )
    name = f"files/{digest([asdict(file) for file in ordered])}.parquet"
    dataset.write_table(name, listing)
    document = asdict(Manifest(rows=sum(file.rows for file in ordered), files=name, **content))
    del document["digest"]
    identity = digest(document)
    dataset.write_json(f"manifests/{identity}.json", document)
    if check is not None:
        check()
    dataset.write_json(MANIFEST, document)
    return Manifest(**document, digest=identity)


def read_manifest(dataset: Storage, kind: str, pinned: str | None = None) -> Manifest | None:
    """The dataset's manifest, or the pinned one by its digest; None if the folder holds no finished dataset."""
    name = f"manifests/{pinned}.json" if pinned else MANIFEST
    if not dataset.exists(name):
        return None
    document = dataset.read_json(name)
    manifest = Manifest(**document, digest=digest(document))
    if manifest.kind != kind:
        raise ValueError(f"{dataset.uri} holds a dataset of kind {manifest.kind!r}, and {kind!r} was expected")
    version = manifest.fingerprint.get("schema")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{dataset.uri} was written with schema {version}, and this version reads {SCHEMA_VERSION}: make it anew "
            "with jobs.preprocess, in another folder or once this one is deleted"
        )
    return manifest


def require_manifest(dataset: Storage, kind: str, pinned: str | None = None) -> Manifest:
    """The dataset's manifest. Raises FileNotFoundError, naming the remedy, where there is none."""
    manifest = read_manifest(dataset, kind, pinned)
    if manifest is None:
        raise FileNotFoundError(f"{dataset.uri} holds no finished {kind}: run jobs.preprocess first, or to its end")
    return manifest


def data_files(dataset: Storage, manifest: Manifest) -> list[DataFile]:
    """The manifest's data files, sorted by name."""
    rows = dataset.read_table(manifest.files).to_pylist()
    return [DataFile(**row | {"bucket": row["bucket"] and (row["bucket"][0], row["bucket"][1])}) for row in rows]


def with_latents_key(rows: pa.Table, keys: pa.Array | None = None) -> pa.Table:
    """Kept index rows with the key that their latents row has, in place of their own or of none.

    `keys` are these keys, where they were made before.
    """
    keys = row_digests(rows.select(LATENTS_IDENTITY)) if keys is None else keys
    return _with(rows, Column.KEY, keys) if Column.KEY in rows.column_names else rows.append_column(Column.KEY, keys)


def kept(rows: pa.Table) -> pa.Table:
    """Those of an index's rows that are kept, with their kept captions."""
    rows = rows.filter(pc.is_null(rows.column(Column.REJECT_REASON)))
    told = (rows.column(name) for name in (Column.CAPTIONS, Column.CAPTION_WEIGHTS, Column.CAPTION_REASONS))
    captions, chances = left(*told)
    rows = _with(_with(rows, Column.CAPTIONS, captions), Column.CAPTION_WEIGHTS, chances)
    return rows.drop_columns([Column.REJECT_REASON, Column.CAPTION_REASONS])


def _with(rows: pa.Table, name: Column, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), INDEX_SCHEMA.field(name), values)
