"""What nothing needs any more: old versions and data files that no version names, old checkpoints, pictures of no list.

What is found is in the order in which it may be removed: whatever ends the removal, a version or a checkpoint that is
still there is whole, and what has lost its name is found by the next one. Whoever removes holds the folder's lease.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from pipelines.checkpoints import CHECKPOINTS, PROGRESS, RUN, list_checkpoints
from pipelines.config import RetentionConfig
from pipelines.evaluate.config import PINNED
from pipelines.lease import FOLDER as LEASES
from pipelines.schema import MANIFEST, digest
from pipelines.storage import FileStat, Storage

MICROSECONDS_PER_HOUR = 3_600_000_000
PICTURE_FOLDERS = ("pictures", "contact_sheets")


@dataclass(frozen=True)
class Leftover:
    """A file that nothing needs."""

    name: str
    """Below its folder."""
    size: int
    """Bytes."""
    reason: str
    """Why nothing needs it, for a person."""


def left_in_dataset(dataset: Storage, keep: RetentionConfig, pinned: Collection[str], now_us: int) -> list[Leftover]:
    """What an index or latents can do without: all but the current version, the newest ones and those `pinned`.

    Raises FileNotFoundError where there is no dataset: nothing would say which files are needed.
    """
    if not dataset.exists(MANIFEST):
        raise FileNotFoundError(f"{dataset.uri} holds no dataset, and nothing says which files one would need")
    current = dataset.read_json(MANIFEST)
    before_us = now_us - int(keep.older_than_hours * MICROSECONDS_PER_HOUR)
    versions = sorted(dataset.list("manifests"), key=lambda file: (file.modified_us, file.name), reverse=True)
    needed = {digest(current), *pinned}
    old, named, lists = [], set(_data_files(dataset, current["files"])), {current["files"]}
    for place, version in enumerate(versions):
        made_us_of_next = versions[place - 1].modified_us if place else now_us
        if _digest_of(version) in needed or place < keep.versions or made_us_of_next > before_us:
            listing = dataset.read_json(version.name)["files"]
            lists.add(listing)
            named.update(_data_files(dataset, listing))
        else:
            old.append(version)
    unlisted = [file for file in dataset.list("files") if file.name not in lists]
    unnamed = [file for file in dataset.list("data") if file.name not in named]
    voids = [file for file in dataset.list(LEASES) if file.name.endswith(".broken")]
    return [
        *(Leftover(file.name, file.size, "a version that newer ones have replaced") for file in old),
        *_older(unlisted, before_us, "the list of a version that is gone, or that a killed run left"),
        *_older(unnamed, before_us, "rows that no version names"),
        *_older(voids, before_us, "the lease of a process that died"),
    ]


def left_in_run(run: Storage, keep: RetentionConfig, now_us: int) -> list[Leftover]:
    """What a training run can do without: all checkpoints but the newest, and parts of those that were never finished.

    Raises FileNotFoundError where there is no run.
    """
    if not run.exists(RUN):
        raise FileNotFoundError(f"{run.uri} holds no training run")
    before_us = now_us - int(keep.older_than_hours * MICROSECONDS_PER_HOUR)
    whole = list_checkpoints(run)
    old, files = set(whole[: -keep.checkpoints]), run.list(CHECKPOINTS)
    files.sort(key=lambda file: (not file.name.endswith(f"/{PROGRESS}"), file.name))  # what makes it one goes first
    found = []
    for file in files:
        match = re.match("[^/]+/[^/]+(?=/)", file.name)
        folder = match[0] if match else ""
        if folder in old:
            found += _older([file], before_us, "an old checkpoint")
        elif folder and folder not in whole:
            found += _older([file], before_us, "a checkpoint that was never finished")
    voids = [file for file in run.list(LEASES) if file.name.endswith(".broken")]
    return [*found, *_older(voids, before_us, "the lease of a process that died")]


def left_in_pictures(output: Storage, keep: RetentionConfig, now_us: int) -> list[Leftover]:
    """What a folder of generated pictures can do without: pictures that its list does not name.

    Raises FileNotFoundError where it has no list.
    """
    if not output.exists(MANIFEST):
        raise FileNotFoundError(f"{output.uri} holds no finished pictures: run jobs.generate to its end")
    listed = output.read_json(MANIFEST)
    named = {row["file"] for row in listed["pictures"]} | set(listed["contact_sheets"])
    before_us = now_us - int(keep.older_than_hours * MICROSECONDS_PER_HOUR)
    files = [file for folder in PICTURE_FOLDERS for file in output.list(folder) if file.name not in named]
    voids = [file for file in output.list(LEASES) if file.name.endswith(".broken")]
    return [
        *_older(files, before_us, "a picture that the list does not name"),
        *_older(voids, before_us, "the lease of a process that died"),
    ]


def pinned_by(run: Storage) -> str:
    """The digest of the dataset version that a training run reads. Raises FileNotFoundError where there is no run."""
    if not run.exists(RUN):
        raise FileNotFoundError(f"{run.uri} holds no training run")
    return str(run.read_json(RUN)["pinned"])


def pinned_by_evaluation(output: Storage) -> set[str]:
    """Digests of the index versions that an evaluation measures on. Raises FileNotFoundError where there is none."""
    if not output.exists(PINNED):
        raise FileNotFoundError(f"{output.uri} holds no evaluation")
    return set(output.read_json(PINNED).values())


def remove(folder: Storage, leftovers: Iterable[Leftover]) -> None:
    """Delete files in their order; one that has gone meanwhile is no error."""
    for item in leftovers:
        try:
            folder.delete(item.name)
        except FileNotFoundError:
            continue


def _older(files: Sequence[FileStat], before_us: int, reason: str) -> list[Leftover]:
    return [Leftover(file.name, file.size, reason) for file in files if file.modified_us < before_us]


def _digest_of(version: FileStat) -> str:
    return version.name.removeprefix("manifests/").removesuffix(".json")


def _data_files(dataset: Storage, listing: str) -> list[str]:
    return dataset.read_table(listing, ["name"]).column(0).to_pylist()
