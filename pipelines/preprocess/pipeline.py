"""Preprocessing as two lists of stages: sources -> index, and index -> latents. Both stream through Ray Data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from pipelines import networks
from pipelines.config import CropConfig, DriverConfig, SourceConfig, StageResources, TextWeightsConfig, WeightsConfig
from pipelines.lease import Lease
from pipelines.originals import Originals
from pipelines.preprocess.alert import Change, judge
from pipelines.preprocess.bucket import assign_buckets, blocks_by_bucket, bucket_table
from pipelines.preprocess.config import (
    AlertConfig,
    BucketConfig,
    EncodeConfig,
    FilterConfig,
    ScoringConfig,
)
from pipelines.preprocess.crop import crop_images
from pipelines.preprocess.encode import Encoder, checked
from pipelines.preprocess.filter import MEASURED
from pipelines.preprocess.kept import Kept
from pipelines.preprocess.measure import measure
from pipelines.preprocess.plan import Plan, planned, read_units, remove_plans
from pipelines.preprocess.sources.listing import ERROR, NUMBER, Inputs, forget_listings, unlisted, write_listings
from pipelines.preprocess.sources.survey import Container, survey
from pipelines.preprocess.stored import Stored, Wanted, select, stored, want
from pipelines.preprocess.verdicts import Scores, decide_all
from pipelines.preprocess.write import FAILURE, collect_garbage, cut_all, write_units
from pipelines.progress import progress
from pipelines.runs import Work
from pipelines.schema import (
    COMPUTED,
    GARBLED,
    MANIFEST,
    PASSED_OVER,
    SCHEMA_VERSION,
    Column,
    DataFile,
    Manifest,
    data_files,
    digest,
    read_manifest,
    require_manifest,
    write_manifest,
)
from pipelines.stages import actors, attempt, dataset_of, tasks
from pipelines.storage import Storage

SHOWN_ERRORS = 10  # containers whose columns are wrong, most often all alike
INDEX_COMPRESSION, LATENTS_COMPRESSION = "zstd", "none"  # loaders read single rows of latents in place


@dataclass(frozen=True)
class Told:
    """What tasks tell of the units that they wrote."""

    failures: dict[str, str] = field(default_factory=dict)
    """Rows that could not be made, as source:path, and why; of an image's further crops, as source:path, crop 1."""
    seconds: Counter[str] = field(default_factory=Counter)
    """What the tasks of each stage took together."""
    counts: Counter[str] = field(default_factory=Counter)
    """What stages count: places in passes of the VAE, captions."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of one stage did."""

    manifest: Manifest
    """The dataset as it is now."""
    done: int
    """Rows that this run made."""
    told: Told
    """What could not be made, and what the rest took."""
    change: Change | None = None
    """Index: how it differs from the one before."""
    look: str | None = None
    """Index: what a person should look at."""


