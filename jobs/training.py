"""What the three training jobs do alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace

from jobs.cli import check_resources, settings, sole_writer, start_ray
from jobs.training_config import TrainDenoiserJob, TrainingJob, TrainVAEJob
from pipelines.schema import require_manifest
from pipelines.storage import Storage


def train_stage(job: TrainVAEJob | TrainDenoiserJob, stage: str) -> None:
    """Train, and print where the weights are."""
    from pipelines.train.launch import train

    def begin() -> None:
        start_ray(job)
        workers = job.workers
        gpus = {"GPU": float(workers.fewest)} if workers.gpu else {}
        check_resources(job, "workers", CPU=workers.fewest * workers.cpus, **gpus)

    begun = time.perf_counter()
    with sole_writer(Storage(job.output, job.storage)) as held:
        images = train(
            stage=stage,
            task=job.task,
            batch=job.batch,
            optimizer=job.optimizer,
            ema=job.ema,
            schedule=job.schedule,
            workers=job.workers,
            tracking=job.tracking,
            options=job.storage,
            held=held,
            settings=settings(job),
            begin=begin,
            labels=job.ray.label_selector,
            driver=job.driver if isinstance(job, TrainVAEJob) else None,
        )
    if images:
        print(
            f"{stage}: trained to {job.schedule.images} images in {time.perf_counter() - begun:.1f} s, in {job.output}"
        )
    else:
        print(f"{stage}: {job.output} is finished at {job.schedule.images} images; nothing to do")


def plan_stage(job: TrainVAEJob | TrainDenoiserJob, stage: str) -> None:
    """Print rows, buckets, steps, parameters and memory, and check the dataset against the networks."""
    from pipelines.estimate import parameters, readable, trained_parameters
    from pipelines.train.launch import check_latents
    from pipelines.train.optimizers import check_sizes

    if isinstance(job, TrainDenoiserJob):
        manifest = require_manifest(Storage(job.task.latents, job.storage), "latents")
        check_latents(job.task, manifest, job.storage)
        rows = manifest.rows
    else:
        manifest = require_manifest(Storage(job.task.index, job.storage), "index")
        rows = manifest.counts.get("kept", 0)
    networks = trained_parameters(job.task)
    check_sizes(job.optimizer, job.workers, networks)
    if isinstance(job, TrainVAEJob) and job.task.lpips is None:
        print(f"{stage}: no perceptual term, since task.lpips names no weights")
    print(f"{stage}: {rows} rows; " + ", ".join(f"{count} {name}" for name, count in manifest.counts.items()))
    if job.batch.validation_share:
        held_out = job.batch.validation_share * rows
        print(f"validation: about {held_out:.0f} rows are not trained on; {job.schedule.validation_rows} are measured")
    _print_steps(job, rows)
    for name, count in networks.items():
        print(f"{name}: {count:,} parameters")
    _print_memory(job, networks)
    if isinstance(job, TrainDenoiserJob) and manifest.fingerprint["stored_text"] == "tokens":
        count, width = parameters("text", job.task.text.preset), 2 if manifest.fingerprint["dtype"] != "float32" else 4
        print(f"  besides: text encoders, which the latents' tokens ask for, {readable(count * width)}")


def _print_memory(job: TrainVAEJob | TrainDenoiserJob, networks: Mapping[str, int]) -> None:
    from pipelines.estimate import memory_by_stage, readable

    workers = replace(job.workers, count=job.workers.fewest)  # who hold the most each
    configured = f"stage {workers.zero_stage}" + (", offloaded" if workers.offload_optimizer else "")
    stages = memory_by_stage(networks, workers, (0, 1, 2, 3), job.optimizer.moment_bytes)
    print(f"memory of each of {workers.count} workers in {workers.dtype}, estimated, without activations:")
    for name, memory in stages.items():
        device, host = (readable(sum(sizes.values())) for sizes in (memory.device, memory.host))
        fits = f"fits a GPU of {memory.fits} GiB" if memory.fits else "fits no GPU"
        print(f"  {name + (' (configured)' if name == configured else ''):<24}{device:>10}, {fits}; host {host}")
    for where, sizes in (("device", stages[configured].device), ("host", stages[configured].host)):
        print(f"  {where}: " + ", ".join(f"{name} {readable(size)}" for name, size in sizes.items()))


def _print_steps(job: TrainingJob, rows: int) -> None:
    batch, workers = job.batch, job.workers
    steps = -(-job.schedule.images // batch.global_size)
    accumulation = batch.global_size // (batch.micro_size * workers.count)
    print(
        f"steps: {steps} of {batch.global_size} images ({workers.count} workers x {batch.micro_size} images x "
        f"{accumulation} passes), {job.schedule.images / max(1, rows):.1f} epochs"
    )
    if workers.fewest < workers.count:
        passes = -(-batch.global_size // (batch.micro_size * workers.fewest))
        print(f"elastic: goes on with {workers.fewest} workers and {passes} passes, or as many as there are between")
