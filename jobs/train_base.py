"""Train the base: python -m jobs.train_base CONFIG.toml"""

from __future__ import annotations

from jobs.cli import main
from jobs.training import plan_stage, train_stage
from jobs.training_config import TrainBaseJob


def run(job: TrainBaseJob) -> None:
    """Train, or go on where the run in the output folder stands."""
    train_stage(job, "base")


def plan(job: TrainBaseJob) -> None:
    """Print what would be done."""
    plan_stage(job, "base")


if __name__ == "__main__":
    main(TrainBaseJob, run, plan, needs_ray=False)
