"""Thrift's compact protocol, as far as the headers of Parquet's pages need it.

https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

from pipelines.spans import read_varint

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12)


def read_struct(data: bytes, place: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and the place behind it. Raises IndexError where the data ends early."""
    fields: dict[int, Any] = {}
    number = 0
    while data[place] != 0:
        kind, delta = data[place] & 15, data[place] >> 4
        place += 1
        if delta:
            number += delta
        else:
            number, place = _zigzag(data, place)
        fields[number], place = _value(data, place, kind)
    return fields, place + 1


def _value(data: bytes, place: int, kind: int) -> tuple[Any, int]:
    value: Any
    if kind in (TRUE, FALSE):  # a boolean field is its kind
        value = kind == TRUE
    elif kind in (I16, I32, I64):
        value, place = _zigzag(data, place)
    elif kind in (BYTE, DOUBLE):
        value, place = None, place + (1 if kind == BYTE else 8)
    elif kind == BINARY:
        length, place = read_varint(data, place)
        value, place = data[place : place + length], place + length
    elif kind in (LIST, SET):
        count, inner, place = data[place] >> 4, data[place] & 15, place + 1
        if count == 15:  # a longer list says so behind
            count, place = read_varint(data, place)
        value = []
        for _ in range(count):
            item, place = _value(data, place, inner)
            value.append(item)
    elif kind == STRUCT:
        value, place = read_struct(data, place)
    else:
        raise ValueError(f"a field of kind {kind}")
    return value, place


def _zigzag(data: bytes, place: int) -> tuple[int, int]:
    value, place = read_varint(data, place)
    return (value >> 1) ^ -(value & 1), place
