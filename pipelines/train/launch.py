"""Start or resume a training run: check what it reads, open its MLflow run, and hand it to Ray Train."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from model.config import Conditioning
from pipelines import networks
from pipelines.checkpoints import RUN, newest_checkpoint, read_progress
from pipelines.config import DriverConfig, TrackingConfig, all_sources, flat, without_secrets
from pipelines.estimate import trained_parameters
from pipelines.lease import Lease
from pipelines.originals import Originals
from pipelines.progress import progress
from pipelines.runs import Work
from pipelines.schema import Manifest, require_manifest
from pipelines.sources import WEIGHTS_FILE
from pipelines.storage import Storage, StorageOptions
from pipelines.tracking import Lineage, closing, open_run, send_left, tracking_uri
from pipelines.train.config import (
    BatchConfig,
    DenoiserTaskConfig,
    EMAConfig,
    OptimizerConfig,
    ScheduleConfig,
    VAETaskConfig,
    WorkersConfig,
)
from pipelines.train.failures import Trainer
from pipelines.train.listed import LIST, list_images
from pipelines.train.loop import Training, train_on_worker
from pipelines.train.optimizers import check_installed, check_sizes
from pipelines.train.validation import hold_out

FREE_SETTINGS = (
    "schedule.",
    "tracking.",
    "storage.",
    "ray.",
    "driver.",
    "task.samples.",
    "task.lost_share",
    "batch.micro_size",
    "optimizer.guard.",
    "optimizer.implementation",
    "workers.count",
    "workers.min_count",
    "workers.grow_seconds",
    "workers.zero_stage",
    "workers.offload_optimizer",
    "workers.max_failures",
    "workers.cpus",
    "workers.peak_tflops",
    "workers.activation_checkpointing",
)
FREE_PATHS = ("output", "task.latents", "task.index", "task.source.path")
FREE_SOURCE_PATHS = re.compile(r"task\.sources\.\d+\.path")
LATENTS_PATHS = ("task.vae.path", "task.text.clip_l", "task.text.bigg")
"""Settings that may change when a run is resumed: by their beginning, and places, whose content is checked instead;
the last are those of a run on latents, whose fingerprint covers them."""
RAY_TRAIN = "ray_train"  # folder below a run's output that Ray Train has to itself
BOARD_POLL_SECONDS = 0.5


def train(
    *,
    stage: str,
    task: DenoiserTaskConfig | VAETaskConfig,
    batch: BatchConfig,
    optimizer: OptimizerConfig,
    ema: EMAConfig,
    schedule: ScheduleConfig,
    workers: WorkersConfig,
    tracking: TrackingConfig,
    options: StorageOptions,
    held: Lease,
    settings: Mapping[str, Any],
    begin: Callable[[], None],
    labels: Mapping[str, str],
    driver: DriverConfig | None = None,
) -> int:
    """Train to schedule.images; gives how many more that is than were finished before: 0 if there is nothing to do.

    The same call again resumes. `held` is the right to write the run's folder.

    `settings` is the job's resolved configuration; `begin` is called when all is checked and there is something to do,
    before the first use of Ray. Workers run on nodes with these `labels`. Raises ValueError where `settings` differ
    from those of the run in the folder, or where the dataset was not made by the networks that it names.
    """
    check_installed(optimizer)
    check_sizes(optimizer, workers, trained_parameters(task))
    output = held.dataset
    before = output.read_json(RUN) if output.exists(RUN) else None
    if before is not None:
        _check_unchanged(before["settings"], settings, output)
    kind, dataset = (
        ("latents", Storage(task.latents, options))
        if isinstance(task, DenoiserTaskConfig)
        else ("index", Storage(task.index, options))
    )
    manifest = require_manifest(dataset, kind, before and before["pinned"])
    uri = tracking_uri(tracking)
    done = (before or {}).get("finished_images") or 0
    if done >= schedule.images:
        send_left(uri, output)
        return 0
    _check_checkpoint(output, done)
    if isinstance(task, DenoiserTaskConfig):
        check_latents(task, manifest, options)
    elif before is not None:
        _check_list(output)
    begin()
    if isinstance(task, VAETaskConfig) and before is None:
        originals = Originals(all_sources(task.source, task.sources), options)
        list_images(output, dataset, manifest, originals, Work(driver or DriverConfig()))
    if batch.validation_share and before is None:
        hold_out(output, dataset, manifest, batch.validation_share)
    same = before is not None and before["tracking_uri"] == without_secrets(uri)
    tracked = open_run(
        uri,
        stage=stage,
        name=tracking.run_name,
        config=settings,
        inputs=[Lineage(name=kind, uri=dataset.uri, manifest=manifest)],
        output=output,
        key=before.get("tracking_key") if before and same else None,
        run_id=before["run_id"] if before and same else None,
    )
    run: dict[str, Any] = {
        "stage": stage,
        "tracking_uri": without_secrets(uri),
        "tracking_key": tracked.ticket.key,
        "run_id": tracked.ticket.run_id,
        "pinned": manifest.digest,
        "settings": settings,
    }
    if done:
        run["finished_images"] = done  # of the weights that are there, until longer training replaces them
    output.write_json(RUN, run)
    with closing(tracked):
        with tracked.lent() as ticket, _board(stage, schedule.images) as board:
            training = Training(
                task=task,
                batch=batch,
                optimizer=optimizer,
                ema=ema,
                schedule=schedule,
                workers=workers,
                held=held,
                options=options,
                pinned=manifest.digest,
                ticket=ticket,
                board=board,
            )
            _trainer(training, labels).fit()
            ended = ray.get(board.ended.remote())
        if ended is not None:
            raise RuntimeError(
                f"{output.uri}: training stopped: {ended}. The same command goes on from the last checkpoint; "
                "optimizer.guard says what is refused, and what then"
            )
        if not output.exists(WEIGHTS_FILE):
            raise RuntimeError(f"{output.uri}: training ended and left no {WEIGHTS_FILE}")
        run["finished_images"] = schedule.images
        held.check()
        output.write_json(RUN, run)
        tracked.model(f"{output.uri.rstrip('/')}/{WEIGHTS_FILE}", schedule.images)
    if run["run_id"] != tracked.ticket.run_id:  # the server answered only later
        output.write_json(RUN, run | {"run_id": tracked.ticket.run_id})
    return schedule.images - done


def check_latents(task: DenoiserTaskConfig, manifest: Manifest, options: StorageOptions) -> None:
    """Raise ValueError unless the latents were made by the networks that the task names, and hold what it needs."""
    for name, value in networks.fingerprint(task.vae, task.text, options).items():
        if manifest.fingerprint[name] != value:
            raise ValueError(
                f"task.latents {task.latents}: made with other weights of task.{name} "
                f"({manifest.fingerprint[name][:12]}, and the configured ones are {value[:12]}); "
                "name the weights that made them, or run jobs.preprocess with these"
            )
    unet = networks.unet_config(task.unet)
    reduction = networks.vae_config(task.vae).downsample * unet.downsample
    for bucket in manifest.counts:
        if any(int(side) % reduction for side in bucket.split("x")):
            raise ValueError(
                f"task.latents {task.latents}: bucket {bucket} does not divide by {reduction}, the reduction of VAE "
                f"and task.unet.preset {task.unet.preset!r}; preprocess with buckets.multiple = {reduction}"
            )
    missing = int(manifest.facts["without_aesthetic_score"])
    if missing and Conditioning.AESTHETIC_SCORE in unet.conditioning:
        raise ValueError(
            f"task.latents {task.latents}: {missing} of {manifest.rows} rows have no aesthetic score, which the "
            "refiner is conditioned on; give the source a score column and run jobs.preprocess again"
        )


def _trainer(training: Training, labels: Mapping[str, str]) -> Trainer:
    workers, output = training.workers, training.output
    count: Any = workers.count if workers.min_count is None else (workers.min_count, workers.count)
    gpu = {"GPU": 1} if workers.gpu else {}
    return Trainer(
        run=output,
        train_loop_per_worker=train_on_worker,
        train_loop_config={"training": training},
        torch_config=TorchConfig(backend="nccl" if workers.gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=count,
            elastic_resize_monitor_interval_s=workers.grow_seconds,  # type: ignore[call-arg]  # the stubs are Train V1's
            use_gpu=workers.gpu,
            resources_per_worker={"CPU": workers.cpus, **gpu},
            label_selector=dict(labels) or None,
        ),
        run_config=RunConfig(
            name=RAY_TRAIN,
            storage_path=output.root,
            storage_filesystem=output.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]
        ),
    )


def _check_checkpoint(output: Storage, done: int) -> None:
    """Raise ValueError unless the run's newest checkpoint is whole, or it has none and has not ended before."""
    checkpoint = newest_checkpoint(output)
    if checkpoint is not None:
        read_progress(output.folder(checkpoint))
    elif done:
        raise ValueError(
            f"{output.uri} was trained to {done} images, and its checkpoints are gone; to go on from its weights, name "
            "them in a run with another output"
        )


