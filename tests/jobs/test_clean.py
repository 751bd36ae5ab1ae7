"""Cleaning: it lists what nothing needs, removes that and no more, and leaves whole what is named, wherever it ends."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from jobs import clean
from jobs.cli import USAGE_ERROR, JobError, main
from jobs.config import CleanJob
from pipelines.checkpoints import PROGRESS, Run, list_checkpoints, read_progress, write_shard
from pipelines.clean import left_in_dataset, remove
from pipelines.config import RetentionConfig, SourceConfig, StageResources
from pipelines.lease import lease
from pipelines.preprocess.config import AlertConfig, BucketConfig, FilterConfig
from pipelines.preprocess.pipeline import build_index
from pipelines.schema import data_files, require_manifest
from pipelines.storage import Storage
from tests.in_process import without_ray

HOUR = 3600


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def rows(dataset: Storage, pinned: str | None = None) -> list[dict]:
    found = [dataset.read_table(file.name) for file in data_files(dataset, require_manifest(dataset, "index", pinned))]
    return [row for table in found for row in table.to_pylist()]


def age(folder: Path, hours: float) -> None:
    """Let what is in the folder be so much older."""
    for name in files(folder):
        stat = (folder / name).stat()
        os.utime(folder / name, ns=(stat.st_atime_ns, int(stat.st_mtime_ns - hours * HOUR * 1e9)))


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Storage, list[str]]:
    """An index in five versions, a day apart, with what a killed run left; and the versions' digests."""
    without_ray(monkeypatch)
    folder, digests = tmp_path / "index", []
    (tmp_path / "images").mkdir()
    for version in range(5):
        for number in range(3):
            name = tmp_path / "images" / f"{version}-{number}"
            Image.effect_noise((40 + number, 30 + version), 60).save(f"{name}.png")
            name.with_suffix(".txt").write_text("a picture")
        age(folder, 24)
        with lease(Storage(str(folder))) as held:
            outcome = build_index(
                sources=[SourceConfig(path=str(tmp_path / "images"))],
                filters=FilterConfig(min_side=30 + version),  # so that each version writes its verdicts anew
                buckets=BucketConfig(resolution=64),
                held=held,
                rows_per_file=2,
                resources=StageResources(),
                alerts=AlertConfig(),
                begin=lambda: None,
            )
        digests.append(outcome.manifest.digest)
    storage = Storage(str(folder))
    whole = next(file.name for file in storage.list("data"))
    beside = whole.rpartition("/")[0]
    storage.write(f"{beside}/killed.parquet", storage.read(whole))
    storage.write("lease/dead.broken", b"")
    age(folder, 30)
    storage.write(f"{beside}/today.parquet", storage.read(whole))
    return storage, digests


def job(**settings) -> CleanJob:
    return CleanJob.model_validate(settings)


def test_old_versions_go_with_their_files_and_what_is_named_or_young_stays(dataset, tmp_path, capsys):
    storage, digests = dataset
    run = Storage(str(tmp_path / "run"))
    run.write_json("run.json", {"pinned": digests[1]})
    before, folder = {pinned: rows(storage, pinned) for pinned in digests}, tmp_path / "index"
    there = files(folder)
    settings = {"datasets": [storage.uri], "runs": [run.uri], "keep": {"versions": 2}}
    clean.run(job(**settings))
    told = capsys.readouterr().out
    assert files(folder) == there
    assert "would be removed (apply=true)" in told
    clean.run(job(**settings, apply=True))
    told = capsys.readouterr().out
    gone = there - files(folder)
    assert {name for name in gone if name.startswith("manifests/")} == {f"manifests/{digests[n]}.json" for n in (0, 2)}
    assert "lease/dead.broken" in gone
    assert [name for name in gone if name.endswith("/killed.parquet") and name in told]
    assert [name for name in files(folder) if name.endswith("/today.parquet")]
    assert len([name for name in gone if name.startswith("files/")]) == 2
    assert len([name for name in gone if name.startswith("data/")]) > 2
    for pinned in (digests[1], digests[3], digests[4]):
        assert rows(storage, pinned) == before[pinned]
    assert rows(storage) == before[digests[4]]
    clean.run(job(**settings, apply=True))
    assert capsys.readouterr().out.count("nothing to remove") == 2


def test_the_version_that_an_evaluation_measures_on_stays(dataset, tmp_path):
    storage, digests = dataset
    settings = {"datasets": [storage.uri], "evaluations": [f"{tmp_path}/evaluation"], "keep": {"versions": 1}}
    with pytest.raises(FileNotFoundError, match="evaluation holds no evaluation"):
        clean.run(job(**settings, apply=True))
    before = rows(storage, digests[0])
    Storage(f"{tmp_path}/evaluation").write_json("pinned.json", {storage.uri: digests[0]})
    clean.run(job(**settings, apply=True))
    assert rows(storage, digests[0]) == before
    assert not storage.exists(f"manifests/{digests[1]}.json")


