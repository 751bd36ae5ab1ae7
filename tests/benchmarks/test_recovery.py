"""From kill -9 of one of two workers to the next new point of the curve, on the cluster of the tests.

At the size of a test a step takes no time, so this is what Ray Train takes to notice, to start two workers anew, and
what they take to import, to load the checkpoint and to read. Beside it, what the same run took from its start to its
first point. The final weights are checked to be an unbroken run's.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import train_base
from jobs.training_config import TrainBaseJob
from tests.conftest import SCHEDULE, Finished, killing
from tests.test_survival import assert_same_weights, checkpointed, copy_of

ROUNDS = 3


@pytest.mark.timeout(1200)
def test_time_from_kill_to_the_next_step(finished: Finished, tmp_path: Path) -> None:
    starts, recoveries = [], []
    for round_ in range(ROUNDS):
        root = tmp_path / str(round_)
        demo, killed_at = copy_of(finished, root, "latents", "vae"), []

        def at_half(base: Path = root / "base", at: list[float] = killed_at) -> bool:
            if 16 not in checkpointed(base):
                return False
            at.append(time.time())
            return True

        begun = time.time()
        with killing("RayTrainWorker", at_half) as killed:
            train_base.run(demo.load(TrainBaseJob, "train_base", *SCHEDULE[:1], "schedule.checkpoint_images=8"))
        assert killed
        assert_same_weights(root / "base", finished.root / "base")
        points = _times(root)
        starts.append(points[0] - begun)
        recoveries.append(next(at for at in points if at > killed_at[-1]) - killed_at[-1])
    print("\nseconds, two workers on one machine")
    for name, seconds in (
        ("from the start to the first point", starts),
        ("from the kill to the next point", recoveries),
    ):
        print(f"  {name:<36} {statistics.median(seconds):6.1f} ({min(seconds):.1f} to {max(seconds):.1f})")


def _times(root: Path) -> list[float]:
    """When each point of the curve was told, in seconds of the clock."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("sdxl-base").experiment_id])
    return sorted(point.timestamp / 1000 for point in client.get_metric_history(run.info.run_id, "images_seen"))
