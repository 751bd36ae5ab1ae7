"""Steps that are refused: a loss or a gradient that is no number, or is far above its mean, never reaches the weights.

Loss and gradient norm are the same numbers on all workers, so all refuse alike. A refused step leaves weights,
optimizer and average as they are, to the bit; its rows are written down, it is counted, and many in a row end the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipelines.storage import Storage
from pipelines.train.batches import Reader
from pipelines.train.config import GuardConfig
from pipelines.train.plan import PlannedBatch

REFUSED = "refused_steps"  # folder below a run's output, a file for each


class Guard:
    """Judges the steps of one network, and keeps the means that it judges by."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.refused = 0
        """Steps refused since the start of the run."""
        self.in_a_row = 0
        """Steps refused since the last that was not."""
        self._taken, self._means = 0, {"loss": 0.0, "gradient norm": 0.0}

    def judge(self, loss: float, gradient_norm: float) -> str | None:
        """Why the step must not be taken, in words; None if it may. Both numbers are means over all workers."""
        values = {"loss": loss, "gradient norm": gradient_norm}
        reason = next((why for name, value in values.items() if (why := self._fault(name, value))), None)
        if reason is not None:
            self.refused += 1
            self.in_a_row += 1
            return reason
        self.in_a_row = 0
        self._taken += 1
        for name, value in values.items():
            self._means[name] += (value - self._means[name]) / min(self._taken, self.config.window_steps)
        return None

    @property
    def ends_the_run(self) -> bool:
        """Whether the last step that was refused is one too many."""
        return self.in_a_row > 0 and (self.config.action == "stop" or self.in_a_row >= self.config.most_in_a_row)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed run refuses what an unbroken one does."""
        return {"refused": self.refused, "in_a_row": self.in_a_row, "taken": self._taken, "means": dict(self._means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        self.refused, self.in_a_row, self._taken = state["refused"], state["in_a_row"], state["taken"]
        self._means = dict(state["means"])

    def _fault(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}"
        factor, mean = self.config.spike_factor, self._means[name]
        if factor and self._taken >= self.config.window_steps and value > factor * mean:
            return f"{name} is {value:.6g}, above {factor:g} times its mean of {mean:.6g}"
        return None


def record(output: Storage, reader: Reader, planned: PlannedBatch, images_seen: int, reasons: Mapping[str, str]) -> str:
    """Write down a refused step, by network, with the names of its rows; gives the file's name below the run."""
    name = f"{REFUSED}/images_{images_seen:012}.json"
    height, width = planned.bucket
    rows = reader.names(np.asarray(planned.rows))
    output.write_json(
        name,
        {"images_seen": images_seen, "bucket": [height, width], "reasons": dict(reasons), "rows": rows},
    )
    return name
