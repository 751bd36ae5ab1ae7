"""How often training may fail, without a cluster."""

from __future__ import annotations

import inspect

from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy
from ray.train.v2.api.exceptions import WorkerGroupError

from pipelines.storage import Storage
from pipelines.train.failures import FailuresInARow, Trainer

DIED = WorkerGroupError("a worker died", {0: RuntimeError("NCCL error")})
RETRY, RAISE = FailureDecision.RETRY, FailureDecision.RAISE


def commit(run: Storage, images_seen: int) -> None:
    run.write_json(f"checkpoints/checkpoint_{images_seen}/progress.json", {"images_seen": images_seen})


def test_failures_count_from_the_newest_checkpoint_on(tmp_path, monkeypatch):
    run = Storage(str(tmp_path))
    commit(run, 8)
    policy = FailuresInARow(FailureConfig(max_failures=2), run)
    for images_seen in (16, 24, 32):
        assert [policy.make_decision(DIED) for _ in range(2)] == [RETRY, RETRY]
        commit(run, images_seen)
    assert [policy.make_decision(DIED) for _ in range(3)] == [RETRY, RETRY, RAISE]

    def gone(*_):
        raise OSError("the storage is gone")

    policy = FailuresInARow(FailureConfig(max_failures=1), run)
    monkeypatch.setattr("pipelines.train.failures.newest_checkpoint", gone)
    assert [policy.make_decision(DIED) for _ in range(2)] == [RETRY, RAISE]


def test_rays_controller_is_given_that_policy(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(TorchTrainer, "_initialize_and_run_controller", lambda _, **told: given.append(told))
    assert "failure_policy=create_failure_policy(self.run_config.failure_config)" in inspect.getsource(TorchTrainer.fit)
    trainer = object.__new__(Trainer)  # making one starts Ray
    trainer._run = Storage(str(tmp_path))
    trainer._initialize_and_run_controller(failure_policy=create_failure_policy(FailureConfig(max_failures=5)), more=1)
    policy = given[0].pop("failure_policy")
    assert isinstance(policy, FailuresInARow)
    assert policy.failure_config.max_failures == 5
    assert given == [{"more": 1}]
