"""How often in a row training may fail: Ray's policy counts over a job's life, in which weeks bring many failures."""

from __future__ import annotations

from typing import Any

from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines.checkpoints import newest_checkpoint
from pipelines.storage import Storage


class FailuresInARow(DefaultFailurePolicy):
    """Ray's policy, whose count of workers' failures begins anew once the run has a newer checkpoint."""

    def __init__(self, failure_config: FailureConfig, run: Storage) -> None:
        super().__init__(failure_config)  # type: ignore[arg-type]  # the stubs are Train V1's
        self._run, self._newest = run, newest_checkpoint(run)

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether the run is resumed."""
        try:
            newest = newest_checkpoint(self._run)
        except OSError as error:  # counted as if there were none: storage that is gone ends the run in its time
            print(f"warning: {self._run.uri}: its checkpoints cannot be listed: {error}", flush=True)
            newest = self._newest
        if newest != self._newest:
            self._newest, self._worker_group_failures = newest, 0
        return super().make_decision(training_failed_error)


class Trainer(TorchTrainer):
    """Ray's trainer under that policy. Ray has no public way to give one; this is where its controller gets its own."""

    def __init__(self, *, run: Storage, **settings: Any) -> None:
        super().__init__(**settings)
        self._run = run

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        given["failure_policy"] = FailuresInARow(given["failure_policy"].failure_config, self._run)
        return super()._initialize_and_run_controller(**given)  # type: ignore[misc]  # the stubs are Train V1's
