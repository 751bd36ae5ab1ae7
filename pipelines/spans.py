"""A part of a compressed page, unpacked without the rest of it.

Parquet compresses whole pages, and a page may hold a thousand images. Snappy, its usual codec, compresses blocks of 64
KiB that do not refer to each other, and leaves bytes of JPEG or PNG as they are. So a page can be entered in many
places, and one image costs what it is long (https://github.com/google/snappy/blob/main/format_description.txt).
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

SNAPPY_BLOCK = 65_536
SNAPPY, STREAMED = "snappy", ("gzip", "zstd", "brotli")
CODECS = (SNAPPY, *STREAMED)


def unpack(span: bytes, codec: str | None, skip: int, size: int) -> bytes:
    """The bytes [skip, skip + size) of an unpacked span: a whole page, or for snappy a part between two `starts`."""
    if codec is None:
        return span[skip : skip + size]
    if codec == SNAPPY:
        total = sum(length for _, length, _ in _elements(span, 0))
        data = pa.decompress(_varint(total) + span, decompressed_size=total, codec=SNAPPY, asbytes=True)
        return data[skip : skip + size]
    with pa.CompressedInputStream(pa.BufferReader(span), codec) as stream:
        return stream.read(skip + size)[skip:]


def unpacked_page(data: bytes, codec: str | None, size: int) -> bytes:
    """A whole page of `size` bytes, unpacked."""
    return data if codec is None else pa.decompress(data, decompressed_size=size, codec=codec, asbytes=True)


def starts(page: bytes) -> tuple[list[int], list[int]]:
    """Where a snappy page can be entered or left: ascending places in its unpacked bytes, and where those are packed.

    The last pair is the end of both.
    """
    _, begin = read_varint(page, 0)
    unpacked, packed = [0], [begin]
    place = 0
    for start, length, source in _elements(page, begin):
        if place % SNAPPY_BLOCK == 0 and place:
            unpacked.append(place)
            packed.append(start)
        while source is not None and unpacked[-1] > place - source:  # a copy from before: no entry between
            unpacked.pop()
            packed.pop()
        place += length
    return [*unpacked, place], [*packed, len(page)]


def _elements(data: bytes, place: int) -> Iterator[tuple[int, int, int | None]]:
    """(where it is packed, bytes it unpacks to, how far back it copies from or None for a literal) of each element."""
    while place < len(data):
        start, tag = place, data[place]
        place += 1
        kind, upper = tag & 3, tag >> 2
        if kind == 0:
            if upper >= 60:  # the length is in the next one to four bytes
                width = upper - 59
                upper = int.from_bytes(data[place : place + width], "little")
                place += width
            place += upper + 1
            yield start, upper + 1, None
        elif kind == 1:
            yield start, 4 + (upper & 7), (tag >> 5) << 8 | data[place]
            place += 1
        else:
            width = 2 if kind == 2 else 4
            yield start, upper + 1, int.from_bytes(data[place : place + width], "little")
            place += width


def read_varint(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it. Raises IndexError where the data ends."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])
