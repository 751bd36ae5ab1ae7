import json

import pytest
import torch
from torch import nn

from pipelines.checkpoints import averaged_weights, ema_file, is_checkpoint, newest_checkpoint
from pipelines.storage import Storage


def network():
    return nn.Linear(3, 2)


def checkpoint(tmp_path, line, workers=2):
    (tmp_path / "unet").mkdir(parents=True)
    for rank, part in enumerate(line.chunk(workers)):
        torch.save({"shadow": [part.clone()]}, tmp_path / "unet" / ema_file(rank))
    return Storage(str(tmp_path))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_parts_are_put_together_in_the_networks_order(tmp_path, workers):
    line = torch.cat([torch.arange(1.0, 9.0), torch.zeros(2)])
    found = averaged_weights(checkpoint(tmp_path, line, workers), "unet", network())
    assert found["weight"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found["bias"].tolist() == [7, 8]


def test_a_missing_part_is_named(tmp_path):
    there = checkpoint(tmp_path, torch.arange(1.0, 9.0), 4)
    (tmp_path / "unet" / ema_file(3)).unlink()
    with pytest.raises(ValueError, match=r"6 elements in the parts of workers \[0, 1, 2\], and the network has 8"):
        averaged_weights(there, "unet", network())
    with pytest.raises(FileNotFoundError, match="no averaged weights of 'vae'"):
        averaged_weights(there, "vae", network())


def test_another_networks_average_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 values behind the last weight"):
        averaged_weights(checkpoint(tmp_path, torch.arange(1.0, 11.0)), "unet", network())


def test_the_newest_checkpoint_has_seen_most_images(tmp_path):
    run = Storage(str(tmp_path))
    assert newest_checkpoint(run) is None
    for name, images in (("checkpoint_b", 900), ("checkpoint_a", 1000), ("checkpoint_c", 50)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "progress.json").write_text(json.dumps({"images_seen": images}))
    (tmp_path / "checkpoints" / "half").mkdir()
    assert newest_checkpoint(run) == "checkpoints/checkpoint_a"
    assert is_checkpoint(run.folder("checkpoints/checkpoint_a"))
    assert not is_checkpoint(run)
