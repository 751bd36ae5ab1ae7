"""Which images training never sees, so that a network can be measured on them."""

from __future__ import annotations

import hashlib

BITS = 64


def is_held_out(image_id: str, share: float) -> bool:
    """Whether an image, by its content's id, is of the `share` of all images that are held out.

    It depends on nothing else: every stage and every version of a dataset holds out the same images, and a larger
    share holds out those of a smaller one as well.
    """
    drawn = hashlib.sha256(f"validation:{image_id}".encode()).digest()[: BITS // 8]
    return int.from_bytes(drawn) < int(share * 2**BITS)
