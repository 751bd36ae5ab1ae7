"""The stages of a pipeline one after another in this process, in place of Ray Data: for faults that need no cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pytest


class InProcess:
    """As a Ray dataset of units, as far as the pipelines use one."""

    def __init__(self, units: Sequence[pa.Table]) -> None:
        self.units, self.stages = units, []

    def map_batches(self, stage: Any, fn_constructor_args: tuple[Any, ...] = (), **_: Any) -> InProcess:
        """Add a stage: a function, or a class that is made when rows arrive."""
        self.stages.append((stage, fn_constructor_args))
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """The rows that come out."""
        calls: list[Callable[[pa.Table], pa.Table]] = [
            stage(*arguments) if isinstance(stage, type) else stage for stage, arguments in self.stages
        ]
        for unit in self.units:
            for call in calls:
                unit = call(unit)  # noqa: PLW2901
            yield from unit.to_pylist()


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let both pipelines run in this process."""
    from pipelines.preprocess import pipeline

    monkeypatch.setattr(pipeline, "dataset_of", InProcess)
    monkeypatch.setattr(pipeline, "attempt", None)


def forget_workers() -> None:
    """Make DeepSpeed forget the groups of workers that it has seen, and the numbers that it has given to modules."""
    import deepspeed.comm.comm
    import deepspeed.utils.groups
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0

    deepspeed.comm.comm.cdb = None
    for name, value in vars(deepspeed.utils.groups).items():
        if name.startswith("_") and name.endswith("_GROUP") and value is not None:
            setattr(deepspeed.utils.groups, name, None)
