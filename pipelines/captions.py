"""The captions of images: of each one or several with a weight, as columns of lists."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TEXTS, WEIGHTS = pa.list_(pa.string()), pa.list_(pa.float32())


def in_lists(rows: int, places: np.ndarray, values: pa.Array, kind: pa.ListType | None = None) -> pa.ListArray:
    """Values, with the number of the row that each is in, as lists of `rows` rows. `places` [N] ascend."""
    ends = np.cumsum(np.bincount(places, minlength=rows))
    return pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), values, type=kind)


def out_of_lists(column: pa.ListArray | pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """(number of its row [N], value [N]) of all that stands in lists; a null list has nothing in it."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return np.repeat(np.arange(len(lists)), lengths), pc.list_flatten(lists)


def merged(rows: int, places: np.ndarray, texts: pa.Array, weights: np.ndarray) -> tuple[pa.ListArray, pa.ListArray]:
    """Captions and their weights as lists, those of a row in the order given, equal ones as one of both weights.

    `places` [N] is each caption's row, in any order. What is null, or has no weight, is no caption.
    """
    there = np.flatnonzero(pc.is_valid(texts).to_numpy(zero_copy_only=False) & (weights > 0))
    there = there[np.argsort(places[there], kind="stable")]
    places, texts, weights = places[there], texts.take(pa.array(there)), weights[there]
    codes = texts.dictionary_encode().indices.to_numpy()
    pairs = places.astype(np.int64) * (len(texts) + 1) + codes
    _, first, pair = np.unique(pairs, return_index=True, return_inverse=True)
    sums = np.bincount(pair, weights, minlength=len(first))
    order = np.argsort(first)  # as they came
    first, sums = first[order], sums[order]
    captions = in_lists(rows, places[first], texts.take(pa.array(first)).cast(pa.string()))
    return captions, in_lists(rows, places[first], pa.array(sums, pa.float32()))


def left(
    captions: pa.ChunkedArray, weights: pa.ChunkedArray, reasons: pa.ChunkedArray
) -> tuple[pa.ListArray, pa.ListArray]:
    """The captions that have no reject reason, and the chance of each: those of a row sum to 1.

    A row of which none is left has the empty caption: who keeps the image nevertheless, trains it without words.
    """
    rows = len(captions)
    places, texts = out_of_lists(captions)
    stay = pc.is_null(out_of_lists(reasons)[1])
    places, texts = places[stay.to_numpy(zero_copy_only=False)], texts.filter(stay)
    numbers = out_of_lists(weights)[1].filter(stay).to_numpy().astype(np.float64)
    bare = np.setdiff1d(np.arange(rows), places)
    texts = pa.concat_arrays([texts, pa.array([""] * len(bare), pa.string())])
    numbers = np.concatenate([numbers, np.ones(len(bare))])
    places = np.concatenate([places, bare])
    order = np.argsort(places, kind="stable")
    places, numbers = places[order], numbers[order]
    chances = numbers / np.bincount(places, numbers, minlength=rows)[places]
    return (
        in_lists(rows, places, texts.take(pa.array(order))),
        in_lists(rows, places, pa.array(chances, pa.float32())),
    )


def likeliest(captions: Sequence[str], weights: Sequence[float]) -> str:
    """The caption of the greatest weight, of equals the first: for who shows or asks for one."""
    return captions[int(np.argmax(weights))]
