"""Preprocessing as two lists of stages: sources -> index, and index -> latents. Both stream through Ray Data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data import Dataset

from pipelines import networks
from pipelines.config import CropConfig, SourceConfig, StageResources, TextWeightsConfig, WeightsConfig
from pipelines.lease import Lease
from pipelines.originals import Originals
from pipelines.preprocess.alert import Change, change_of, judge
from pipelines.preprocess.bucket import assign_buckets, blocks_by_bucket, bucket_table
from pipelines.preprocess.config import AlertConfig, BucketConfig, EncodeConfig, FilterConfig, ScoringConfig
from pipelines.preprocess.crop import crop_images, rows_of_crops
from pipelines.preprocess.encode import Encoder, check_text_fits
from pipelines.preprocess.filter import MEASURED, caption_counts, decide
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.listing import (
    ERROR,
    NUMBER,
    forget_listings,
    list_inputs,
    unlisted,
    write_listings,
)
from pipelines.preprocess.sources.survey import Container, survey
from pipelines.preprocess.write import (
    AMENDED,
    FAILURE,
    collect_garbage,
    cut,
    keys_of,
    missing,
    rows_of,
    select,
    stored,
    write_units,
)
from pipelines.progress import progress
from pipelines.schema import (
    COMPUTED,
    INDEX_SCHEMA,
    MANIFEST,
    SCHEMA_VERSION,
    Column,
    DataFile,
    Manifest,
    data_files,
    digest,
    kept_rows,
    read_manifest,
    require_manifest,
    with_computed,
    write_manifest,
)
from pipelines.stages import actors, attempt, dataset_of, tasks
from pipelines.storage import Storage

JUDGED = [  # what verdicts follow from
    Column.KEY,
    Column.ID,
    Column.SOURCE,
    Column.PATH,
    Column.CAPTIONS,
    Column.CAPTION_REASONS,
    Column.ORIGINAL_SIZE,
    Column.AESTHETIC_SCORE,
    Column.SCORES,
    Column.DISTINCT_PIXELS,
    Column.CONTRAST,
    Column.PERCEPTUAL_HASH,
    Column.REJECT_REASON,
    Column.REJECT_DETAIL,
]
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
) -> Outcome:
    """Bring the index up to date with its sources: one row for every input, kept or with its reason.

    `begin` is called before the first use of Ray, if there is work for it. Raises HeldError where `alerts` withhold
    the commit.
    """
    dataset = held.dataset
    dataset.remove_incomplete()
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
    inputs = list_inputs(surveys, dataset.options, lambda container: dataset.read_table(container.listing))
    new = missing(inputs, stored(dataset, folder))
    units = cut(new, rows_per_file)
    told = Told()
    if units:
        begin()
        originals = Originals(sources, dataset.options)
        stages = (
            dataset_of(units)
            .map_batches(partial(measure, originals=originals, filters=filters, attempt=attempt), **tasks(resources))
            .map_batches(partial(assign_buckets, table=table), **tasks(resources))
            .map_batches(
                partial(write_units, dataset=dataset, folder=folder, compression=INDEX_COMPRESSION), **tasks(resources)
            )
        )
        told = _run(stages, "index", new.num_rows)
    wanted, done = inputs.column(Column.KEY), new.num_rows
    del inputs, new, units  # the keys are enough from here on, and the rest takes much memory
    facts: dict[str, str] = {}
    if scoring is not None:
        facts[COMPUTED] = _score(
            scoring,
            wanted,
            told,
            dataset=dataset,
            folder=folder,
            originals=Originals(sources, dataset.options),
            max_pixels=filters.max_pixels,
            resources=resources,
            begin=begin,
        )
    manifest, change, look = _commit_index(held, folder, wanted, fingerprint, facts, filters=filters, alerts=alerts)
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
) -> Outcome:
    """Bring the latents up to date with the index: a row for every crop of every kept image, by bucket.

    `begin` is called before the first use of Ray, if there is work for it.
    """
    dataset = held.dataset
    dataset.remove_incomplete()
    index_manifest = require_manifest(index, "index")
    made_by = networks.fingerprint(vae, text, dataset.options) | {
        "schema": SCHEMA_VERSION,
        "buckets": index_manifest.fingerprint["buckets"],
        "crop": asdict(crop),
        "dtype": encode.dtype,
        "stored_text": encode.text,
    }
    folder = _folder(made_by)
    kept = rows_of_crops(kept_rows(index, index_manifest), encode.crops)
    originals = Originals(sources, dataset.options)
    originals.check(kept)
    rows = missing(kept, stored(dataset, folder))
    blocks = blocks_by_bucket(rows, encode.rows_per_file)
    if encode.text == "embeddings":
        check_text_fits(blocks, networks.text_config(text))
    told = Told()
    if blocks:
        begin()
        stages = (
            dataset_of(blocks)
            .map_batches(
                partial(crop_images, originals=originals, crop=crop, max_pixels=max_pixels, attempt=attempt),
                **tasks(resources),
            )
            .map_batches(Encoder, fn_constructor_args=(vae, text, encode, dataset.options), **actors(encode.resources))
            .map_batches(
                partial(write_units, dataset=dataset, folder=folder, compression=LATENTS_COMPRESSION),
                **tasks(resources),
            )
        )
        told = _run(stages, "latents", rows.num_rows)
    facts = {
        "vae": asdict(networks.vae(vae, dataset.options).config),
        "text": asdict(networks.text_config(text)),
        "without_aesthetic_score": kept.column(Column.AESTHETIC_SCORE).null_count,
    }
    manifest = _commit_latents(
        held=held,
        folder=folder,
        kept=kept,
        made_by=made_by,
        facts=facts,
        parents={"index": index_manifest.digest},
        failures=told.failures,
        weights={source.name: source.weight for source in sources},
    )
    return Outcome(manifest=manifest, done=rows.num_rows - len(told.failures), told=told)


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
    wanted: pa.ChunkedArray,
    told: Told,
    *,
    dataset: Storage,
    folder: str,
    originals: Originals,
    max_pixels: int,
    resources: StageResources,
    begin: Callable[[], object],
) -> str:
    """Score the images that these weights have not scored, and add to what tasks told; gives the scores' folder."""
    from pipelines.preprocess.score import ASKED, Scorer, fingerprint

    scores = f"scores/{digest(fingerprint(scoring, dataset.options))[:12]}"
    known = keys_of(stored(dataset, scores))
    unscored = wanted.filter(pc.invert(pc.is_in(wanted, value_set=known)))
    rows = rows_of(dataset, stored(dataset, folder), unscored, ASKED)
    unread = pc.is_in(rows.column(Column.REJECT_REASON), value_set=pa.array(MEASURED, pa.string()))
    rows = rows.filter(pc.invert(unread))
    if not rows.num_rows:
        return scores
    begin()
    scorer = (scoring, originals, max_pixels, dataset.options)
    stages = (
        dataset_of(cut(rows, scoring.rows_per_file))
        .map_batches(Scorer, fn_constructor_args=scorer, **actors(scoring.resources))
        .map_batches(
            partial(write_units, dataset=dataset, folder=scores, compression=INDEX_COMPRESSION), **tasks(resources)
        )
    )
    _run(stages, "scores", rows.num_rows, told)
    return scores


