"""The training loop of one worker: the same for VAE, base and refiner."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from model.speed import compile_blocks
from model.unet import UNet
from model.vae import VAE
from pipelines.config import Size
from pipelines.lease import Lease
from pipelines.storage import Storage, StorageOptions
from pipelines.tracking import Ticket, Tracker
from pipelines.train.autoencoder import VAETask
from pipelines.train.batches import Slices
from pipelines.train.checkpointing import Checkpointer
from pipelines.train.config import (
    BatchConfig,
    DenoiserTaskConfig,
    EMAConfig,
    OptimizerConfig,
    ScheduleConfig,
    VAETaskConfig,
    WorkersConfig,
)
from pipelines.train.denoiser import DenoiserTask
from pipelines.train.engine import Engine
from pipelines.train.guard import record
from pipelines.train.machine import Machine
from pipelines.train.meter import Meter
from pipelines.train.operations import peak_tflops
from pipelines.train.outputs import export, sample_pictures, sampled_rows
from pipelines.train.plan import Plan, PlannedBatch
from pipelines.train.tasks import Task
from pipelines.train.validation import Validation, hide


@dataclass(frozen=True, kw_only=True)
class Training:
    """All that a worker is told."""

    task: DenoiserTaskConfig | VAETaskConfig
    batch: BatchConfig
    optimizer: OptimizerConfig
    ema: EMAConfig
    schedule: ScheduleConfig
    workers: WorkersConfig
    held: Lease
    """The job's right to write the folder of the run."""
    options: StorageOptions
    pinned: str
    """Digest of the manifest of the dataset that the run reads."""
    ticket: Ticket
    """The MLflow run, for worker 0."""
    board: Any
    """Handle of the driver's ProgressBoard."""

    @property
    def output(self) -> Storage:
        """Folder of the run."""
        return self.held.dataset


