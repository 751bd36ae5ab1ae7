"""Checkpoints behind training: when they count, what is left of those that were broken off, and who waits for whom."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipelines.checkpoints import WEIGHTS, Run, list_checkpoints, newest_checkpoint, read_progress
from pipelines.lease import LeaseLostError
from pipelines.storage import Storage, StorageOptions
from pipelines.train import checkpointing
from pipelines.train.checkpointing import Checkpointer
from pipelines.train.sharded import Part

WAIT = 60  # seconds, for what never takes as long


class Counter:
    """An engine whose state is one number."""

    def __init__(self) -> None:
        self.value = 0.0

    def snapshot(self, buffers: dict[str, torch.Tensor]) -> Part:
        buffers.setdefault(WEIGHTS, torch.empty(1)).fill_(self.value)
        return Part([Run("value", 0, 1)], {"value": (1,)}, buffers)

    def numbers(self) -> dict:
        return {"twice": 2 * self.value}

    def load(self, shards, numbers) -> None:
        self.value = float(shards.read(WEIGHTS, Run("value", 0, 1)))
        assert numbers == {"twice": 2 * self.value}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path))


def mine() -> None:
    """The run is this job's."""


def saved(run: Storage, *steps: int, keep: int = 2) -> Checkpointer:
    checkpointer, engine = Checkpointer(run, keep, mine), Counter()
    for step in steps:
        engine.value = step / 8
        checkpointer.save({"net": engine}, step, step * 10)
    checkpointer.finish()
    return checkpointer


def restored(run: Storage) -> tuple[int, float]:
    engine = Counter()
    return Checkpointer(run, 2, mine).restore({"net": engine}), engine.value


def test_the_newest_is_taken_up_and_older_ones_go(run):
    assert restored(run) == (0, 0.0)
    saved(run, 1, 2, 3)
    assert [run.read_json(f"{name}/progress.json")["step"] for name in list_checkpoints(run)] == [2, 3]
    assert len(list(Path(run.root, "checkpoints").iterdir())) == 2
    assert restored(run) == (3, 3 / 8)


def test_what_a_dead_attempt_writes_late_goes_with_the_next_checkpoint_and_this_attempts_own_stays(run):
    checkpointer = saved(run, 1)
    late, mine_too = (
        "checkpoints/checkpoint_000000000020_other",
        f"checkpoints/checkpoint_000000000030_{checkpointer._attempt}",
    )
    for folder in (late, mine_too):  # a worker whose driver was killed; a worker that is a checkpoint ahead of this one
        run.write(f"{folder}/net/rank_00001.safetensors", b"a part")
    checkpointer.save({"net": Counter()}, 2, 20)
    checkpointer.finish()
    assert len(list_checkpoints(run)) == 2
    assert run.folders("checkpoints") == {*list_checkpoints(run), mine_too}


def test_on_s3_nothing_is_left_of_older_ones_or_of_what_a_dead_attempt_wrote(s3):
    run = Storage(f"s3://{s3.bucket}/checkpointing", StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1"))
    run.write("checkpoints/checkpoint_000000000050_dead/net/rank_00000.safetensors", b"part")
    saved(run, 1, 2, 3, keep=1)
    assert run.folders("checkpoints") == {newest_checkpoint(run)}
    assert run.folders() == {"checkpoints"}
    assert restored(run) == (3, 3 / 8)


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits_for_it(run, monkeypatch):
    allowed, begun = threading.Event(), threading.Event()
    write = checkpointing.write_shard

    def slowly(*arguments):
        begun.set()
        assert allowed.wait(WAIT)
        return write(*arguments)

    monkeypatch.setattr(checkpointing, "write_shard", slowly)
    checkpointer, engine = Checkpointer(run, 2, mine), Counter()
    checkpointer.save({"net": engine}, 1, 10)
    assert begun.wait(WAIT)
    engine.value = 5.0  # training goes on, and what is written is what was
    assert newest_checkpoint(run) is None
    second = threading.Thread(target=lambda: checkpointer.save({"net": engine}, 2, 20))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    allowed.set()
    second.join(WAIT)
    checkpointer.finish()
    assert checkpointer.waited() > 0.1
    assert checkpointer.waited() == 0.0
    first, second_name = list_checkpoints(run)
    values = [
        checkpointing.Shards(run.folder(name), "net").read(WEIGHTS, Run("value", 0, 1)) for name in (first, second_name)
    ]
    assert [float(value) for value in values] == [0.0, 5.0]


@pytest.mark.parametrize("broken", ["before the first file", "between files", "before the last file", "while deleting"])
def test_whatever_moment_a_worker_dies_the_one_before_is_whole(run, broken):
    saved(run, 1, 2)
    first, second = list_checkpoints(run)
    left = Path(run.root, first if broken == "while deleting" else second)
    (left / "progress.json").unlink()
    if broken == "before the first file":
        (left / "net/rank_00000.safetensors").unlink()
    elif broken == "between files":
        (left / "net/rank_00000.safetensors").rename(left / "net/.rank_00000.safetensors.1.partial")
    run.write("checkpoints/of-another.json", b"{}")
    expected = 2 if broken == "while deleting" else 1
    assert restored(run) == (expected, expected / 8)
    assert not list(left.rglob("*.*"))  # and what was left is gone
    read_progress(run.folder(newest_checkpoint(run)))


def test_what_cannot_be_written_is_told_and_the_one_before_stays(run, monkeypatch):
    saved(run, 1)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(checkpointing, "write_shard", full)
    with pytest.raises(RuntimeError, match=r"could not be written: worker 0: OSError: no space left"):
        saved(run, 2)
    assert restored(run) == (1, 1 / 8)


def test_a_job_that_has_lost_its_run_commits_nothing_and_deletes_nothing(run):
    saved(run, 1)
    (run.folder("checkpoints/of-the-other-job")).write("net/rank_00000.safetensors", b"being written")

    def taken_over() -> None:
        raise LeaseLostError("another process took over")

    checkpointer = Checkpointer(run, 1, taken_over)
    checkpointer.save({"net": Counter()}, 2, 20)
    with pytest.raises(LeaseLostError):
        checkpointer.finish()
    with pytest.raises(LeaseLostError):
        checkpointer.restore({"net": Counter()})
    assert run.exists("checkpoints/of-the-other-job/net/rank_00000.safetensors")
    assert restored(run) == (1, 1 / 8)


def test_a_checkpoint_that_is_not_whole_is_refused_and_nothing_starts_afresh(run):
    saved(run, 1, 2)
    Path(run.root, list_checkpoints(run)[-1], "net/rank_00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"is not whole: net/rank_00000.safetensors is missing"):
        restored(run)
