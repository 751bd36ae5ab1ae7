"""What a training run may be resumed with."""

import pytest

from pipelines.storage import Storage
from pipelines.train.launch import _check_unchanged

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
