"""Rows that training never sees, and the curves that are measured on them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.heldout import is_held_out
from pipelines.schema import SCHEMA_VERSION, Column, DataFile, require_manifest, write_manifest
from pipelines.storage import Storage
from pipelines.train.config import BatchConfig, ScheduleConfig
from pipelines.train.plan import Plan
from pipelines.train.validation import HELD_OUT, TrainingRows, Validation, hide, hold_out

FILES = [("a", 7, (16, 16)), ("b", 1, (16, 24)), ("c", 12, (16, 24)), ("d", 3, (16, 16))]
SCHEDULE = ScheduleConfig(images=1, checkpoint_images=1)


def batch(micro_size: int = 4) -> BatchConfig:
    return BatchConfig(global_size=8, micro_size=micro_size, validation_share=0.3)


class Rows:
    """A reader whose batches are the rows that were asked for."""

    def __init__(self) -> None:
        self.files = [DataFile(name=name, rows=rows, bucket=bucket) for name, rows, bucket in FILES]

    def read(self, rows, bucket, first):
        return SimpleNamespace(rows=rows, bucket=bucket, first=first)

    def names(self, rows):
        return [f"{self.files[file].name}{row}" for file, row in rows.tolist()]


@pytest.fixture
def dataset(tmp_path) -> Storage:
    """As much of a latents dataset as holding out reads."""
    storage = Storage(str(tmp_path / "latents"))
    for name, rows, _ in FILES:
        storage.write_table(name, pa.table({Column.ID: [f"{name}{row}" for row in range(rows)]}))
    listed = [DataFile(name=name, rows=rows, bucket=bucket) for name, rows, bucket in FILES]
    write_manifest(storage, listed, kind="latents", counts={}, fingerprint={"schema": SCHEMA_VERSION}, parents={})
    return storage


def held_out(dataset: Storage, tmp_path, share: float = 0.3) -> tuple[Storage, set[tuple[str, int]]]:
    output = Storage(str(tmp_path / "run"))
    count = hold_out(output, dataset, require_manifest(dataset, "latents"), share)
    rows = {(row["file"], row["row"]) for row in output.read_table(HELD_OUT).to_pylist()}
    assert len(rows) == count
    return output, rows


def test_an_image_is_held_out_by_its_content_alone():
    ids = [f"image {number}" for number in range(20_000)]
    small, large = ({name for name in ids if is_held_out(name, share)} for share in (0.01, 0.1))
    assert small < large
    assert len(small) == pytest.approx(200, abs=50)
    assert len(large) == pytest.approx(2_000, abs=150)
    assert not any(is_held_out(name, 0.0) for name in ids)


def test_training_sees_every_row_that_is_not_held_out_and_no_other(dataset, tmp_path):
    output, hidden = held_out(dataset, tmp_path)
    assert hidden == {(name, k) for name, rows, _ in FILES for k in range(rows) if is_held_out(f"{name}{k}", 0.3)}
    task = SimpleNamespace(reader=Rows())
    everything, _ = task.reader, hide(task, output, batch(), SCHEDULE)
    plan, seen = Plan(task.reader.files, batch()), []
    assert plan.total_rows == 23 - len(hidden)
    for step in range(40):
        planned = plan.step(step)
        for file, row in task.reader.read(planned.rows, planned.bucket, 0).rows.tolist():
            assert everything.files[file].bucket == planned.bucket
            seen.append((everything.files[file].name, row))
    assert set(seen) == {(name, row) for name, rows, _ in FILES for row in range(rows)} - hidden


@pytest.mark.parametrize("hidden", [[0], [6], [0, 1, 2], [1, 3, 5], [5, 6], [0, 6]])
def test_rows_behind_hidden_ones_move_up(hidden):
    view = TrainingRows(Rows(), np.array([[0, row] for row in reversed(hidden)]))
    left = [row for row in range(7) if row not in hidden]
    rows = view.read(np.array([[0, place] for place in range(len(left))]), (16, 16), 0).rows
    assert rows[:, 1].tolist() == left
    assert view.names(np.array([[0, 0]])) == [f"a{left[0]}"]


def test_a_file_without_a_row_left_is_left_out():
    view = TrainingRows(Rows(), np.array([[1, 0]]))
    assert [file.name for file in view.files] == ["a", "c", "d"]
    assert view.read(np.array([[1, 11], [2, 0]]), (16, 24), 0).rows.tolist() == [[2, 11], [3, 0]]


def test_a_share_that_holds_out_nothing_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"batch\.validation_share: 1e-09 holds out 0 of the 23 rows"):
        held_out(dataset, tmp_path, 1e-9)


def test_validation_is_the_same_whatever_workers_and_passes(dataset, tmp_path):
    output, hidden = held_out(dataset, tmp_path, 0.5)

    def measured(world: int, micro_size: int, limit: int = 100) -> tuple[list[tuple[str, int, int]], list[int]]:
        """(file, row, number) of the rows that count on any worker, and how often each worker runs."""
        found, runs = [], []
        for rank in range(world):
            task = SimpleNamespace(reader=Rows())
            schedule = ScheduleConfig(images=1, checkpoint_images=1, validation_rows=limit)
            validation = hide(task, output, batch(micro_size), schedule, rank=rank, world=world)
            share = list(validation._share())
            runs.append(len(share))
            for counts, (rows, _, first) in share:
                if counts:
                    found += [(FILES[file][0], row, first + k) for k, (file, row) in enumerate(rows.tolist())]
        return sorted(found), runs

    alone, _ = measured(1, 4)
    assert {(file, row) for file, row, _ in alone} == hidden
    assert sorted(number for *_, number in alone) == list(range(len(hidden)))
    for world, micro_size in ((1, 1), (2, 4), (3, 2), (8, 4)):
        found, runs = measured(world, micro_size)
        assert found == alone
        assert len(set(runs)) == 1  # ZeRO 3 runs a network on all workers together
    fewer, _ = measured(2, 2, limit=5)
    assert len(fewer) == 5
    assert {(file, row) for file, row, _ in fewer} < hidden


def test_a_run_without_held_out_rows_keeps_its_reader(tmp_path):
    task = SimpleNamespace(reader=Rows())
    reader = task.reader
    plain = BatchConfig(global_size=8, micro_size=4)
    assert hide(task, Storage(str(tmp_path)), plain, SCHEDULE) is None
    assert task.reader is reader


def test_the_curves_are_means_over_rows(dataset, tmp_path):
    output, hidden = held_out(dataset, tmp_path)

    def validate(network, rows):
        return {"validation/place": torch.arange(rows.first, rows.first + len(rows.rows)).float()}

    task = SimpleNamespace(reader=Rows(), validate=validate)
    validation = hide(task, output, batch(3), SCHEDULE)
    assert isinstance(validation, Validation)
    assert validation.measure(task, torch.nn.Identity()) == {"validation/place": (len(hidden) - 1) / 2}
