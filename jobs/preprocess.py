"""Bring the index and the latents up to date with their sources: python -m jobs.preprocess CONFIG.toml"""

from __future__ import annotations

import time

from jobs.cli import JobError, main, settings
from jobs.config import PreprocessJob
from pipelines.preprocess.bucket import bucket_table
from pipelines.preprocess.lease import Lease, lease
from pipelines.schema import Manifest, read_manifest, require_manifest
from pipelines.storage import Storage
from pipelines.tracking import Lineage, closing, open_run, send_left, tracking_uri

SHOWN_FAILURES = 20  # the manifest has them all


def run(job: PreprocessJob) -> None:
    """Run the configured stages."""
    for stage in job.stages:
        run_stage(job, stage)


def run_stage(job: PreprocessJob, stage: str) -> None:
    """Run one stage on its dataset, which no other process may write meanwhile."""
    folder = job.index if stage == "index" else job.latents
    assert folder is not None
    with lease(Storage(folder, job.storage)) as held:
        _run_stage(job, stage, held)


def _run_stage(job: PreprocessJob, stage: str, held: Lease) -> None:
    """Run one stage under its MLflow run, and print what it did."""
    from pipelines.preprocess.pipeline import Outcome, build_index, build_latents

    index = Storage(job.index, job.storage)
    inputs = []
    if stage == "latents":
        inputs = [Lineage(name="index", uri=index.uri, manifest=require_manifest(index, "index"))]
    uri = tracking_uri(job.tracking)
    send_left(uri, held.dataset)
    name = job.tracking.run_name or stage
    tracked = open_run(uri, stage=stage, name=name, config=settings(job), inputs=inputs, output=held.dataset)
    begun = time.perf_counter()
    with closing(tracked):
        outcome: Outcome
        if stage == "index":
            outcome = build_index(
                sources=job.all_sources,
                filters=job.filters,
                buckets=job.buckets,
                held=held,
                rows_per_file=job.index_rows_per_file,
                resources=job.tasks,
            )
        else:
            outcome = build_latents(
                vae=job.vae,
                text=job.text,
                crop=job.crop,
                encode=job.encode,
                max_pixels=job.filters.max_pixels,
                sources=job.all_sources,
                index=index,
                held=held,
                resources=job.tasks,
            )
        seconds = time.perf_counter() - begun
        manifest = outcome.manifest
        tracked.json("manifest.json", vars(manifest))
        counts = {f"rows_{name}": float(count) for name, count in manifest.counts.items()}
        totals = {"rows": manifest.rows, "rows_made": outcome.done, "rows_failed": len(outcome.failures)}
        tracked.numbers(counts | totals | {"seconds": seconds})
    print(f"{stage}: {outcome.done} made in {seconds:.1f} s, {_describe(manifest)}")
    if outcome.failures:
        raise JobError(
            f"{stage}: {len(outcome.failures)} images could not be made, and are tried again by the next run:\n  "
            + "\n  ".join(f"{path}: {reason}" for path, reason in list(outcome.failures.items())[:SHOWN_FAILURES])
        )


def plan(job: PreprocessJob) -> None:
    """Print what would be done."""
    from pipelines.preprocess.sources.listing import list_source

    for source in job.all_sources:
        print(f"{source.name}: {list_source(source, job.storage).num_rows} images in {source.path}")
    table = bucket_table(job.buckets)
    print(f"buckets: {len(table)}, from {table[0][0]} x {table[0][1]} to {table[-1][0]} x {table[-1][1]} (h x w)")
    for kind, folder in (("index", job.index), ("latents", job.latents)):
        manifest = read_manifest(Storage(folder, job.storage), kind) if folder else None
        print(f"{kind}: {_describe(manifest) if manifest else 'nothing yet'}, in {folder}")
    if "latents" in job.stages:
        from pipelines.estimate import parameters, readable

        area, rows = max(h * w for h, w in table), job.encode.rows_per_file
        vae, text = parameters("vae", job.vae.preset), parameters("text", job.text.preset)
        print(f"encoders: VAE {vae:,} parameters, text {text:,}")
        width = 2 if job.encode.dtype == "bfloat16" else 4
        print(f"memory per encoder, without activations: {readable((vae + text) * width)}")
        print(f"memory: {readable(rows * area * 3)} of pixels for each task of {rows} images on its way")


def _describe(manifest: Manifest) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in manifest.counts.items())
    return f"{manifest.rows} rows ({counts})"


if __name__ == "__main__":
    main(PreprocessJob, run, plan)