def test_what_was_replaced_a_moment_ago_stays_however_old_it_is(dataset):
    storage, digests = dataset
    os.utime(storage.path(f"manifests/{digests[4]}.json"))
    keep = RetentionConfig(versions=1)
    old = {item.name for item in left_in_dataset(storage, keep, [], time.time_ns() // 1000)}
    assert f"manifests/{digests[3]}.json" not in old
    assert f"manifests/{digests[2]}.json" in old


def test_wherever_removal_ends_all_that_is_left_is_whole_and_the_next_one_ends_alike(dataset, tmp_path):
    storage, _ = dataset
    keep, now_us = RetentionConfig(versions=1), time.time_ns() // 1000
    leftovers = left_in_dataset(storage, keep, [], now_us)
    ends = []
    for place in range(len(leftovers) + 1):
        copy = Storage(str(tmp_path / "copies" / str(place)))
        shutil.copytree(storage.uri, copy.uri)  # with its files' times
        remove(copy, leftovers[:place])
        for version in copy.list("manifests"):
            assert rows(copy, version.name.removeprefix("manifests/").removesuffix(".json"))
        remove(copy, left_in_dataset(copy, keep, [], now_us))
        ends.append(files(Path(copy.uri)))
    assert all(end == ends[0] for end in ends)
    assert len(leftovers) > 8


def test_the_newest_checkpoints_of_a_run_stay_and_unfinished_ones_go_when_they_are_old(tmp_path):
    run = Storage(str(tmp_path / "run"))
    run.write_json("run.json", {"pinned": "x"})
    for images in (8, 16, 24, 32):
        folder, file = run.folder(f"checkpoints/checkpoint_{images:012}"), "unet/rank_00000.safetensors"
        size = write_shard(folder, file, [Run("weight", 0, 3)], {"weight": (3,)}, {"weights": torch.ones(3)})
        if images != 24:
            folder.write_json(PROGRESS, {"format": 2, "images_seen": images, "files": {file: size}})
    young = {"runs": [run.uri], "keep": {"checkpoints": 1}, "apply": True}
    before = files(tmp_path)
    clean.run(job(**young))
    assert files(tmp_path) == before
    age(tmp_path, 25)
    clean.run(job(**young))
    assert list_checkpoints(run) == ["checkpoints/checkpoint_000000000032"]
    assert read_progress(run.folder("checkpoints/checkpoint_000000000032"))["images_seen"] == 32
    assert {name for name in files(tmp_path) if "checkpoint_" in name and "32" not in name} == set()


def test_pictures_that_the_list_names_stay(tmp_path):
    output = Storage(str(tmp_path / "pictures"))
    for name in ("pictures/a.png", "pictures/b.png", "contact_sheets/0000.png", "contact_sheets/0001.png"):
        output.write(name, b"png")
    sheets = ["contact_sheets/0000.png"]
    output.write_json("manifest.json", {"pictures": [{"file": "pictures/a.png"}], "contact_sheets": sheets})
    output.write("lease/dead.broken", b"")
    age(tmp_path, 25)
    clean.run(job(pictures=[output.uri], apply=True))
    assert {file.name for file in output.list()} == {"manifest.json", "pictures/a.png", "contact_sheets/0000.png"}


def test_a_folder_that_is_being_written_is_refused(dataset, tmp_path):
    storage, _ = dataset
    before = files(tmp_path)
    with lease(storage):
        held = files(tmp_path)
        with pytest.raises(JobError, match=r"is being written by process \d+ .* wait until") as refused:
            clean.run(job(datasets=[storage.uri], keep={"versions": 1}, apply=True))
        assert files(tmp_path) == held
    assert refused.value.code == USAGE_ERROR
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", ["datasets", "runs", "pictures"])
def test_a_folder_without_what_says_what_is_needed_loses_nothing(tmp_path, kind):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.parquet").write_bytes(b"rows")
    age(tmp_path, 1000)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no"):
        clean.run(job(**{kind: [str(tmp_path)]}, apply=True))
    assert "data/a.parquet" in files(tmp_path)


def test_no_folder_is_a_mistake_in_the_settings(tmp_path, capsys):
    (tmp_path / "clean.toml").write_text("apply = true\n")
    with pytest.raises(SystemExit) as ending:
        main(CleanJob, clean.run, clean.plan, [str(tmp_path / "clean.toml")], needs_ray=False)
    assert ending.value.code == USAGE_ERROR
    assert "name at least one folder" in capsys.readouterr().err
