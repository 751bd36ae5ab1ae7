"""What the three training jobs are: see jobs/config.py, whose rules they follow."""

from __future__ import annotations

from typing import Self, TypeVar

from pydantic import Field, model_validator

from jobs.checks import (
    check_denoiser_loss,
    check_fits_text,
    check_lpips,
    check_preset,
    check_sampling,
    check_sources,
    check_text,
    check_timesteps,
)
from jobs.config import Job
from model.config import DISCRIMINATOR_PRESETS, UNET_PRESETS, VAE_PRESETS, Conditioning
from pipelines.config import DriverConfig
from pipelines.train.config import (
    BatchConfig,
    DenoiserTaskConfig,
    EMAConfig,
    OptimizerConfig,
    ScheduleConfig,
    VAETaskConfig,
    WorkersConfig,
)


class TrainingJob(Job):
    """What the three training jobs share."""

    output: str
    """Folder of the run; the same command on it resumes."""
    batch: BatchConfig
    """One step's images."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """AdamW."""
    ema: EMAConfig = Field(default_factory=EMAConfig)
    """The averaged weights."""
    schedule: ScheduleConfig
    """How long, and how often what."""
    workers: WorkersConfig = Field(default_factory=WorkersConfig)
    """The processes that train together."""

    @model_validator(mode="after")
    def _check_workers(self) -> Self:
        batch, workers = self.batch, self.workers
        if workers.offload_optimizer and workers.zero_stage < 2:
            raise ValueError(f"workers.offload_optimizer: stage {workers.zero_stage} does not offload; take 2 or 3")
        if workers.offload_optimizer and self.optimizer.implementation == "8bit":
            raise ValueError(
                'optimizer.implementation: "8bit" saves memory of the GPU, where offloading leaves nothing'
            )
        if workers.zero_stage == 3 and self.optimizer.implementation == "8bit":
            raise ValueError(
                'optimizer.implementation: "8bit" works under stages 0 to 2, and workers.zero_stage is 3; take 2, or '
                '"auto"'
            )
        if workers.zero_stage == 3 and workers.compile:
            raise ValueError(
                "workers.compile: blocks are compiled whole, and stage 3 gathers weights within them; take "
                "workers.zero_stage 1 or 2, or leave workers.compile off"
            )
        if workers.fewest > workers.count:
            raise ValueError(f"workers.min_count: {workers.fewest} is more than workers.count, {workers.count}")
        passes = -(-batch.global_size // (batch.micro_size * workers.fewest))
        if workers.zero_stage == 0 and workers.dtype == "bfloat16" and passes > 1:
            raise ValueError(
                f"workers.zero_stage: stage 0 adds up {passes} passes in bfloat16, which loses digits; take 1, 2 or 3"
            )
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        batch, workers = self.batch, self.workers.count
        if batch.global_size % (batch.micro_size * workers):
            raise ValueError(
                f"batch.global_size: {batch.global_size} is not a multiple of "
                f"batch.micro_size x workers.count = {batch.micro_size} x {workers}"
            )
        if self.schedule.validation_images and not batch.validation_share:
            raise ValueError("schedule.validation_images: batch.validation_share is 0 and holds out nothing")
        return self


class TrainVAEJob(TrainingJob):
    """Train the VAE."""

    task: VAETaskConfig
    """Networks, images and loss."""
    driver: DriverConfig = Field(default_factory=DriverConfig)
    """The process that lists the images before the run begins."""

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        check_preset("task.vae.preset", self.task.vae.preset, VAE_PRESETS)
        check_sources("task.", self.task.source, self.task.sources)
        check_preset("task.discriminator", self.task.discriminator, DISCRIMINATOR_PRESETS)
        loss, lpips = self.task.loss, self.task.lpips
        for name in ("perceptual_weight", "kl_weight", "adversarial_weight", "adversarial_start_images"):
            if not 0 <= getattr(loss, name) < float("inf"):
                raise ValueError(f"task.loss.{name}: {getattr(loss, name)} is negative or not finite")
        if lpips is not None:
            check_lpips("task.lpips", lpips)
        return self


class TrainDenoiserJob(TrainingJob):
    """Train the base or the refiner."""

    task: DenoiserTaskConfig
    """Networks, latents and loss."""

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        task = self.task
        check_preset("task.unet.preset", task.unet.preset, UNET_PRESETS)
        check_preset("task.vae.preset", task.vae.preset, VAE_PRESETS)
        check_text("task.text", task.text)
        check_fits_text("task.unet.preset", UNET_PRESETS[task.unet.preset], task.text)
        check_timesteps("task.loss.timesteps", task.loss.timesteps, task.diffusion)
        check_denoiser_loss("task.loss", task.loss)
        if task.vae.path is None:
            raise ValueError("task.vae.path: name the VAE that made the latents")
        check_sampling("task.samples", task.samples, task.diffusion)
        return self


class TrainBaseJob(TrainDenoiserJob):
    """Train the base."""

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        return _conditioned_on(self, Conditioning.TARGET_SIZE, "the base")


class TrainRefinerJob(TrainDenoiserJob):
    """Train the refiner."""

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        if self.task.samples.refiner == "ensemble" and self.task.samples.handover == 0:
            raise ValueError("task.samples.handover: the refiner's pictures need a timestep to start from")
        return _conditioned_on(self, Conditioning.AESTHETIC_SCORE, "the refiner")


Denoiser = TypeVar("Denoiser", bound=TrainDenoiserJob)


def _conditioned_on(job: Denoiser, condition: Conditioning, what: str) -> Denoiser:
    if condition not in UNET_PRESETS[job.task.unet.preset].conditioning:
        raise ValueError(f"task.unet.preset: {job.task.unet.preset!r} is not conditioned on {condition}, as {what} is")
    return job