def build_index(
    *,
    sources: Sequence[SourceConfig],
    filters: FilterConfig,
    buckets: BucketConfig,
    held: Lease,
    rows_per_file: int,
    resources: StageResources,
    alerts: AlertConfig,
    begin: Callable[[], object],
    scoring: ScoringConfig | None = None,
    driver: DriverConfig | None = None,
) -> Outcome:
    """Bring the index up to date with its sources: one row for every input, kept or with its reason.

    `begin` is called before the first use of Ray, if there is work for it. Raises HeldError where `alerts` withhold
    the commit.
    """
    dataset = held.dataset
    dataset.remove_incomplete()
    remove_plans(dataset)
    table = bucket_table(buckets)
    fingerprint = {
        "schema": SCHEMA_VERSION,
        "max_pixels": filters.max_pixels,  # the one filter that decides what is measured
        "buckets": [list(size) for size in table],
    }
    folder = _folder(fingerprint)
    surveys = [survey(source, dataset.options) for source in sources]
    if containers := unlisted(surveys, dataset):
        begin()
        _list_containers(containers, dataset, resources)
    work = Work(driver or DriverConfig())
    inputs = Inputs(surveys, dataset, work.keep)
    wanted = want(inputs.keys(), work)
    have, told = stored(dataset, folder, wanted, work), Told()
    if done := have.missing:
        originals = Originals(sources, dataset.options)

        def stages(units: Dataset) -> Dataset:
            measuring = partial(measure, originals=originals, filters=filters, attempt=attempt)
            writing = partial(write_units, dataset=dataset, folder=folder, compression=INDEX_COMPRESSION)
            return (
                units.map_batches(measuring, **tasks(resources))
                .map_batches(partial(assign_buckets, table=table), **tasks(resources))
                .map_batches(writing, **tasks(resources))
            )

        with planned(cut_all(inputs.rows(~have.there), rows_per_file), held) as plan:
            begin()
            told = _run(plan, stages, "index", dataset, resources)
        have = stored(dataset, folder, wanted, work)
    facts: dict[str, Any] = {PASSED_OVER: dict(inputs.passed_over.most_common())} if inputs.passed_over else {}
    scores: Stored | None = None
    if scoring is not None:
        facts[COMPUTED], scores = _score(
            scoring,
            wanted,
            have,
            told,
            held=held,
            originals=Originals(sources, dataset.options),
            max_pixels=filters.max_pixels,
            resources=resources,
            begin=begin,
        )
    manifest, change, look = _commit_index(
        held, folder, have, scores, fingerprint=fingerprint, facts=facts, filters=filters, alerts=alerts
    )
    forget_listings(surveys, dataset)
    return Outcome(manifest=manifest, done=done, told=told, change=change, look=look)


def build_latents(
    *,
    vae: WeightsConfig,
    text: TextWeightsConfig,
    crop: CropConfig,
    encode: EncodeConfig,
    max_pixels: int,
    sources: Sequence[SourceConfig],
    index: Storage,
    held: Lease,
    resources: StageResources,
    begin: Callable[[], object],
    driver: DriverConfig | None = None,
) -> Outcome:
    """Bring the latents up to date with the index: a row for every crop of every kept image, by bucket.

    `begin` is called before the first use of Ray, if there is work for it.
    """
    dataset = held.dataset
    dataset.remove_incomplete()
    remove_plans(dataset)
    index_manifest = require_manifest(index, "index")
    made_by = networks.fingerprint(vae, text, dataset.options) | {
        "schema": SCHEMA_VERSION,
        "buckets": index_manifest.fingerprint["buckets"],
        "crop": asdict(crop),
        "dtype": encode.dtype,
        "stored_text": encode.text,
        # Only where it is set: so latents that were encoded whole stay what they are.
        **({"tile": encode.tile} if encode.tile else {}),
    }
    folder = _folder(made_by)
    originals, work = Originals(sources, dataset.options), Work(driver or DriverConfig())
    kept = Kept(index, index_manifest, encode.crops, originals, work)
    wanted = want(kept.keys(), work)
    have = stored(dataset, folder, wanted, work)
    told = Told()
    if missing := have.missing:
        text_config = networks.text_config(text)

        def stages(units: Dataset) -> Dataset:
            cropping = partial(crop_images, originals=originals, crop=crop, max_pixels=max_pixels, attempt=attempt)
            encoder = (vae, text, encode, dataset.options)
            writing = partial(write_units, dataset=dataset, folder=folder, compression=LATENTS_COMPRESSION)
            return (
                units.map_batches(cropping, **tasks(resources))
                .map_batches(Encoder, fn_constructor_args=encoder, **actors(encode.resources))
                .map_batches(writing, **tasks(resources))
            )

        blocks = blocks_by_bucket(
            kept.rows(~have.there),
            encode.rows_per_file,
            buckets=index_manifest.fingerprint["buckets"],
            sources=[source.name for source in sources],
            work=work,
        )
        with planned(checked(blocks, text_config) if encode.text == "embeddings" else blocks, held) as plan:
            begin()
            told = _run(plan, stages, "latents", dataset, resources)
        have = stored(dataset, folder, wanted, work)
    facts = {
        "vae": asdict(networks.vae(vae, dataset.options).config),
        "text": asdict(networks.text_config(text)),
        "without_aesthetic_score": kept.without_score,
    }
    manifest = _commit_latents(
        held=held,
        folder=folder,
        have=have,
        made_by=made_by,
        facts=facts,
        parents={"index": index_manifest.digest},
        failures=told.failures,
        weights=kept.weights,
    )
    return Outcome(manifest=manifest, done=missing - len(told.failures), told=told)


