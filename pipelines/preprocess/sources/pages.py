"""Where in a Parquet file each value of a column of bytes lies, so that one is read later without its neighbours.

A column chunk is a row of pages. A page of images holds, behind the levels that say which rows have one, the length
and the bytes of each, or else numbers of entries of the chunk's dictionary page, which holds the same
(https://github.com/apache/parquet-format: README.md, Encodings.md, parquet.thrift).
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines.preprocess.sources.thrift import read_struct
from pipelines.spans import CODECS, SNAPPY, read_varint, starts, unpacked_page

KIND, UNPACKED_BYTES, PACKED_BYTES, DATA, DICTIONARY, DATA_V2 = 1, 2, 3, 5, 7, 8  # fields of a page's header
DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3  # kinds of pages
PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY = 0, 2, 8  # encodings
NOT_READ = {6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY"}  # encodings that bytes can have as well
HEADER_BYTES = (256, 2**12, 2**16, 2**20)  # how much is read for a header, until it is whole


@dataclass(frozen=True)
class Place:
    """Where one value's bytes lie in a file."""

    offset: int
    """First byte of the span that holds it."""
    length: int
    """Bytes of the span."""
    codec: str | None
    """How the span is packed; None for not at all."""
    skip: int
    """Bytes of the unpacked span before the value."""
    size: int
    """Bytes of the value."""


def places(parquet: pq.ParquetFile, file: io.BufferedReader, leaf: str, where: str) -> Iterator[Place | None]:
    """Of each row of a file in order, where the value of the column `leaf` of bytes lies; None for a null.

    Raises ValueError for a layout in which values cannot be found, OSError or IndexError where the file is damaged.
    """
    number = next(number for number in range(len(parquet.schema)) if parquet.schema.column(number).path == leaf)
    column = parquet.schema.column(number)
    if column.max_repetition_level:
        raise ValueError(f"{where}: {leaf} is a list; one image a row was expected")
    for group in range(parquet.metadata.num_row_groups):
        chunk = parquet.metadata.row_group(group).column(number)
        codec = None if chunk.compression == "UNCOMPRESSED" else chunk.compression.lower()
        if codec not in (None, *CODECS):
            raise ValueError(f"{where}: {leaf} is compressed with {chunk.compression}; write it with snappy or none")
        first = chunk.data_page_offset
        if chunk.dictionary_page_offset is not None:
            first = min(first, chunk.dictionary_page_offset)
        there = _Chunk(file, codec, column.max_definition_level, chunk.encodings, f"{where}: {leaf}")
        yield from there.places(first, chunk.num_values)


