"""Checkpoints as files: whole or refused by name, and read by parameter however many workers wrote them."""

import json
import math
import os

import pytest
import torch
from torch import nn

from pipelines.checkpoints import (
    AVERAGE,
    FORMAT,
    PROGRESS,
    WEIGHTS,
    Run,
    Shards,
    averaged_weights,
    is_checkpoint,
    list_checkpoints,
    newest_checkpoint,
    read_progress,
    shard_file,
    write_shard,
)
from pipelines.storage import Storage, StorageOptions

PARAMETERS = {"weight": (2, 3), "bias": (2,)}
VALUES = {"weight": torch.arange(1.0, 7.0), "bias": torch.tensor([7.0, 8.0])}


def network():
    return nn.Linear(3, 2)


def write(folder, workers=2, progress=None, values=VALUES, network="unet"):
    """A checkpoint whose workers each hold an equal part of every parameter, the last the first of it."""
    checkpoint, files = Storage(str(folder)), {}
    for rank in range(workers):
        place = workers - 1 - rank
        runs = []
        for name, value in values.items():
            begin, end = (place * len(value) // workers, (place + 1) * len(value) // workers)
            runs += [Run(name, begin, end - begin)] if begin < end else []
        parts = [values[run.name][run.start : run.start + run.length] for run in runs]
        weights = torch.cat([*parts, torch.zeros(0)])
        tensors = {WEIGHTS: weights, AVERAGE: weights * 10}
        shapes = {name: PARAMETERS.get(name, (len(value),)) for name, value in values.items()}
        file = shard_file(network, rank)
        files[file] = write_shard(checkpoint, file, runs, shapes, tensors)
    checkpoint.write_json(PROGRESS, {"format": FORMAT, "images_seen": 8, "files": files} | (progress or {}))
    return checkpoint


@pytest.mark.parametrize("workers", [1, 2, 5, 9])
def test_parts_are_put_together_whoever_wrote_them(tmp_path, workers):
    found = averaged_weights(write(tmp_path, workers), "unet", network())
    assert found["weight"].read().tolist() == [[10, 20, 30], [40, 50, 60]]
    assert found["bias"].read().tolist() == [70, 80]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_run_of_values_is_read_across_the_parts_that_hold_it(tmp_path, workers):
    shards = Shards(write(tmp_path, workers), "unet")
    assert shards.parameters == PARAMETERS
    for start in range(6):
        for length in range(7 - start):
            expected = VALUES["weight"][start : start + length]
            assert torch.equal(shards.read(WEIGHTS, Run("weight", start, length)), expected)


def test_on_s3_too(s3):
    checkpoint = Storage(f"s3://{s3.bucket}/one", StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1"))
    file = shard_file("unet", 0)
    size = write_shard(checkpoint, file, [Run("bias", 0, 2)], {"bias": (2,)}, {WEIGHTS: VALUES["bias"]})
    assert not is_checkpoint(checkpoint)
    checkpoint.write_json(PROGRESS, {"format": FORMAT, "images_seen": 8, "files": {file: size}})
    assert Shards(checkpoint, "unet").read(WEIGHTS, Run("bias", 1, 1)).tolist() == [8]


def test_every_file_that_is_missing_or_short_is_named(tmp_path):
    there = write(tmp_path, 4)
    (tmp_path / "unet" / "rank_00003.safetensors").unlink()
    size = os.path.getsize(tmp_path / "unet" / "rank_00001.safetensors")
    os.truncate(tmp_path / "unet" / "rank_00001.safetensors", size - 1)
    wrong = f"rank_00001.safetensors has {size - 1} of {size} bytes; unet/rank_00003.safetensors is missing"
    for read in (
        read_progress,
        lambda folder: Shards(folder, "unet"),
        lambda f: averaged_weights(f, "unet", network()),
    ):
        with pytest.raises(ValueError, match=wrong):
            read(there)


def test_a_network_or_values_that_it_does_not_hold_are_named(tmp_path):
    there = write(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match="holds no network 'vae'"):
        averaged_weights(there, "vae", network())
    (tmp_path / "part").mkdir()
    progress = there.read_json(PROGRESS)
    del progress["files"]["unet/rank_00000.safetensors"]
    there.write_json(PROGRESS, progress)
    with pytest.raises(ValueError, match="unet has no value 3 of weight, which has 6"):
        Shards(there, "unet")


def test_another_networks_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)does not fit.*unexpected: .*'more'"):
        averaged_weights(write(tmp_path, values=VALUES | {"more": torch.ones(2)}), "unet", network())


def test_a_checkpoint_of_an_older_version_is_refused_and_not_passed_over(tmp_path):
    (tmp_path / PROGRESS).write_text('{"step": 4, "images_seen": 8}')
    with pytest.raises(
        ValueError, match="has format 1, and this version reads 2; go on with the version that wrote it"
    ):
        read_progress(Storage(str(tmp_path)))


def test_the_newest_checkpoint_has_seen_most_images(tmp_path):
    run = Storage(str(tmp_path))
    assert newest_checkpoint(run) is None
    for name, images in (("checkpoint_b", 900), ("checkpoint_a", 1000), ("checkpoint_c", 50)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / PROGRESS).write_text(json.dumps({"images_seen": images}))
    (tmp_path / "checkpoints" / "half").mkdir()
    assert [name[-1] for name in list_checkpoints(run)] == ["c", "b", "a"]
    assert newest_checkpoint(run) == "checkpoints/checkpoint_a"
    assert is_checkpoint(run.folder("checkpoints/checkpoint_a"))
    assert not is_checkpoint(run)


def test_values_of_no_number_keep_their_bits(tmp_path):
    values = {"bias": torch.tensor([math.nan, -0.0]), "weight": torch.tensor([math.inf, 1e-45, 0.0, -1.0, 2.0, 3.0])}
    shards = Shards(write(tmp_path, 3, values=values), "unet")
    for name, value in values.items():
        found = shards.read(WEIGHTS, Run(name, 0, len(value)))
        assert torch.equal(found.view(torch.int32), value.view(torch.int32))
