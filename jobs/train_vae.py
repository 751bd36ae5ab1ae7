"""Train the VAE: python -m jobs.train_vae CONFIG.toml"""

from __future__ import annotations

from jobs.cli import main
from jobs.training import plan_stage, train_stage
from jobs.training_config import TrainVAEJob


def run(job: TrainVAEJob) -> None:
    """Train, or go on where the run in the output folder stands."""
    train_stage(job, "vae")


def plan(job: TrainVAEJob) -> None:
    """Print what would be done."""
    plan_stage(job, "vae")


if __name__ == "__main__":
    main(TrainVAEJob, run, plan, needs_ray=False)