def train_on_worker(settings: dict[str, Training]) -> None:
    """Train until schedule.images, from the last checkpoint where there is one; then export the averaged weights."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # it prints each checkpoint on every worker
    training = settings["training"]
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    device, batch, schedule = ray.train.torch.get_device(), training.batch, training.schedule
    task = _task(training, device)
    validation = hide(task, training.output, batch, schedule, rank=rank, world=world)
    engines = _engines(task, training, device)
    plan = Plan(task.reader.files, batch)
    checkpointer = Checkpointer(training.output, schedule.keep_checkpoints, training.held.check)
    step = checkpointer.restore(engines)
    steps = -(-schedule.images // batch.global_size)
    slices = Slices(task.reader, plan, rank, world, step)
    peak = peak_tflops(training.workers.peak_tflops, device, training.workers.dtype) if rank == 0 else None
    meter = Meter(task.operations() if peak else None, peak)
    tracker, machine = (Tracker(training.ticket), Machine(device)) if rank == 0 else (None, None)
    sampled = sampled_rows(task.reader.files, schedule.sample_buckets)
    averaged = engines[next(iter(engines))]  # the network that is sampled from and exported

    for micro_batches in itertools.islice(slices, max(0, steps - step)):  # none if only the export was missed
        images_seen = (step + 1) * batch.global_size
        prepared = task.prepare(engines, micro_batches)
        for micro_batch, weight in micro_batches:
            meter.saw(micro_batch.count, micro_batch.bucket)
            for loss in task.losses(engines, micro_batch, prepared):
                engine = engines[loss.engine]
                engine.backward(loss.per_sample.mean() * weight)
                engine.step(images_seen)
                meter.add(loss, weight)
        step += 1
        last = step == steps
        if not _accepted(engines, task, plan.step(step - 1), images_seen, training):
            break
        validated = schedule.validation_images and (last or _due(schedule.validation_images, images_seen, batch))
        if last or validated or _due(schedule.log_images or batch.global_size, images_seen, batch):
            numbers = meter.read(engines, batch, images_seen, slices.waited_seconds)
            numbers["checkpoint_wait_seconds"] = checkpointer.waited()
            numbers |= {"lost_images": task.lost.record(training.output, images_seen, device)} if task.lost else {}
            numbers |= _measured(validation if validated else None, task, averaged)
            if tracker and machine:
                numbers |= machine.metrics()
                tracker.log(images_seen, numbers)
                training.board.show.remote(images_seen, numbers)
        if schedule.sample_images and (last or _due(schedule.sample_images, images_seen, batch)):
            _sample(tracker, task, averaged, images_seen, sampled, device=device)
        if last or _due(schedule.checkpoint_images, images_seen, batch):
            if tracker:
                tracker.keep()
            checkpointer.save(engines, step, images_seen)
    else:
        checkpointer.finish()
        _export(averaged, task, plan, training.held)
    checkpointer.finish()
    if tracker:
        tracker.leave()


def _export(averaged: Engine, task: Task, plan: Plan, held: Lease) -> None:
    weights = averaged.full_weights(averaged=True)
    first = torch.distributed.get_rank() == 0
    with averaged.averaged(here=first) as network:
        if first:
            held.check()
            export(task, network, weights, plan, held.dataset)


def _task(training: Training, device: torch.device) -> Task:
    if isinstance(training.task, DenoiserTaskConfig):
        return DenoiserTask(training.task, training.batch, training.pinned, training.options, device)
    decoders = max(1, int(training.workers.cpus))
    return VAETask(
        training.task,
        training.batch,
        training.pinned,
        training.options,
        device,
        output=training.output,
        decoders=decoders,
    )


def _engines(task: Task, training: Training, device: torch.device) -> dict[str, Engine]:
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(training.workers.cpus)))
    engines, first = {}, training.workers
    others = replace(first, zero_stage=min(first.zero_stage, 2))  # the VAE's loss goes back through it several times
    for place, (name, network) in enumerate(task.networks().items()):
        if isinstance(network, UNet | VAE):
            network.activation_checkpointing = training.workers.activation_checkpointing
            if training.workers.compile:
                compile_blocks(network)
        engines[name] = Engine(
            name,
            network.to(device).train(),
            optimizer=training.optimizer,
            schedule=training.schedule,
            batch=training.batch,
            workers=others if place else first,
            ema=training.ema if place == 0 else None,
            lr_scale=1.0 if place == 0 else getattr(training.task, "adversarial_lr_scale", 1.0),
        )
    return engines


def _measured(validation: Validation | None, task: Task, averaged: Engine) -> dict[str, float]:
    """The validation curves' next point, where there is to be one."""
    if validation is None:
        return {}
    with averaged.averaged() as network:
        return validation.measure(task, network)


def _sample(
    tracker: Tracker | None,
    task: Task,
    averaged: Engine,
    images_seen: int,
    sampled: Sequence[tuple[Size, np.ndarray]],
    *,
    device: torch.device,
) -> None:
    """Worker 0 shows what the averaged weights make; all workers draw it, since all would wait."""

    def added(pictures: torch.Tensor) -> torch.Tensor:
        there = pictures.to(device)
        torch.distributed.reduce(there, 0)
        return there.cpu()

    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with averaged.averaged() as network:
        pictures = sample_pictures(task, network, sampled, rank=rank, world=world, added=added)
    if tracker:
        for name, picture in pictures.items():
            tracker.image(images_seen, name, picture)


def _due(every: int, images_seen: int, batch: BatchConfig) -> bool:
    """Whether a multiple of `every` images lies in the step that ends at `images_seen`."""
    return images_seen // every > (images_seen - batch.global_size) // every


def _accepted(
    engines: dict[str, Engine], task: Task, planned: PlannedBatch, images_seen: int, training: Training
) -> bool:
    """Whether training goes on after a step: one that a guard has refused is written down, and may be one too many."""
    reasons = {name: reason for name, engine in engines.items() if (reason := engine.refusal())}
    if not reasons:
        return True
    ended = any(engine.guard.ends_the_run for engine in engines.values())
    if torch.distributed.get_rank() == 0:
        file = record(training.output, task.reader, planned, images_seen, reasons)
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        message = f"the step to {images_seen} images was refused: {told}. Its rows are in {training.output.uri}/{file}"
        print(message, flush=True)
        if ended:
            ray.get(training.board.end.remote(message))
    if ended:
        torch.distributed.barrier()  # nobody ends before it is told
    return not ended
