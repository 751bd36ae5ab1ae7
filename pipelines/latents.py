"""One latents file as a loader sees it: small columns in memory, and the place of each row's tensors in the file.

A tensor column is written uncompressed, as one page of values of one width: the last rows x width bytes of its chunk.
A row's tensor is therefore read by itself, straight to where it is wanted, and nothing beside it is.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.schema import Column, pair_array, tensor_shape
from pipelines.storage import RangeReader, Storage

TENSORS = (Column.LATENT_MEAN, Column.LATENT_STD, Column.CONTEXT, Column.POOLED)
PAIRS = (Column.ORIGINAL_SIZE, Column.CROP_TOP_LEFT, Column.TARGET_SIZE)


class LatentFile:
    """An open latents file."""

    def __init__(self, dataset: Storage, name: str) -> None:
        """Raises ValueError where the file has another layout than `write_rows` gives it."""
        self.reader = dataset.open(name)
        parquet = pq.ParquetFile(self.reader.file)
        table = parquet.read(columns=[*PAIRS, Column.AESTHETIC_SCORE], use_threads=False)  # a few short columns
        score = table.column(Column.AESTHETIC_SCORE).to_numpy()  # NaN where the source has none
        self.conditions: dict[Column, np.ndarray] = {
            **{name: pair_array(table, name) for name in PAIRS},
            Column.AESTHETIC_SCORE: score.astype(np.float32)[:, None],
        }
        self.shapes = {column: tensor_shape(parquet.schema_arrow, column) for column in TENSORS}
        self._starts = {column: _first_value(parquet, column, self.reader, name) for column in TENSORS}

    def read_into(self, column: Column, row: int, target: np.ndarray) -> None:
        """Read one row's tensor into `target`, contiguous float16 of its shape."""
        self.reader.read_into(target.reshape(-1).view(np.uint8).data, self._starts[column] + row * target.nbytes)


def _first_value(parquet: pq.ParquetFile, column: Column, reader: RangeReader, name: str) -> int:
    """Where the values of a tensor column begin in the file."""
    metadata, schema = parquet.metadata, parquet.schema_arrow
    refused = f"{name}: {column} is not one uncompressed page; this version did not write it: make the latents anew"
    if metadata.num_row_groups != 1 or not pa.types.is_fixed_size_binary(schema.field(column).type):
        raise ValueError(refused)
    chunk = metadata.row_group(0).column(schema.get_field_index(column))
    values = metadata.num_rows * schema.field(column).type.byte_width
    start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    header = bytearray(max(0, min(end - values - start, 64)))
    reader.read_into(memoryview(header), start)
    if chunk.path_in_schema != column or chunk.compression != "UNCOMPRESSED" or _page_bytes(header) != values:
        raise ValueError(refused)
    return end - values


def _page_bytes(header: bytes | bytearray) -> int | None:
    """The size that a Parquet page header claims for its values; None where it is no header of a plain data page.

    Thrift's compact protocol: the fields 1 to 3, i32 each, are a byte 0x15 and a zigzag varint; they are the kind of
    page (0, data), and its size uncompressed and compressed.
    """
    place, numbers = 0, []
    for _ in range(3):
        if place >= len(header) or header[place] != 0x15:
            return None
        place += 1
        value = shift = 0
        while place < len(header):
            byte = header[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        numbers.append(value >> 1)
    return numbers[2] if numbers[0] == 0 else None
