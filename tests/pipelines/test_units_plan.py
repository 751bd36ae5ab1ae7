"""Units lie beside the dataset while they are made, and only then."""

from __future__ import annotations

import pyarrow as pa
import pytest

from pipelines.lease import lease
from pipelines.preprocess import plan as module
from pipelines.preprocess.plan import PLANS, planned, read_units, remove_plans
from pipelines.preprocess.write import cut
from pipelines.schema import INDEX_SCHEMA
from pipelines.storage import Storage


@pytest.fixture
def dataset(tmp_path):
    return Storage(str(tmp_path / "dataset"))


def index_rows(count: int) -> pa.Table:
    known = {
        "source": "s",
        "file_size": 1,
        "captions": ["a", None],
        "caption_weights": [1.0, 0.5],
        "original_size": [1, 2],
    }
    rows = [dict.fromkeys(INDEX_SCHEMA.names) | known | {"key": f"{n:03}", "path": f"{n}.png"} for n in range(count)]
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def test_tasks_read_the_units_as_they_were_and_ray_knows_of_some_at_a_time(dataset, monkeypatch):
    monkeypatch.setattr(module, "TICKETS", 3)
    monkeypatch.setattr(module, "ROWS_AT_A_TIME", 50)
    units = cut(index_rows(201), 20)
    with lease(dataset) as held, planned(iter(units), held) as plan:
        waves = list(plan.waves())
        assert [len(wave) for wave in waves] == [3, 3, 3, 2]
        assert plan.rows == 201
        assert len(dataset.list(PLANS)) == 4
        assert [read_units(ticket, dataset) for wave in waves for ticket in wave] == units
    assert (dataset.list(PLANS), dataset.folders(PLANS)) == ([], set())


def test_a_plan_goes_whatever_ends_it(dataset):
    def failing():
        yield from cut(index_rows(3), 1)
        raise ValueError("no units any more")

    with lease(dataset) as held, pytest.raises(ValueError, match="no units"), planned(failing(), held):
        pytest.fail("there is no whole plan")
    with lease(dataset) as held, pytest.raises(KeyError), planned(cut(index_rows(3), 1), held):
        raise KeyError
    assert dataset.list(PLANS) == []
    dataset.write(f"{PLANS}/of-a-killed-run/000000", b"units")
    with lease(dataset) as held, planned(cut(index_rows(3), 1), held):
        remove_plans(dataset)  # as the next owner does, where this one has lost its lease
        assert (dataset.list(PLANS), dataset.folders(PLANS)) == ([], set())


def test_nothing_is_a_plan_without_files(dataset):
    with lease(dataset) as held, planned([], held) as plan:
        assert (list(plan.waves()), plan.rows) == ([], 0)
