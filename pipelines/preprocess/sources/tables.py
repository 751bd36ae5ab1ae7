"""A table with an image in each row as a source: a Parquet file, or a file of a Hugging Face dataset saved to disk."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.config import ColumnsConfig, SourceConfig
from pipelines.originals import ABSOLUTE
from pipelines.preprocess.sources.columns import check_columns, told, told_columns
from pipelines.preprocess.sources.inputs import PROBLEM, listed, listed_table
from pipelines.preprocess.sources.pages import Place, places
from pipelines.schema import Column
from pipelines.storage import Storage

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "file_name")  # what an image's column may be called and not be named
BYTES, PATH = "bytes", "path"  # fields of an image column as Hugging Face's datasets write it
DAMAGE = (  # what readers of damaged files raise; an error of the storage is none of these
    *(pa.ArrowInvalid, OSError, UnicodeDecodeError),
    *(IndexError, KeyError, TypeError, MemoryError),
)
PLACE_FIELDS = {
    Column.OFFSET: "offset",
    Column.LENGTH: "length",
    Column.CODEC: "codec",
    Column.SKIP: "skip",
    Column.FILE_SIZE: "size",
}


@dataclass(frozen=True)
class ImageColumn:
    """The column of a table that has the images: their bytes, names of their files, or a struct of both."""

    name: str
    kind: pa.DataType

    @property
    def leaf(self) -> str | None:
        """The column of bytes, as Parquet calls it; None where there are only names."""
        return f"{self.name}.{BYTES}" if pa.types.is_struct(self.kind) else self.name if _is_bytes(self.kind) else None

    @property
    def names(self) -> list[str]:
        """The column of names, as Parquet calls it, where there is one."""
        if pa.types.is_struct(self.kind):
            return [f"{self.name}.{PATH}"] if self.kind.get_field_index(PATH) >= 0 else []
        return [] if _is_bytes(self.kind) else [self.name]

    def files(self, table: pa.Table) -> pa.ChunkedArray:
        """The names of files in a table's rows, null where there is none."""
        if not self.names:
            return pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
        column = table.column(self.name)
        return pc.struct_field(column, PATH) if pa.types.is_struct(self.kind) else column


def image_column(schema: pa.Schema, config: ColumnsConfig, where: str) -> ImageColumn:
    """The column that the settings name, or the first of IMAGE_COLUMNS. Raises ValueError, with what there is."""
    named = config.image
    there = [name for name in (IMAGE_COLUMNS if named is None else (named,)) if name in schema.names]
    if not there:
        asked = f"is {named!r}" if named else f"is not set, and none of {', '.join(IMAGE_COLUMNS)} is there"
        raise ValueError(f"{where}: source.columns.image {asked}; there is only {listed(schema.names, 30)}")
    kind = schema.field(there[0]).type
    structured = pa.types.is_struct(kind) and kind.get_field_index(BYTES) >= 0 and _is_bytes(kind.field(BYTES).type)
    if not (structured or _is_bytes(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{where}: {there[0]} is of type {kind}; bytes, names of files, or both were expected")
    return ImageColumn(there[0], kind)


def list_parquet(source: Storage, name: str, size: int, config: SourceConfig) -> pa.Table:
    """The inputs of one Parquet file without keys, in its order; a file that cannot be read is one, with its problem.

    Raises ValueError where a column is missing, of a wrong type, or laid out so that no image can be read alone.
    """
    where, file = f"{source.uri.rstrip('/')}/{name}", source.stream(name, size)
    try:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        check_columns(schema.names, config.columns, where)
        image = image_column(schema, config.columns, where)
        table = parquet.read(columns=[*told_columns(schema.names, config.columns), *image.names])
        table.validate(full=True)
        found = [None] * table.num_rows if image.leaf is None else list(places(parquet, file, image.leaf, where))
        if len(found) != table.num_rows:
            raise OSError(f"{len(found)} images in {table.num_rows} rows")
    except DAMAGE as error:
        return _broken(name, error)
    return _inputs(name, found, image.files(table), told(table, config.columns, where), where)


def list_arrow(source: Storage, name: str, size: int, config: SourceConfig) -> pa.Table:
    """The inputs of one Arrow file of a saved dataset, likewise."""
    where, data = f"{source.uri.rstrip('/')}/{name}", source.map(name)
    try:
        table = pa.ipc.open_stream(data).read_all()  # its buffers are parts of the mapped file
        table.validate(full=True)
    except DAMAGE as error:
        return _broken(name, error)
    image = image_column(table.schema, config.columns, where)
    found: Sequence[Place | None] = [None] * table.num_rows
    if image.leaf is not None:
        found = [place for chunk in table.column(image.name).chunks for place in _arrow_places(chunk, data, where)]
    return _inputs(name, found, image.files(table), told(table, config.columns, where), where)


def _inputs(
    name: str, found: Sequence[Place | None], file_names: pa.ChunkedArray, described: pa.Table, where: str
) -> pa.Table:
    """Listed inputs: of each row what is told of it, and its place, or else the file that it names."""
    files = [
        name if place is not None else _file(other, name, where, row)
        for row, (place, other) in enumerate(zip(found, file_names.to_pylist(), strict=True))
    ]
    columns: dict[str, Any] = {column: described.column(column) for column in described.column_names}
    for column, known in PLACE_FIELDS.items():
        columns[column] = pa.array([None if place is None else getattr(place, known) for place in found])
    columns[Column.PATH] = pa.array([f"{name}#{row}" for row in range(len(files))], pa.string())
    columns[Column.FILE] = pa.array(files, pa.string())
    columns[PROBLEM] = pc.if_else(pc.is_null(columns[Column.FILE]), "the row has no image", None)
    return listed_table(len(files), **columns)


def _file(uri: str | None, table: str, where: str, row: int) -> str | None:
    """The file that a row names: absolute, or below the source's folder."""
    if not uri:
        return None
    if re.match(ABSOLUTE, uri):
        return uri
    if "://" in uri:
        raise ValueError(
            f"{where}, row {row}: {uri}: nothing is fetched from the web; fetch the images first, as img2dataset does, "
            "or name files by a path or s3://"
        )
    return posixpath.normpath(posixpath.join(posixpath.dirname(table), uri))


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _arrow_places(chunk: pa.Array, data: pa.Buffer, where: str) -> Iterator[Place | None]:
    """Where each value of a chunk lies in the file that it was mapped from."""
    values = chunk
    if pa.types.is_struct(chunk.type):
        values = pc.struct_field(chunk, BYTES)  # null where the struct is
    width = np.int64 if pa.types.is_large_binary(values.type) else np.int32
    _, ends, content = values.buffers()
    if content is None or not len(values):
        yield from [None] * len(values)
        return
    begin = content.address - data.address
    if not 0 <= begin <= data.size:
        raise ValueError(f"{where}: the Arrow file is compressed; save the dataset without, or as Parquet")
    bounds = np.frombuffer(ends, width, len(values) + 1, values.offset * np.dtype(width).itemsize).tolist()
    for start, end, there in zip(bounds, bounds[1:], values.is_valid().to_pylist(), strict=False):
        yield Place(begin + start, end - start, None, 0, end - start) if there else None


def _broken(name: str, error: Exception) -> pa.Table:
    return listed_table(1, **{Column.PATH: pa.array([name]), PROBLEM: pa.array([f"the file is damaged: {error}"])})
