"""Bring the index and the latents up to date with their sources: python -m jobs.preprocess CONFIG.toml"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING

from jobs.cli import (
    FAILURE,
    HELD,
    LOOK,
    USAGE_ERROR,
    JobError,
    check_resources,
    main,
    settings,
    sole_writer,
    start_ray,
)
from jobs.config import PreprocessJob
from pipelines.lease import Lease
from pipelines.preprocess.alert import HeldError
from pipelines.preprocess.bucket import bucket_table
from pipelines.preprocess.sources.inputs import passed_over_words
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import Survey, survey
from pipelines.runs import Work
from pipelines.schema import GARBLED, PASSED_OVER, Manifest, read_manifest, require_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.tracking import Lineage, Run, closing, open_run, send_left, tracking_uri

if TYPE_CHECKING:
    from pipelines.preprocess.pipeline import Outcome

SHOWN_FAILURES = 20  # the manifest has them all


def run(job: PreprocessJob) -> None:
    """Run the configured stages. Raises JobError, after the last, where a person should look at what was done.

    A stage that fails or does not start ends the job, and what was to be looked at before it is told with it.
    """
    looks: list[str] = []
    for number, stage in enumerate(job.stages):
        try:
            look = run_stage(job, stage)
        except JobError as error:
            code = FAILURE if number and error.code == USAGE_ERROR else error.code  # an earlier stage has done its work
            raise JobError("\n".join([*looks, str(error)]), code) from error
        except BaseException:  # of whatever kind, an interrupt too: it is told as it always is
            for line in looks:
                print(f"warning: {line}", file=sys.stderr)
            raise
        looks += [] if look is None else [look]
    if looks:
        raise JobError("\n".join(looks), LOOK)


def run_stage(job: PreprocessJob, stage: str) -> str | None:
    """Run one stage on its dataset, which no other process may write meanwhile; gives what a person should look at."""
    folder = job.index if stage == "index" else job.latents
    assert folder is not None
    with sole_writer(Storage(folder, job.storage)) as held:
        return _run_stage(job, stage, held)


def _run_stage(job: PreprocessJob, stage: str, held: Lease) -> str | None:
    """Run one stage, under an MLflow run if there is something to do, and print what it did."""
    inputs = []
    if stage == "latents":
        index = Storage(job.index, job.storage)
        inputs = [Lineage(name="index", uri=index.uri, manifest=require_manifest(index, "index"))]
    before, uri = read_manifest(held.dataset, stage), tracking_uri(job.tracking)
    send_left(uri, held.dataset)
    with ExitStack() as stack:

        @cache
        def tracked() -> Run:
            run = open_run(
                uri,
                stage=stage,
                name=job.tracking.run_name,
                config=settings(job),
                inputs=inputs,
                output=held.dataset,
                alone=True,
            )
            stack.enter_context(closing(run))
            return run

        def begin() -> None:
            tracked()
            start_ray(job)
            resources = job.encode.resources
            if stage == "latents" and resources.gpus:
                check_resources(job, "encode.resources", GPU=resources.gpus * resources.workers[0])
            if stage == "index" and job.scoring is not None and job.scoring.resources.gpus:
                resources = job.scoring.resources
                check_resources(job, "scoring.resources", GPU=resources.gpus * resources.workers[0])

        begun = time.perf_counter()
        try:
            outcome = _build(job, stage, held, begin)
        except HeldError as error:
            tracked().tags({"alert": "held", "alert.reason": str(error)})
            raise JobError(f"{stage}: {error}", HELD) from error
        manifest, failures, seconds = outcome.manifest, outcome.told.failures, time.perf_counter() - begun
        report = _report(job, stage, held, outcome, seconds)  # also where a killed run left none
        if outcome.done == len(failures) == 0 and before is not None and before.digest == manifest.digest:
            print(f"{stage}: nothing new, {_describe(manifest)}")
            return None
        _tell(tracked(), outcome, seconds)
        tracked().file("report.html", report.encode())
        print(f"{stage}: {outcome.done} made in {seconds:.1f} s, {_describe(manifest)}{_describe_work(outcome)}")
        if failures:
            raise JobError(
                f"{stage}: {len(failures)} rows could not be made, and are tried again by the next run:\n  "
                + "\n  ".join(f"{name}: {reason}" for name, reason in list(failures.items())[:SHOWN_FAILURES])
            )
        return None if outcome.look is None else f"{stage}: {outcome.look}"


def _build(job: PreprocessJob, stage: str, held: Lease, begin: Callable[[], None]) -> Outcome:
    from pipelines.preprocess.pipeline import build_index, build_latents

    if stage == "index":
        return build_index(
            sources=job.all_sources,
            filters=job.filters,
            buckets=job.buckets,
            held=held,
            rows_per_file=job.index_rows_per_file,
            resources=job.tasks,
            alerts=job.alerts,
            begin=begin,
            scoring=job.scoring,
            driver=job.driver,
        )
    return build_latents(
        vae=job.vae,
        text=job.text,
        crop=job.crop,
        encode=job.encode,
        max_pixels=job.filters.max_pixels,
        sources=job.all_sources,
        index=Storage(job.index, job.storage),
        held=held,
        resources=job.tasks,
        begin=begin,
        driver=job.driver,
    )


def _report(job: PreprocessJob, stage: str, held: Lease, outcome: Outcome, seconds: float) -> str:
    from pipelines.originals import Originals
    from pipelines.preprocess.latents_report import write_latents_report
    from pipelines.preprocess.report import write_report

    times = {"rows": outcome.done, "seconds": seconds, "stages": outcome.told.seconds} if outcome.done else None
    if stage == "latents":
        return write_latents_report(held.dataset, outcome.manifest, times)
    return write_report(held.dataset, outcome.manifest, times, Originals(job.all_sources, job.storage).read)


def _tell(run: Run, outcome: Outcome, seconds: float) -> None:
    """What the MLflow page shows of a stage."""
    manifest, change = outcome.manifest, outcome.change
    run.json("manifest.json", vars(manifest))
    numbers = {f"rows_{name}": float(count) for name, count in manifest.counts.items()}
    numbers |= {f"captions_{name}": float(count) for name, count in manifest.facts.get("captions", {}).items()}
    numbers |= {f"rows_{GARBLED}": float(manifest.facts[GARBLED])} if GARBLED in manifest.facts else {}
    numbers |= {PASSED_OVER: float(sum(manifest.facts.get(PASSED_OVER, {}).values()))}
    numbers |= {f"seconds_{name}": taken for name, taken in outcome.told.seconds.items()}
    numbers |= {f"work_{name}": float(count) for name, count in outcome.told.counts.items()}
    numbers |= {"rows": manifest.rows, "rows_made": outcome.done, "rows_failed": len(outcome.told.failures)}
    if change is not None:
        numbers |= {"rows_new": change.new, "reject_share_new": change.reject_share}
    run.numbers(numbers | {"seconds": seconds})
    if outcome.look is not None:
        run.tags({"alert": "look", "alert.reason": outcome.look})


def plan(job: PreprocessJob) -> None:
    """Print what would be done."""
    for source in job.all_sources:
        print(f"{source.name}: {_describe_source(survey(source, job.storage), job.storage)}, {source.path}")
    table = bucket_table(job.buckets)
    print(f"buckets: {len(table)}, from {table[0][0]} x {table[0][1]} to {table[-1][0]} x {table[-1][1]} (h x w)")
    for kind, folder in (("index", job.index), ("latents", job.latents)):
        manifest = read_manifest(Storage(folder, job.storage), kind) if folder else None
        print(f"{kind}: {_describe(manifest) if manifest else 'nothing yet'}, in {folder}")
    folder = Work(job.driver).folder
    free = shutil.disk_usage(folder).free
    print(f"driver: {job.driver.memory_mib} MiB of rows in memory, the rest in {folder}, with {free / 1e9:.1f} GB free")
    if "latents" in job.stages:
        from pipelines.estimate import parameters, readable
        from pipelines.sources import find

        area, rows = max(h * w for h, w in table), job.encode.rows_per_file
        vae, text = parameters("vae", job.vae.preset), parameters("text", job.text.preset)
        print(f"encoders: VAE {vae:,} parameters, text {text:,}")
        try:
            find(str(job.vae.path), "vae", job.storage, job.vae.allow_pickle)
        except FileNotFoundError as error:  # a VAE of one's own is trained on the index, which comes first
            print(f"warning: vae.path: {error}")
        width = 4 if job.encode.dtype == "float32" else 2
        text *= job.encode.text == "embeddings"
        print(f"memory per encoder, without activations: {readable((vae + text) * width)}")
        print(f"memory: {readable(rows * area * 3)} of pixels for each task of {rows} images on its way")


def _describe_source(found: Survey, options: StorageOptions) -> str:
    """What there is, as far as it shows before containers are read."""
    if found.kind == "folder":
        return f"folder of {sum(inputs.num_rows for inputs in list_inputs([found], options))} images"
    from pipelines.estimate import readable

    count, size = len(found.containers), sum(container.size for container in found.containers)
    return f"{found.kind} of {count} file{'s' * (count != 1)}, {readable(size)}"


def _describe(manifest: Manifest) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
    captions = manifest.facts.get("captions", {})
    dropped = sum(captions.values()) - captions.get("kept", 0)
    left_out = f", {dropped} captions of kept images left out" if dropped else ""
    garbled = f", captions of {manifest.facts[GARBLED]} images are not UTF-8" if GARBLED in manifest.facts else ""
    passed = manifest.facts.get(PASSED_OVER, {})
    rest = f"; {passed_over_words(passed)}" if passed else ""
    return f"{manifest.rows} rows ({counts}){left_out}{garbled}{rest}"


def _describe_work(outcome: Outcome) -> str:
    counts = outcome.told.counts
    if not counts:
        return ""
    filled, encoded = counts["vae_slots_filled"] / max(1, counts["vae_slots"]), counts["captions_encoded"]
    return f"; {filled:.0%} of the VAE's places filled, {encoded} of {counts['captions']} captions encoded"


if __name__ == "__main__":
    main(PreprocessJob, run, plan, needs_ray=False)
