"""Images that a run could not use: what is recorded of them, and how many they are over the run's attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pipelines.storage import Storage
from pipelines.train.lost import LOST, LostImage, LostImages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def image(name: str) -> LostImage:
    return LostImage(name, f"source:{name}", "its file is gone", "source:other")


def test_each_lost_image_counts_once_over_all_attempts(tmp_path):
    run, counts = Storage(str(tmp_path)), []
    for names in (("a", "b", "a"), ("b", "c"), ()):  # of an attempt each
        lost = LostImages(most_share=0.5)
        counts.append(lost.record(run, 0, CPU))
        for name in names:
            lost.add(image(name))
        counts.append(lost.record(run, 8, CPU))
        counts.append(lost.record(run, 16, CPU))
    assert counts == [0, 2, 2, 2, 3, 3, 3, 3, 3]
    record = run.read_json(f"{LOST}/a.json")
    assert (record["images_seen"], record["name"], record["reason"]) == (8, "source:a", "its file is gone")


def test_too_many_are_an_error_that_names_the_image_and_the_remedy():
    lost = LostImages(most_share=0.002)
    lost.saw(10)
    for name in ("a", "b"):
        lost.add(image(name))
    with pytest.raises(RuntimeError, match=r"source:c: the index keeps it.*raise task.lost_share"):
        lost.add(image("c"))
