"""Which steps are refused, by the numbers alone; what a refusal leaves untouched is shown in test_engine.py."""

import json
import math

import numpy as np
import pytest

from pipelines.storage import Storage
from pipelines.train.config import GuardConfig
from pipelines.train.guard import Guard, record
from pipelines.train.plan import PlannedBatch


def verdicts(guard: Guard, *norms: float) -> list[bool]:
    return [guard.judge(1.0, norm) is not None for norm in norms]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_or_gradient_that_is_no_number_is_refused_and_named(value):
    guard = Guard(GuardConfig())
    assert guard.judge(value, 1.0) == f"loss is {value}"
    assert guard.judge(1.0, value) == f"gradient norm is {value}"
    assert guard.judge(1.0, 1e30) is None  # however large, unless spike_factor is set
    assert guard.refused == 2


def test_a_jump_is_judged_by_the_mean_of_the_steps_that_were_taken():
    guard = Guard(GuardConfig(spike_factor=3, window_steps=2))
    assert verdicts(guard, 9.0, 1.0, 16.0, 14.0, 1.0) == [False, False, True, False, False]  # means: 9, 5, 5, 9.5, 5.25
    assert guard.judge(1.0, 16.0) == "gradient norm is 16, above 3 times its mean of 5.25"
    assert guard.judge(4.0, 1.0) == "loss is 4, above 3 times its mean of 1"


def test_a_run_ends_at_the_first_refusal_or_at_many_in_a_row():
    stop, skip = Guard(GuardConfig(action="stop")), Guard(GuardConfig(most_in_a_row=2))
    ends = []
    for norm in (1.0, math.nan, 1.0, math.nan, math.nan):
        for guard in (stop, skip):
            guard.judge(1.0, norm)
        ends.append((stop.ends_the_run, skip.ends_the_run))
    assert ends == [(False, False), (True, False), (False, False), (True, False), (True, True)]


def test_a_resumed_guard_judges_like_one_that_never_stopped():
    config = GuardConfig(spike_factor=2, window_steps=3)
    unbroken, first = Guard(config), Guard(config)
    norms = [0.1, math.nan, 0.7, 0.3, 0.9]
    assert verdicts(unbroken, *norms) == verdicts(first, *norms)
    resumed = Guard(config)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert verdicts(unbroken, 1.1, 0.5, 0.4, 1.0) == verdicts(resumed, 1.1, 0.5, 0.4, 1.0)
    assert resumed.state_dict() == unbroken.state_dict()


def test_the_rows_of_a_refused_step_are_written_down(tmp_path):
    class Names:
        files = ()

        def names(self, rows: np.ndarray) -> list[str]:
            return [f"{file}/{row}" for file, row in rows]

    planned = PlannedBatch((64, 128), np.array([[0, 3], [2, 1]]))
    run = Storage(str(tmp_path))
    name = record(run, Names(), planned, 16, {"unet": "loss is nan"})
    assert run.read_json(name) == {
        "images_seen": 16,
        "bucket": [64, 128],
        "reasons": {"unet": "loss is nan"},
        "rows": ["0/3", "2/1"],
    }