def _folder(fingerprint: Mapping[str, Any]) -> str:
    """Where the data files of a fingerprint lie."""
    return f"data/{digest(fingerprint)[:12]}"


def _run(stages: Dataset, label: str, rows: int, told: Told | None = None) -> Told:
    """Run the stages to their end; what their tasks tell is added to `told`."""
    told, done = told or Told(), 0
    with progress(label, rows) as bar:
        for unit in stages.iter_rows():
            told.seconds.update(dict(unit["seconds"]))
            told.counts.update(dict(unit["counts"]))
            told.failures.update((_failed_name(row), row[FAILURE]) for row in unit["failures"])
            bar.update(unit["rows"] + len(unit["failures"]))
        done = bar.n
    if done != rows:
        raise RuntimeError(f"{label}: {rows} rows went in and {done} came out")
    return told


def _failed_name(row: Mapping[str, Any]) -> str:
    name = f"{row[Column.SOURCE]}:{row[Column.PATH]}"
    return f"{name}, crop {row[Column.CROP]}" if row[Column.CROP] else name


def _commit_index(
    held: Lease,
    folder: str,
    wanted: pa.ChunkedArray,
    fingerprint: Mapping[str, Any],
    facts: Mapping[str, str],
    *,
    filters: FilterConfig,
    alerts: AlertConfig,
) -> tuple[Manifest, Change, str | None]:
    """Make exactly the inputs with the `wanted` keys the index, every verdict decided over all of them."""
    dataset = held.dataset
    have = stored(dataset, folder)
    rows = rows_of(dataset, have, wanted, JUDGED)
    if COMPUTED in facts:
        rows = with_computed(rows, dataset, facts[COMPUTED])
    verdicts = decide(rows, filters)
    reasons = verdicts.column(Column.REJECT_REASON)
    before = read_manifest(dataset, "index")
    committed = {file.name for file in data_files(dataset, before)} if before else set()
    known = keys_of(file for file in have if file.name in committed)
    change = change_of(before, known, verdicts)
    look = judge(change, alerts)
    decisions = verdicts.select(AMENDED).combine_chunks()

    def decided(rows: pa.Table, places: np.ndarray) -> pa.Table | None:
        judged = rows
        for name, new in zip(decisions.column_names, decisions.take(pa.array(places)).columns, strict=True):
            judged = judged.set_column(rows.schema.get_field_index(name), INDEX_SCHEMA.field(name), new)
        return None if judged.equals(rows) else judged

    files = select(dataset, have, verdicts.column(Column.KEY), decided, INDEX_COMPRESSION)
    counts = {row["values"] or "kept": row["counts"] for row in pc.value_counts(reasons).to_pylist()}
    manifest = _commit(
        held,
        folder,
        [DataFile(name=name, rows=rows) for name, rows in files],
        expected=pc.count_distinct(wanted).as_py(),
        kind="index",
        counts=dict(sorted(counts.items())),
        fingerprint=fingerprint,
        parents={},
        facts={**facts, "captions": caption_counts(verdicts)},
    )
    return manifest, change, look


def _commit_latents(
    *,
    held: Lease,
    folder: str,
    kept: pa.Table,
    made_by: Mapping[str, Any],
    facts: Mapping[str, Any],
    parents: Mapping[str, str],
    failures: Mapping[str, str],
    weights: Mapping[str, float],
) -> Manifest:
    """Make exactly the kept rows the dataset, less those that failed. A file has rows of one weight."""
    dataset = held.dataset
    have, files = stored(dataset, folder), []
    for weight in sorted(set(weights.values())):
        named = pa.array([name for name, given in weights.items() if given == weight], pa.string())
        rows = kept.filter(pc.is_in(kept.column(Column.SOURCE), value_set=named))
        for name, count in select(dataset, have, rows.column(Column.KEY), None, LATENTS_COMPRESSION):
            files.append(DataFile(name=name, rows=count, bucket=_bucket_of(name), weight=weight))
    counts: Counter[str] = Counter()
    for file in files:
        counts[_folder_of(file.name)] += file.rows
    return _commit(
        held,
        folder,
        files,
        expected=kept.num_rows - len(failures),
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
