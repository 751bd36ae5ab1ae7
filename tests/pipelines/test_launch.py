"""What a training run may be resumed with, and where its workers run."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from pipelines.storage import Storage
from pipelines.train import launch
from pipelines.train.config import WorkersConfig
from pipelines.train.launch import _check_checkpoint, _check_list, _check_unchanged
from pipelines.train.listed import LIST

LPIPS = {"preset": "vgg16", "trunk": "/t", "heads": "/h"}


def check(before: dict, now: dict) -> None:
    _check_unchanged({"task": before}, {"task": now}, Storage("run"))


def test_a_part_that_was_left_out_may_not_join_and_one_that_was_there_may_not_leave():
    check({"lpips": LPIPS}, {"lpips": LPIPS})
    check({"lpips": None}, {"lpips": None})
    with pytest.raises(ValueError, match=r"task.lpips: None -> 'given'"):
        check({"lpips": None}, {"lpips": LPIPS})
    with pytest.raises(ValueError, match=r"task.lpips.trunk: '/t' -> None"):
        check({"lpips": LPIPS}, {"lpips": None})


def test_data_may_lie_elsewhere_and_may_not_be_called_otherwise():
    one, moved, other = ({"name": name, "path": path} for name, path in (("a", "/x"), ("a", "/y"), ("b", "/x")))
    check({"source": one}, {"source": moved})
    check({"sources": [one, other]}, {"sources": [moved, other]})
    with pytest.raises(ValueError, match=r"task.sources.1.name: 'b' -> 'a'"):
        check({"sources": [one, other]}, {"sources": [one, one]})


def test_a_setting_that_a_newer_version_has_added_is_at_its_default():
    check({"vae": "a"}, {"vae": "a", "lpips": None})


@pytest.mark.parametrize("name", ["count", "min_count", "zero_stage", "offload_optimizer", "cpus"])
def test_the_workers_and_their_stage_may_change(name):
    before = {"workers": {name: 1, "dtype": "float32"}, "optimizer": {"guard": {"action": "stop"}, "lr": 1.0}}
    now = {"workers": {name: 2, "dtype": "float32"}, "optimizer": {"guard": {"action": "skip"}, "lr": 1.0}}
    _check_unchanged(before, now, Storage("run"))
    with pytest.raises(ValueError, match=r"workers.dtype: 'float32' -> 'bfloat16'"):
        _check_unchanged(before, now | {"workers": {name: 2, "dtype": "bfloat16"}}, Storage("run"))


def test_a_run_never_starts_afresh_unnoticed(tmp_path):
    run = Storage(str(tmp_path))
    _check_checkpoint(run, 0)
    with pytest.raises(ValueError, match="was trained to 80 images, and its checkpoints are gone"):
        _check_checkpoint(run, 80)
    files = {"unet/rank_00000.safetensors": 8}
    run.write_json("checkpoints/checkpoint_a/progress.json", {"format": 2, "images_seen": 80, "files": files})
    with pytest.raises(ValueError, match=r"is not whole: unet/rank_00000\.safetensors is missing"):
        _check_checkpoint(run, 0)
    run.write("checkpoints/checkpoint_a/unet/rank_00000.safetensors", b"12345678")
    _check_checkpoint(run, 80)


def test_a_run_on_images_without_its_list_of_them_is_not_gone_on_with(tmp_path):
    run = Storage(str(tmp_path))
    with pytest.raises(ValueError, match=r"images\.parquet, the order of its images, is not there"):
        _check_list(run)
    run.write(LIST, b"")
    _check_list(run)


@pytest.mark.parametrize(("labels", "asked"), [({"work": "train"}, {"work": "train"}), ({}, None)])
def test_every_worker_asks_for_a_node_with_the_labels(monkeypatch, tmp_path, labels, asked):
    trainer = Mock()
    monkeypatch.setattr(launch, "Trainer", trainer)
    launch._trainer(SimpleNamespace(workers=WorkersConfig(count=2), output=Storage(str(tmp_path))), labels)
    assert trainer.call_args.kwargs["scaling_config"].label_selector == asked