@dataclass(frozen=True)
class _Chunk:
    """One column chunk of an open file."""

    file: io.BufferedReader
    codec: str | None
    most: int
    """Definition level of a value that is there."""
    encodings: tuple[str, ...]
    """Those that the file's own description gives its pages."""
    where: str

    def places(self, offset: int, rows: int) -> Iterator[Place | None]:
        """The places of all rows; its first page begins at `offset`."""
        dictionary: list[Place] = []
        while rows > 0:
            header, offset = self._header(offset)
            self.file.seek(offset)
            data = self.file.read(header[PACKED_BYTES])
            if len(data) < header[PACKED_BYTES]:
                raise OSError(f"{self.where}: the file ends within a page")
            if header[KIND] == DICTIONARY_PAGE:
                page = _Page(data, offset, self.codec, header[UNPACKED_BYTES])
                dictionary = page.values(0, header[DICTIONARY][1])
            elif header[KIND] == DATA_PAGE:
                page = _Page(data, offset, self.codec, header[UNPACKED_BYTES])
                count, encoding = header[DATA][1], header[DATA][2]
                begin = 4 + int.from_bytes(page.data[:4], "little") if self.most else 0
                yield from self._rows(page, begin, encoding, self._present(page.data, 4, count), dictionary)
                rows -= count
            elif header[KIND] == DATA_PAGE_V2:
                told = header[DATA_V2]
                count, encoding, definition, repetition = told[1], told[4], told.get(5, 0), told.get(6, 0)
                levels = definition + repetition  # bytes, and they are not packed
                codec, size = self.codec if told.get(7, True) else None, header[UNPACKED_BYTES] - levels
                page = _Page(data[levels:], offset + levels, codec, size)
                yield from self._rows(page, 0, encoding, self._present(data, repetition, count), dictionary)
                rows -= count
            offset += header[PACKED_BYTES]

    def _rows(
        self, page: _Page, begin: int, encoding: int, present: np.ndarray, dictionary: list[Place]
    ) -> Iterator[Place | None]:
        """The places of a data page's rows, whose values begin at byte `begin` of it."""
        values = int(np.count_nonzero(present))
        if encoding == PLAIN:
            found = page.values(begin, values)
        elif encoding in (PLAIN_DICTIONARY, RLE_DICTIONARY):
            width = page.data[begin] if values else 0
            found = [dictionary[entry] for entry in _numbers(page.data, begin + 1, width, values)]
        elif NOT_READ.get(encoding) in self.encodings:
            raise ValueError(f"{self.where}: its encoding, {NOT_READ[encoding]}, is not read; write it with PLAIN")
        else:
            raise OSError(f"{self.where}: a page claims the encoding number {encoding}, which is none of its column's")
        following = iter(found)
        return (next(following) if there else None for there in present)

    def _present(self, data: bytes, place: int, count: int) -> np.ndarray:
        """Which of a page's rows have a value."""
        if not self.most:
            return np.ones(count, bool)
        return _numbers(data, place, self.most.bit_length(), count) == self.most

    def _header(self, offset: int) -> tuple[dict[int, Any], int]:
        """The page header that begins at `offset`, and the place behind it."""
        for size in HEADER_BYTES:
            self.file.seek(offset)
            data = self.file.read(size)
            try:
                header, length = read_struct(data)
            except (IndexError, ValueError):
                continue
            sizes = [header.get(name, -1) for name in (KIND, UNPACKED_BYTES, PACKED_BYTES)]
            if length <= len(data) and min(sizes) >= 0:
                return header, offset + length
        raise OSError(f"{self.where}: no page begins at byte {offset}")


class _Page:
    """The unpacked bytes of a page, and the way from a place in them to a place in the file."""

    def __init__(self, packed: bytes, offset: int, codec: str | None, size: int) -> None:
        self.data = unpacked_page(packed, codec, size)
        self._offset, self._codec = offset, codec
        self._unpacked, self._packed = starts(packed) if codec == SNAPPY else ([0, size], [0, len(packed)])

    def values(self, begin: int, count: int) -> list[Place]:
        """The places of `count` values of PLAIN encoding, from byte `begin` on: four bytes of length before each."""
        found = []
        for _ in range(count):
            size = int.from_bytes(self.data[begin : begin + 4], "little")
            found.append(self._place(begin + 4, size))
            begin += 4 + size
        if begin > len(self.data):
            raise OSError(f"a value ends at byte {begin} of a page of {len(self.data)}")
        return found

    def _place(self, start: int, size: int) -> Place:
        if self._codec is None:
            return Place(self._offset + start, size, None, 0, size)
        enter = max(0, bisect_right(self._unpacked, start) - 1)
        leave = bisect_left(self._unpacked, start + size, lo=min(enter + 1, len(self._unpacked) - 1))
        offset, end = (self._packed[min(place, len(self._packed) - 1)] for place in (enter, leave))
        return Place(self._offset + offset, end - offset, self._codec, start - self._unpacked[enter], size)


def _numbers(data: bytes, place: int, width: int, count: int) -> np.ndarray:
    """`count` numbers of `width` bits, in runs of one and in packed groups of eight (RLE / bit-packing hybrid)."""
    numbers = np.zeros(count, np.int64)
    done = 0
    while done < count:
        header, place = read_varint(data, place)
        run = header >> 1
        if header & 1:
            size = run * width
            bits = np.unpackbits(np.frombuffer(data[place : place + size], np.uint8), bitorder="little")
            if len(bits) != run * 8 * width:
                raise OSError("a page ends within its levels")
            values = bits.reshape(run * 8, width) @ (1 << np.arange(width))
            numbers[done : done + run * 8] = values[: count - done]
            done += run * 8
        else:
            size = (width + 7) // 8
            numbers[done : done + run] = int.from_bytes(data[place : place + size], "little")
            done += run
        place += size
    return numbers