def _list_containers(containers: Sequence[Container], dataset: Storage, resources: StageResources) -> None:
    """List containers, each in a task of its own. Raises ValueError with what is wrong with the first ones."""
    units = [pa.table({NUMBER: [number]}) for number in range(len(containers))]
    stage = partial(write_listings, containers=containers, dataset=dataset)
    errors = []
    with progress("list", len(containers), unit="files") as bar:
        for row in dataset_of(units).map_batches(stage, **tasks(resources)).iter_rows():
            errors += [row[ERROR]] if row[ERROR] is not None else []
            bar.update(1)
    if errors:
        raise ValueError("\n  ".join(sorted(errors)[:SHOWN_ERRORS]))


def _score(
    scoring: ScoringConfig,
    wanted: Wanted,
    have: Stored,
    told: Told,
    *,
    held: Lease,
    originals: Originals,
    max_pixels: int,
    resources: StageResources,
    begin: Callable[[], object],
) -> tuple[str, Stored]:
    """Score the images that these weights have not scored, and add to what tasks told; gives the scores' folder, and
    what is stored there."""
    from pipelines.preprocess.score import ASKED, Scorer, fingerprint

    dataset = have.dataset
    folder = f"scores/{digest(fingerprint(scoring, dataset.options))[:12]}"
    scores = stored(dataset, folder, wanted, have.work)
    unread = pa.array(MEASURED, pa.string())
    unscored = have.read_wanted(ASKED, ~scores.there)
    readable = (rows.filter(pc.invert(pc.is_in(rows.column(Column.REJECT_REASON), unread))) for rows in unscored)

    def stages(units: Dataset) -> Dataset:
        scorer = (scoring, originals, max_pixels, dataset.options)
        writing = partial(write_units, dataset=dataset, folder=folder, compression=INDEX_COMPRESSION)
        return units.map_batches(Scorer, fn_constructor_args=scorer, **actors(scoring.resources)).map_batches(
            writing, **tasks(resources)
        )

    with planned(cut_all(readable, scoring.rows_per_file), held) as plan:
        if not plan.rows:
            return folder, scores
        begin()
        _run(plan, stages, "scores", dataset, resources, told=told)
    return folder, stored(dataset, folder, wanted, have.work)


def _folder(fingerprint: Mapping[str, Any]) -> str:
    """Where the data files of a fingerprint lie."""
    return f"data/{digest(fingerprint)[:12]}"


def _run(
    plan: Plan,
    stages: Callable[[Dataset], Dataset],
    label: str,
    dataset: Storage,
    resources: StageResources,
    *,
    told: Told | None = None,
) -> Told:
    """Run all units of a plan through the stages; what their tasks tell is added to `told`."""
    told, done = told or Told(), 0
    read = partial(read_units, dataset=dataset)
    with progress(label, plan.rows) as bar:
        for unit in chain.from_iterable(
            stages(dataset_of(tickets).map_batches(read, **tasks(resources))).iter_rows() for tickets in plan.waves()
        ):
            told.seconds.update(dict(unit["seconds"]))
            told.counts.update(dict(unit["counts"]))
            told.failures.update((_failed_name(row), row[FAILURE]) for row in unit["failures"])
            bar.update(unit["rows"] + len(unit["failures"]))
        done = bar.n
    if done != plan.rows:
        raise RuntimeError(f"{label}: {plan.rows} rows went in and {done} came out")
    return told