def _check_list(output: Storage) -> None:
    """Raise ValueError unless a run on images that has begun has its list of them: another order is another run."""
    if not output.exists(LIST):
        raise ValueError(
            f"{output.uri}: {LIST}, the order of its images, is not there: an earlier version began this run, or it "
            "was deleted; go on from its weights in another output"
        )


def _check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any], output: Storage) -> None:
    old, new = flat(before), flat(now)
    for key in old:  # a part that was left out, and is not now, has no key of its own any more but keys below it
        if any(name.startswith(f"{key}.") for name in new):
            new[key] = "given"
    free = FREE_PATHS + (LATENTS_PATHS if "task.latents" in old else ())
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old)  # a setting that a newer version has added is at its default
        if key in old
        and old[key] != new.get(key)
        and not key.startswith(FREE_SETTINGS)
        and key not in free
        and not FREE_SOURCE_PATHS.fullmatch(key)
    ]
    if changed:
        raise ValueError(
            f"{output.uri} holds a run with other settings; choose another output, or restore them:\n  "
            + "\n  ".join(changed)
        )


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where worker 0 shows how far it is, and the driver looks."""

    def __init__(self) -> None:
        self._latest: tuple[int, dict[str, float]] = (0, {})
        self._ended: str | None = None

    def end(self, reason: str) -> None:
        """Keep why training stops before its time."""
        self._ended = reason

    def ended(self) -> str | None:
        """Why training stopped; None if it has not."""
        return self._ended

    def show(self, images_seen: int, numbers: dict[str, float]) -> None:
        """Replace what is shown."""
        self._latest = (images_seen, numbers)

    def look(self) -> tuple[int, dict[str, float]]:
        """(images seen, numbers) shown last."""
        return self._latest


@contextmanager
def _board(stage: str, images: int) -> Iterator[Any]:
    """A board for the workers, drawn as a progress bar until the block ends."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # workers' nodes may go
    board = ProgressBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    stopped = threading.Event()

    def draw() -> None:
        with progress(f"train {stage}", images) as bar:
            while True:
                ended = stopped.wait(BOARD_POLL_SECONDS)
                images_seen, numbers = ray.get(board.look.remote())
                if images_seen != bar.n:
                    losses = {name: f"{value:.4f}" for name, value in numbers.items() if name.startswith("loss")}
                    bar.set_postfix(losses, refresh=False)
                    bar.update(images_seen - bar.n)
                if ended:
                    return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stopped.set()
        thread.join()
        ray.kill(board)
