"""Train the refiner: python -m jobs.train_refiner CONFIG.toml"""

from __future__ import annotations

from jobs.cli import main
from jobs.training import plan_stage, train_stage
from jobs.training_config import TrainRefinerJob


def run(job: TrainRefinerJob) -> None:
    """Train, or go on where the run in the output folder stands."""
    train_stage(job, "refiner")


def plan(job: TrainRefinerJob) -> None:
    """Print what would be done."""
    plan_stage(job, "refiner")


if __name__ == "__main__":
    main(TrainRefinerJob, run, plan, needs_ray=False)
