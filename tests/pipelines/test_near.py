"""Near-duplicates: the hash keeps what looks the same together, and no pair is missed, however it is looked for."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.preprocess.measure import looks
from pipelines.preprocess.near import leaders, near_pairs


def scene(seed: int, height: int = 300, width: int = 400) -> Image.Image:
    """Soft shapes in colour, as a photograph has them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def again(image: Image.Image, kind: str, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=quality)
    return Image.open(buffer).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> int:
    return (looks(one)["perceptual_hash"] ^ looks(other)["perceptual_hash"]).bit_count()


@pytest.mark.parametrize("seed", range(4))
def test_a_picture_stays_itself_when_it_is_resized_or_compressed(seed):
    image = scene(seed)
    for other in (
        again(image, "JPEG", 30),
        again(image, "WEBP", 20),
        image.resize((200, 150), Image.Resampling.LANCZOS),
        image.resize((1000, 750), Image.Resampling.BICUBIC),
        image.resize((400, 280), Image.Resampling.BICUBIC),
        image.convert("L").convert("RGB"),
    ):
        assert apart(image, other) <= 4
    assert min(apart(image, scene(other)) for other in range(10, 20)) > 12


def test_a_hash_is_the_same_on_every_machine():
    assert hex(looks(scene(0))["perceptual_hash"]) == "0xc0a7ecd64252ecba"


def hashes_with_near_ones(count: int, seed: int = 0) -> np.ndarray:
    """Distinct hashes, a third of them near another."""
    draws = np.random.default_rng(seed)
    hashes = draws.integers(0, 2**64, count, dtype=np.uint64)
    for place in range(count // 3):
        flipped = draws.choice(64, draws.integers(1, 18), replace=False)
        hashes[place] = hashes[place + count // 3] ^ np.bitwise_or.reduce(np.uint64(1) << flipped.astype(np.uint64))
    hashes = np.unique(hashes)
    draws.shuffle(hashes)
    return hashes


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4, 7, 8, 12, 16])
def test_every_near_pair_is_found_once_and_no_other(bits):
    hashes = hashes_with_near_ones(600)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(apart <= bits, 1))
    assert bits < 2 or len(expected)
    assert np.array_equal(near_pairs(hashes, bits), expected)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes_are_no_special_case(count):
    assert near_pairs(np.arange(count, dtype=np.uint64), 1).tolist() == [[0, 1]][: count // 2]
    assert leaders(np.arange(count, dtype=np.uint64), 1).tolist() == [0] * count


@pytest.mark.parametrize("bits", [0, 3, 8])
def test_kept_hashes_are_far_apart_and_each_other_one_is_near_the_first_kept(bits):
    draws = np.random.default_rng(1)
    hashes = draws.choice(hashes_with_near_ones(300), 500)  # some are there several times
    leader = leaders(hashes, bits)
    kept = np.flatnonzero(leader == np.arange(len(hashes)))
    apart = np.bitwise_count(hashes[:, None] ^ hashes[kept][None])
    for place, stands_for_it in enumerate(leader):
        near = kept[apart[place] <= bits]
        assert stands_for_it == (place if place in kept else near[near < place][0])
        assert place not in kept or near.tolist() == [place]


def test_a_chain_is_not_followed_further():
    chain = np.array([0b0, 0b11, 0b1111, 0b111111], np.uint64)
    assert leaders(chain, 2).tolist() == [0, 0, 2, 2]
