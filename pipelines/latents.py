"""One latents file as a loader sees it: small columns in memory, and the place of each row's tensors in the file.

A tensor column is written uncompressed, as one page of values of one width: the last values x width bytes of its chunk.
A tensor is therefore read by itself, straight to where it is wanted, and nothing beside it is. A row has one value in
most columns, and in those of text one for each of its captions, which lie side by side.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ranges import RangeReader
from pipelines.schema import Column, pair_array, tensor_shape

OF_CAPTIONS = (Column.CONTEXT, Column.POOLED, Column.TOKENS)
TENSORS = (Column.LATENT_MEAN, Column.LATENT_STD, *OF_CAPTIONS)  # those of text, or their tokens
PAIRS = (Column.ORIGINAL_SIZE, Column.CROP_TOP_LEFT, Column.TARGET_SIZE)
MOST_BEFORE = 2**16  # bytes before the values of a column


class LatentFile:
    """A latents file's small columns, and where its tensors lie: some kilobytes, and no open file."""

    def __init__(self, reader: RangeReader) -> None:
        """Raises ValueError where the file has another layout than `write_rows` gives it."""
        parquet = reader.parquet()
        columns = [*PAIRS, Column.AESTHETIC_SCORE, Column.CAPTION_WEIGHTS]
        table = parquet.read(columns=columns, use_threads=False)  # a few short ones
        score = table.column(Column.AESTHETIC_SCORE).to_numpy()  # NaN where the source has none
        self.conditions: dict[str, np.ndarray] = {
            **{name: pair_array(table, name) for name in PAIRS},
            Column.AESTHETIC_SCORE: score.astype(np.float32)[:, None],
        }
        weights = table.column(Column.CAPTION_WEIGHTS).combine_chunks()
        self._chances = weights.flatten().to_numpy()
        self._captions = np.concatenate([[0], np.cumsum(weights.value_lengths().to_numpy())])  # before each row
        schema = parquet.schema_arrow  # made anew whenever it is asked for
        there = [column for column in TENSORS if column in schema.names]
        self.shapes = {column: tensor_shape(schema, column) for column in there}
        counts = {column: len(self._chances) if column in OF_CAPTIONS else table.num_rows for column in there}
        self._starts = {
            column: _first_value(parquet.metadata, schema, column, count, reader) for column, count in counts.items()
        }

    def chances(self, row: int) -> np.ndarray:
        """How likely each of a row's captions is to be drawn [N]."""
        return self._chances[self._captions[row] : self._captions[row + 1]]

    def read_into(self, reader: RangeReader, column: Column, row: int, caption: int, target: np.ndarray) -> None:
        """Read one row's tensor, of one of its captions where it is of text, into `target`: its bytes [N]."""
        place = self._captions[row] + caption if column in OF_CAPTIONS else row
        reader.read_into(target.data, self._starts[column] + int(place) * len(target))


def _first_value(metadata: pq.FileMetaData, schema: pa.Schema, column: Column, count: int, reader: RangeReader) -> int:
    """Where the values of a tensor column, `count` in all, begin in the file."""
    refused = (
        f"{reader.name}: {column} is not one uncompressed page; this version did not write it: make the latents anew"
    )
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_list(kind) else kind
    if metadata.num_row_groups != 1 or not pa.types.is_fixed_size_binary(value):
        raise ValueError(refused)
    chunk = metadata.row_group(0).column(schema.get_field_index(column))
    start, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    values = count * value.byte_width
    before = bytearray(max(0, min(end - values - start, MOST_BEFORE)))  # the page's header, and of lists the levels
    reader.read_into(memoryview(before), start)
    described = chunk.path_in_schema.partition(".")[0] == column and chunk.num_values == count
    if not described or chunk.compression != "UNCOMPRESSED" or not _is_page(before, values, kind != value):
        raise ValueError(refused)
    return end - values


def _is_page(before: bytearray, values: int, of_lists: bool) -> bool:
    """Whether what is before `values` bytes is one page's header, and in a column of lists the levels behind it.

    Levels say where lists begin and end: two runs of bytes, each with its length in four bytes before it.
    """
    levels = (_page_bytes(before) or 0) - values
    if not of_lists:
        return levels == 0
    if not 0 < levels < len(before):
        return False
    place, runs = 0, before[-levels:]
    for _ in range(2):
        place += 4 + int.from_bytes(runs[place : place + 4], "little")
    return place == levels


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
