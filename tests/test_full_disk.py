"""A small disk that fills: the error names it, nothing half-written counts, and with room the same command goes on.

The disk is a tmpfs of a few MiB. Mounting one needs the right to: where there is none, these tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from jobs.cli import FAILURE, main
from jobs.config import PreprocessJob
from jobs.demo_images import render_images
from jobs.preprocess import _build, plan
from jobs.remedies import remedy
from model.config import VAE_PRESETS
from model.vae import VAE
from model.weights import Kind, save_weights
from pipelines.checkpoints import PROGRESS, Run, newest_checkpoint, read_progress, write_shard
from pipelines.config import DriverConfig
from pipelines.lease import lease
from pipelines.outbox import Entry, Outbox
from pipelines.runs import Work
from pipelines.storage import Storage
from tests.in_process import without_ray
from tests.test_survival import content

DISK_BYTES, PAGE = 4 * 2**20, 4096
FULL = r"\[Errno 28\] No space left on device: [0-9.]+ of 4.0 MiB are free on the disk at "


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of DISK_BYTES."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk of a few MiB")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_bsize - leave)))
    return ballast


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


SETTINGS = """
index_rows_per_file = 4
encode.rows_per_file = 4
source.path = "images"
vae = { preset = "tiny", path = "vae.safetensors" }
text = { preset = "tiny", seed = 2 }
buckets = { resolution = 64, table = "square" }
"""


def test_index_and_latents_go_on_when_there_is_room_again(disk, tmp_path, monkeypatch, capsys):
    without_ray(monkeypatch)
    monkeypatch.chdir(tmp_path)
    render_images(tmp_path / "images", 8, 96)
    Path("job.toml").write_text(SETTINGS)
    torch.manual_seed(1)
    vae = VAE(VAE_PRESETS["tiny"])
    save_weights("vae.safetensors", vae.state_dict(), Kind.VAE, vae.config)

    def build(job: PreprocessJob) -> None:
        (stage,) = job.stages
        with lease(Storage({"index": job.index, "latents": job.latents}[stage] or "")) as held:
            _build(job, stage, held, lambda: None)

    def command(root: Path, stage: str) -> int:
        places = [f"{name}={root / name}" for name in ("index", "latents")]
        with pytest.raises(SystemExit) as ending:
            main(PreprocessJob, build, plan, ["job.toml", *places, f'stages=["{stage}"]'], needs_ray=False)
        return ending.value.code

    for stage, room in (("index", 5 * PAGE), ("latents", 30 * PAGE)):
        assert command(tmp_path / "unbroken", stage) == 0
        ballast = fill(disk, leave=room)
        assert command(disk, stage) == FAILURE
        told = capsys.readouterr().err
        assert f"are free on the disk at {disk}" in told
        assert "what to do: Make room" in told
        assert not (disk / stage / "manifest.json").exists()
        for name in files(disk / stage):  # each is whole, or hidden
            assert name.startswith("lease/") or Storage(str(disk / stage)).read_table(name).num_rows
        ballast.unlink()
        assert command(disk, stage) == 0
        assert content(disk / stage, stage) == content(tmp_path / "unbroken" / stage, stage)


def test_rows_that_find_no_room_on_the_drivers_disk_name_the_setting(disk):
    work, rows = Work(DriverConfig(folder=str(disk))), pa.table({"a": range(DISK_BYTES // 4)})
    for fill_it in (lambda: work.array(2 * DISK_BYTES, bool), lambda: work.keep(rows)):
        with pytest.raises(OSError, match=f"{FULL}{disk}; rows on their way fill driver.folder") as error:
            fill_it()
        assert "name a folder on a larger one in driver.folder" in (remedy(str(error.value)) or "")
        assert files(disk) == []


def test_a_checkpoint_that_found_no_room_is_none_and_the_one_before_is_the_newest(disk):
    run = Storage(str(disk))

    def save(images: int, count: int) -> None:
        folder = run.folder(f"checkpoints/checkpoint_{images:012}")
        values = [Run("weight", 0, count)]
        size = write_shard(
            folder, "unet/rank_00000.safetensors", values, {"weight": (count,)}, {"weights": torch.zeros(count)}
        )
        progress = {"format": 2, "images_seen": images, "files": {"unet/rank_00000.safetensors": size}}
        folder.write_json(PROGRESS, progress)

    save(8, 1000)
    ballast = fill(disk, leave=50 * PAGE)
    with pytest.raises(OSError, match=FULL + str(disk)) as error:
        save(16, 200_000)
    assert remedy(str(error.value)) is not None
    ballast.unlink()
    assert newest_checkpoint(run) == "checkpoints/checkpoint_000000000008"
    save(16, 200_000)
    assert newest_checkpoint(run) == "checkpoints/checkpoint_000000000016"
    assert read_progress(run.folder("checkpoints/checkpoint_000000000016"))["images_seen"] == 16


def test_what_a_run_tells_is_not_lost_where_the_disk_has_no_room_for_it(disk):
    told: list[int] = []
    away = True

    def send(entries):
        if away:
            raise ConnectionError("nobody")
        told.extend(entry.data["n"] for entry in entries)
        return len(entries)

    make: Callable[[], Outbox] = lambda: Outbox(Storage(str(disk / "tracking")), send, "the server", {})  # noqa: E731
    ballast = fill(disk, leave=70 * PAGE)
    box = make()
    for n in range(3):
        box.add(Entry(kind="number", data={"n": n}, blob=bytes(50 * PAGE)))
    with pytest.raises(OSError, match=FULL):
        box.keep()
    ballast.unlink()
    box.keep()
    box.stop()
    away = False
    again = make()
    assert [entry.data["n"] for entry in again.load()] == [0, 1, 2]
    assert again.flush(10)
    again.stop()
    assert told == [0, 1, 2]
    assert files(disk / "tracking") == []
