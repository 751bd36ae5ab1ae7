"""That each proof runs, at two steps, and that what it measures with tells apart pictures whose answer is known."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import Conditioning
from tests.proofs import aspect_buckets, crop_conditioning, size_conditioning, toy
from tests.proofs.report import write

NAMES = ("size_conditioning", "crop_conditioning", "aspect_buckets", "refiner_range", "vae_batch")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_a_proof_writes_its_table_and_its_picture(name, tmp_path: Path, monkeypatch):
    proof_of = import_module(f"tests.proofs.{name}")
    monkeypatch.setattr(proof_of, "DATA", 60)
    monkeypatch.setattr(toy, "SAMPLING_STEPS", 2)
    (proof,) = proof_of.prove(2 * toy.BATCH, [0], 4)
    text = write(proof, tmp_path, "At 2 steps.")
    assert (tmp_path / f"{name}.md").read_text() == text + "\n"
    assert {len(row) for row in proof.rows} == {len(proof.columns)}
    assert ("**Shown**" in text) == proof.holds
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert np.ptp(np.asarray(picture)) == 255


def test_larger_originals_are_sharper_and_nearer_to_large_ones():
    small, large, others = (size_conditioning.drawn([size] * 64, seed).maps for seed, size in enumerate((3, 8, 12)))
    assert size_conditioning.sharpness(small).mean() < 0.8 * size_conditioning.sharpness(large).mean()
    assert size_conditioning.distance(others, large) < size_conditioning.distance(small, large)


def test_only_what_no_edge_cuts_is_whole():
    data = crop_conditioning.drawn(200, 0)
    crops = data.conditions[Conditioning.CROP_TOP_LEFT]
    centred = (crops == 0).all(1)
    assert crop_conditioning.share(data.maps[centred]) > crop_conditioning.share(data.maps[~centred]) + 20
    assert crop_conditioning.middle(data.maps[centred]).abs().max() < 1
    assert crop_conditioning.share(torch.ones(2, 3, 8, 8)) == 0  # an object has to be there


def test_centre_squares_of_long_pictures_are_not_whole_and_their_buckets_are():
    bucketed = aspect_buckets.drawn(60, 0, aspect_buckets.BUCKETS)
    assert all(aspect_buckets.whole(part.maps).float().mean() > 0.9 for part in bucketed.values())
    squares = aspect_buckets.drawn(60, 0, [aspect_buckets.SQUARE])[aspect_buckets.SQUARE]
    sizes = squares.conditions[Conditioning.ORIGINAL_SIZE]
    long = (sizes[:, 0] / sizes[:, 1]).log().abs() > 0.7
    assert aspect_buckets.whole(squares.maps[long]).float().mean() < 0.1
