"""Measure a trained network, or each checkpoint of a run as it appears: python -m jobs.evaluate CONFIG.toml"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from jobs.cli import JobError, check_resources, main, settings, sole_writer, start_ray
from jobs.config import EvaluateJob
from pipelines.checkpoints import RUN
from pipelines.config import without_secrets
from pipelines.lease import Lease
from pipelines.storage import Storage
from pipelines.tracking import Lineage, Run, Ticket, closing, joined, open_run, send_left, tracking_uri

if TYPE_CHECKING:
    from pipelines.evaluate.evaluate import Result

FEW_IMAGES = 2_048  # the width of Inception's features: fewer images have no covariance of full rank


def run(job: EvaluateJob) -> None:
    """Measure what has not been measured, and log it: of a training run, into its own MLflow run.

    No other process may write the folder of the figures meanwhile.
    """
    with sole_writer(Storage(job.output, job.storage)) as held:
        _run(job, held)


def _run(job: EvaluateJob, held: Lease) -> None:
    from pipelines.evaluate.evaluate import evaluate

    config, uri = job.evaluate, tracking_uri(job.tracking)
    start_ray(job)
    if _training_run(job, uri) is None and config.watch:
        print(f"evaluate: waits for a training run in {config.weights.path}", flush=True)
    check_resources(job, "evaluate.resources", GPU=config.resources.gpus * config.resources.workers[0])
    if config.generate is not None:
        resources = config.generate.resources
        check_resources(job, "evaluate.generate.resources", GPU=resources.gpus * resources.workers[0])
    results = evaluate(config, held)
    result = next(results)  # raises, or waits for a run's first checkpoint, before anything is logged
    with _mlflow_run(job, uri) as tracked:
        tracked.json("evaluation.json", settings(job))
        while True:
            tracked.evaluation(result.images_seen or 0, result.numbers, result.grid, result.time_ms)
            print(f"evaluate: {_line(result)}", flush=True)
            if (following := next(results, None)) is None:
                break
            result = following
    print(f"evaluate: results in {job.output}")


def plan(job: EvaluateJob) -> None:
    """Print what would be measured, and on which images."""
    from model.weights import Kind
    from pipelines.evaluate.evaluate import evaluated_rows, pinned_index
    from pipelines.evaluate.generate import checked_prompts
    from pipelines.evaluate.subjects import subjects

    config = job.evaluate
    index = pinned_index(config, Storage(job.output, job.storage))
    if config.generate is not None:
        checked_prompts(config.generate, job.storage, index.digest)
    rows = evaluated_rows(config, job.storage, index)
    weights, kind = config.weights, Kind.VAE if config.network == "vae" else Kind.UNET
    names = [name for name in ("inception", "clip", "lpips") if getattr(config, name) is not None]
    print(
        f"{config.network}: {weights.path}, on {len(rows)} images; networks that measure: {', '.join(names) or 'none'}"
    )
    if config.inception is not None and len(rows) < FEW_IMAGES:
        print(f"warning: a FID over {len(rows)} images is far above that over many; compare it with none over more")
    if config.watch:
        print(f"watch: each checkpoint, looked for every {config.poll_seconds:.0f} s, until the run is finished")
        return
    for subject in subjects(weights, kind, job.storage)[-1:]:
        print(f"would measure {subject.path}" + (f" at {subject.images_seen} images" if subject.images_seen else ""))


@contextmanager
def _mlflow_run(job: EvaluateJob, uri: str) -> Iterator[Run]:
    """The MLflow run of the training run that is measured, as it is; of other weights, one of its own."""
    training = _training_run(job, uri)
    if training is not None:
        with joined(training) as tracked:
            yield tracked
        return
    from pipelines.evaluate.evaluate import pinned_index

    index, output = Storage(job.evaluate.index, job.storage), Storage(job.output, job.storage)
    inputs = [Lineage(name="index", uri=index.uri, manifest=pinned_index(job.evaluate, output))]
    name = job.tracking.run_name
    send_left(uri, output)
    tracked = open_run(uri, stage="evaluate", name=name, config=settings(job), inputs=inputs, output=output, alone=True)
    with closing(tracked):
        yield tracked


def _training_run(job: EvaluateJob, uri: str) -> Ticket | None:
    """The way to that MLflow run; None where there is none (yet). Raises JobError where it is on another server."""
    from pipelines.evaluate.subjects import run_folder

    assert job.evaluate.weights.path is not None
    folder = run_folder(job.evaluate.weights.path, job.storage)
    if folder is None:
        return None
    training = folder.read_json(RUN)
    if training["tracking_uri"] != without_secrets(uri):
        raise JobError(
            f"tracking.uri: {without_secrets(uri)} is not where {folder.uri} is logged, and the figures of a run join "
            f"its own: set it to {training['tracking_uri']}"
        )
    return Ticket(
        uri=uri,
        stage=training["stage"],
        key=training["tracking_key"],
        run_id=training["run_id"],
        output=Storage(job.output, job.storage),
    )


def _line(result: Result) -> str:
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in result.numbers.items())
    at = f"{result.images_seen} images" if result.images_seen is not None else result.name
    return f"{at}: {numbers}" + ("" if result.measured else " (was there)")


if __name__ == "__main__":
    main(EvaluateJob, run, plan, needs_ray=False)