def _failed_name(row: Mapping[str, Any]) -> str:
    name = f"{row[Column.SOURCE]}:{row[Column.PATH]}"
    return f"{name}, crop {row[Column.CROP]}" if row[Column.CROP] else name


def _commit_index(
    held: Lease,
    folder: str,
    have: Stored,
    scores: Stored | None,
    *,
    fingerprint: Mapping[str, Any],
    facts: Mapping[str, Any],
    filters: FilterConfig,
    alerts: AlertConfig,
) -> tuple[Manifest, Change, str | None]:
    """Make exactly the wanted inputs the index, every verdict decided over all of them."""
    dataset = held.dataset
    before = read_manifest(dataset, "index")
    committed = {file.name for file in data_files(dataset, before)} if before else set()
    computed = None if scores is None else Scores(scores)
    verdicts = decide_all(have, filters, computed, committed)
    change = verdicts.change(before.counts.get("kept", 0) if before else 0)
    look = judge(change, alerts)
    files = select(have, None, verdicts, INDEX_COMPRESSION)
    garbled = {GARBLED: verdicts.garbled} if verdicts.garbled else {}
    manifest = _commit(
        held,
        folder,
        [DataFile(name=name, rows=rows) for name, rows in files],
        expected=have.distinct,
        kind="index",
        counts=dict(sorted(verdicts.reasons.items())),
        fingerprint=fingerprint,
        parents={},
        facts={**facts, **garbled, "captions": dict(sorted(verdicts.captions.items()))},
    )
    return manifest, change, look


def _commit_latents(
    *,
    held: Lease,
    folder: str,
    have: Stored,
    made_by: Mapping[str, Any],
    facts: Mapping[str, Any],
    parents: Mapping[str, str],
    failures: Mapping[str, str],
    weights: np.ndarray,
) -> Manifest:
    """Make exactly the wanted rows the dataset, less those that failed. A file has rows of one of the `weights`."""
    files = []
    for weight in np.unique(weights).tolist():
        for name, count in select(have, weights == weight, None, LATENTS_COMPRESSION):
            files.append(DataFile(name=name, rows=count, bucket=_bucket_of(name), weight=weight))
    counts: Counter[str] = Counter()
    for file in files:
        counts[_folder_of(file.name)] += file.rows
    return _commit(
        held,
        folder,
        files,
        expected=have.distinct - len(failures),
        kind="latents",
        counts=dict(sorted(counts.items())),
        fingerprint=made_by,
        parents=parents,
        facts=facts,
        failed=dict(sorted(failures.items())),
    )


def _folder_of(name: str) -> str:
    return name.split("/")[-2]


def _bucket_of(name: str) -> tuple[int, int]:
    height, width = _folder_of(name).split("x")
    return int(height), int(width)


def _commit(held: Lease, folder: str, files: Sequence[DataFile], expected: int, **content: Any) -> Manifest:
    dataset = held.dataset
    rows = sum(file.rows for file in files)
    if rows != expected:
        raise RuntimeError(
            f"{dataset.uri}: {expected} rows are wanted and the files hold {rows}; nothing was committed"
        )
    before = read_manifest(dataset, content["kind"]) if dataset.exists(MANIFEST) else None

    def check() -> None:
        held.check()
        gone = {file.name for file in files} - {file.name for file in dataset.list(folder)}
        if gone:
            raise OSError(f"{dataset.uri}: {len(gone)} files went while they were committed, as {min(gone)}: run again")

    manifest = write_manifest(dataset, files, check, **content)
    if before is None or before.digest != manifest.digest:
        collect_garbage(dataset, folder, files)
    return manifest
