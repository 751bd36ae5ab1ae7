"""Verdicts follow from measured facts and settings: a changed threshold decides again, and reads no pixel."""

from __future__ import annotations

import os
import random
from collections import Counter
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import runs
from pipelines.config import DriverConfig, SourceConfig, StageResources
from pipelines.lease import Lease, LeaseLostError, lease
from pipelines.originals import Originals
from pipelines.preprocess.alert import Change
from pipelines.preprocess.bucket import assign_buckets, bucket_table
from pipelines.preprocess.config import AlertConfig, BucketConfig, FilterConfig, ScoreLimits
from pipelines.preprocess.filter import (
    FILTERS,
    MEASURED,
    caption_counts,
    judge,
    mark_duplicates,
)
from pipelines.preprocess.measure import measure
from pipelines.preprocess.pipeline import Outcome, _commit_latents, build_index
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.preprocess.stored import select, stored, want
from pipelines.preprocess.verdicts import decide_all
from pipelines.preprocess.write import cut, write_rows, write_units
from pipelines.runs import Work
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, Column, Reject, data_files
from pipelines.storage import Storage, StorageOptions
from tests.reference import kept_rows, mark_near_duplicates

BUCKETS = BucketConfig(resolution=64, multiple=8)


def fact(path: str, **known: Any) -> dict[str, Any]:
    known = {
        "id": path,
        "captions": ["words"],
        "caption_weights": [1.0],
        "original_size": [10, 20],
        "aesthetic_score": 5.0,
    } | known
    return dict.fromkeys(INDEX_SCHEMA.names) | {"key": path, "source": "source", "path": path, "file_size": 1} | known


def limits(name: str, **given: Any) -> dict[str, ScoreLimits]:
    return {name: ScoreLimits(**given)}


def decided(index: pa.Table, config: FilterConfig) -> pa.Table:
    """The verdict on each of some rows."""
    return mark_near_duplicates(mark_duplicates(judge(index, config)), config)


def reasons(rows: list[dict[str, Any]], **filters: Any) -> dict[str, str | None]:
    judged = decided(pa.Table.from_pylist(rows, INDEX_SCHEMA), FilterConfig(**filters))
    assert judged.schema == INDEX_SCHEMA
    return {row["path"]: row["reject_reason"] for row in judged.to_pylist()}


@pytest.mark.parametrize(
    ("known", "filters", "reason"),
    [
        ({}, {}, None),
        ({"original_size": [1, 1]}, {}, None),  # nothing small is thrown away by default
        ({"aesthetic_score": None}, {}, None),
        ({"captions": [" \u00a0 "]}, {}, "no_caption"),
        ({"captions": None}, {"min_caption_characters": 0}, None),
        ({"captions": [" \u00e4\u00e4\u00e4 "]}, {"max_caption_characters": 3}, None),
        ({"captions": ["four"]}, {"max_caption_characters": 3}, "long_caption"),
        ({"original_size": [20, 9]}, {"min_side": 10}, "too_small"),
        ({"original_size": [10, 20]}, {"min_side": 10, "max_aspect": 2.0}, None),
        ({"original_size": [21, 10]}, {"max_aspect": 2.0}, "extreme_aspect"),
        ({"distinct_pixels": 1}, {}, "blank"),
        ({"distinct_pixels": 1}, {"min_distinct_pixels": 1}, None),
        ({"distinct_pixels": 2, "contrast": 0.0}, {}, None),
        ({"distinct_pixels": 15}, {"min_distinct_pixels": 16}, "blank"),
        ({"contrast": 2.9}, {"min_contrast": 3.0}, "blank"),
        ({"contrast": 3.1}, {"min_contrast": 3.1}, None),
        ({"aesthetic_score": 4.5}, {"scores": limits("aesthetic_score", min=4.5)}, None),
        ({"aesthetic_score": 4.25}, {"scores": limits("aesthetic_score", min=4.5)}, "low_score"),
        ({"aesthetic_score": 4.1}, {"scores": limits("aesthetic_score", min=4.1)}, None),  # compared as stored: float32
        ({"aesthetic_score": None}, {"scores": limits("aesthetic_score", min=4.5)}, None),
        ({"aesthetic_score": None}, {"scores": limits("aesthetic_score", required=True)}, "no_score"),
        ({"scores": [("watermark", 0.5)]}, {"scores": limits("watermark", max=0.5)}, None),
        ({"scores": [("watermark", 0.75)]}, {"scores": limits("watermark", max=0.5)}, "high_score"),
        ({"scores": [("unsafe", 0.75)]}, {"scores": limits("watermark", max=0.5)}, None),
        ({"scores": [("unsafe", 0.75)]}, {"scores": limits("watermark", max=0.5, required=True)}, "no_score"),
        ({"scores": [("a", 0.25), ("b", 0.25)]}, {"scores": limits("a", max=0.5) | limits("b", min=0.5)}, "low_score"),
        ({"reject_reason": "unreadable", "original_size": None, "id": None}, {}, "unreadable"),
        ({"reject_reason": "too_large", "original_size": [1, 9]}, {"max_aspect": 2.0}, "too_large"),
        ({"reject_reason": "too_small", "reject_detail": "earlier"}, {}, None),
    ],
)
def test_a_verdict_follows_from_facts_and_settings(known, filters, reason):
    assert reasons([fact("a", **known)], **filters) == {"a": reason}


@pytest.mark.parametrize(
    ("captions", "reason", "dropped", "detail"),
    [
        (["words", "no", "far too many"], None, [None, "no_caption", "long_caption"], None),
        (["no", ""], "no_caption", ["no_caption"] * 2, "2 characters, and filters.min_caption_characters is 3"),
        ([], "no_caption", [], "0 characters, and filters.min_caption_characters is 3"),
        (["far too many", "too many"], "long_caption", ["long_caption"] * 2, "8 characters, and filters.max_"),
        (["", "too many"], "long_caption", ["no_caption", "long_caption"], "8 characters, and filters.max_"),
    ],
)
def test_captions_are_dropped_one_by_one_and_the_image_when_none_is_left(captions, reason, dropped, detail):
    other = fact("b", captions=["", "fit"])
    rows = pa.Table.from_pylist([fact("a", captions=captions), other], INDEX_SCHEMA)
    for part in (rows, pa.concat_tables([rows.slice(0, 1), rows.slice(1)])):  # as one chunk, and as two
        judged = decided(part, FilterConfig(min_caption_characters=3, max_caption_characters=5))
        row, untouched = judged.to_pylist()
        assert (row["reject_reason"], row["caption_reasons"]) == (reason, dropped)
        assert (row["reject_detail"] or "").startswith(detail or "")
        assert (untouched["reject_reason"], untouched["caption_reasons"]) == (None, ["no_caption", None])
    kept = [dropped, ["no_caption", None]] if reason is None else [["no_caption", None]]
    flat = [one or "kept" for reasons in kept for one in reasons]
    assert caption_counts(judged) == {name: flat.count(name) for name in sorted(set(flat))}


def test_reasons_are_named_in_the_order_in_which_they_are_looked_for():
    names, config = list(Reject), FilterConfig()
    checked = [check(pa.Table.from_pylist([fact("a")], INDEX_SCHEMA), config)[0] for check in FILTERS]
    order = [*MEASURED, *checked, Reject.DUPLICATE, Reject.NEAR_DUPLICATE]
    assert list(dict.fromkeys(order)) == names


def test_an_original_that_a_threshold_rejects_gives_its_place_to_the_next():
    rows = [fact("a", id="x", captions=[""]), fact("b", id="x"), fact("c", id="x")]
    assert reasons(rows) == {"a": "no_caption", "b": None, "c": "duplicate"}
    assert reasons(rows, min_caption_characters=0) == {"a": None, "b": "duplicate", "c": "duplicate"}


def test_a_rejected_score_is_named_with_its_limit():
    rows = [fact("a", scores=[("watermark", 0.75), ("unsafe", 0.25)])]
    filters = FilterConfig(scores=limits("unsafe", max=0.5) | limits("watermark", max=0.5))
    (row,) = decided(pa.Table.from_pylist(rows, INDEX_SCHEMA), filters).to_pylist()
    assert row["reject_detail"] == "0.75, and filters.scores.watermark.max is 0.5"


@pytest.mark.parametrize("seed", range(5))
def test_verdicts_depend_on_the_set_of_facts_alone(seed):
    draws = random.Random(seed)

    def some(number: int) -> dict[str, Any]:
        looks = draws.choice([None, *range(9)])
        return fact(
            f"{number:02}", id=draws.choice("vwxyz") * 9, original_size=[draws.randint(1, 9), 9], perceptual_hash=looks
        )

    rows = [some(number) for number in range(40)]
    expected = reasons(rows, min_side=4, near_duplicate_bits=1)
    assert {"too_small", "duplicate", "near_duplicate", None} == set(expected.values())
    draws.shuffle(rows)
    strict = FilterConfig(min_side=8, near_duplicate_bits=3)
    judged = decided(pa.Table.from_pylist(rows, INDEX_SCHEMA), strict).to_pylist()
    assert reasons(judged, min_side=4, near_duplicate_bits=1) == expected


@pytest.mark.parametrize("seed", range(16))
def test_verdicts_on_rows_in_files_are_those_on_all_rows_at_once(seed, tmp_path, monkeypatch):
    if seed >= 4:  # every few rows are a run of their own, and a part
        monkeypatch.setattr(runs, "SHARES", 2**16)
        monkeypatch.setattr(runs, "SAMPLED", 2)
    draws, dataset = random.Random(seed), Storage(str(tmp_path / "index"))
    facts = [some_facts(draws, number) for number in range(80)]
    by_looks = draws.choice([None, 2])
    filters = FilterConfig(min_side=3, max_caption_characters=8, near_duplicate_bits=by_looks)
    expected = {row["key"]: row for row in decided(as_index(facts), filters).to_pylist()}
    others = decided(as_index(facts), FilterConfig(min_side=5, near_duplicate_bits=draws.choice([None, 4]))).to_pylist()
    right = draws.sample(range(80), draws.choice([0, 70, 80]))  # files hold these verdicts, and elsewhere other ones
    rows = [expected[row["key"]] if number in right else row for number, row in enumerate(others)]
    draws.shuffle(rows)
    again = draws.sample(rows, draws.choice([0, 30]))  # the rows of a file that was written again
    otherwise = [row | draws.choice(MEASURED_AGAIN) for row in again[::2]]
    again[::2] = otherwise
    unwanted = [fact(f"gone{number}") for number in range(draws.choice([0, 5]))]
    stream = [*rows, *again, *unwanted]
    files = [stream[start : start + 9] for start in range(0, len(stream), 9)]
    for number, members in enumerate(files):
        write_rows(as_index(members), dataset, f"data/x/{number:02}.parquet", "zstd")
    work = Work(DriverConfig())
    have = stored(dataset, "data/x", want([pa.chunked_array([[row["key"] for row in facts]])], work), work)
    committed = {f"data/x/{number:02}.parquet" for number in range(draws.randint(0, 4))}
    verdicts = decide_all(have, filters, None, committed)

    names = [row["reject_reason"] or "kept" for row in expected.values()]
    assert verdicts.reasons == Counter(names)
    assert verdicts.captions == caption_counts(as_index(list(expected.values())))
    known = {row["key"] for members in files[: len(committed)] for row in members}
    fresh = [row["reject_reason"] for key, row in expected.items() if key not in known]
    assert verdicts.change(7) == Change(
        new=len(fresh), new_rejected=len(fresh) - fresh.count(None), kept_before=7, kept=names.count("kept")
    )
    for number, members in enumerate(files):
        if not any(row is other for row in members for other in otherwise):
            assert verdicts.differs(number) == any(row != expected.get(row["key"], row) for row in members)
    chosen = select(have, None, verdicts, "zstd")
    found = [row for name, _ in chosen for row in dataset.read_table(name).to_pylist()]
    assert sorted(found, key=itemgetter("key")) == sorted(expected.values(), key=itemgetter("key"))
    assert {name for name, _ in chosen if name in have.names} <= {
        name for name, members in zip(have.names, files, strict=True) if all(r in expected.values() for r in members)
    }


MEASURED_AGAIN = [  # what a second measurement may say of a row of the same key
    {"id": None, "original_size": None, "perceptual_hash": None, "reject_reason": "kills_decoder"},
    {"id": "0" * 31 + "7", "reject_reason": None, "reject_detail": None},
]


def some_facts(draws: random.Random, number: int) -> dict[str, Any]:
    captions = [draws.choice(["", "words", "too many words"]) for _ in range(draws.randint(0, 3))]
    known = {"captions": captions, "caption_weights": [1.0] * len(captions), "caption_reasons": [None] * len(captions)}
    if draws.random() < 0.1:
        return fact(f"{number:02}", id=None, reject_reason="unreadable", original_size=None) | known
    return (
        fact(
            f"{number:02}",
            id=f"{draws.randrange(40):032x}" if draws.random() < 0.8 else f"{number:032x}",
            source=draws.choice(["one", "two"]),
            original_size=[draws.randint(1, 30), 9],
            perceptual_hash=draws.choice([None, *range(9), *(draws.randrange(2**64) for _ in range(9))]),
        )
        | known
    )


def as_index(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, INDEX_SCHEMA)


def test_of_images_that_look_alike_the_largest_is_kept_and_named():
    rows = [
        fact("a", original_size=[10, 10], perceptual_hash=0b0111),
        fact("b", original_size=[20, 20], perceptual_hash=0b0001),
        fact("c", original_size=[20, 20], perceptual_hash=0b0011),
        fact("d", original_size=[90, 90], perceptual_hash=2**64 - 1),
        fact("e", original_size=[90, 90], perceptual_hash=0b0001, captions=[""]),  # rejected: nobody's original
        fact("f", original_size=[90, 90]),  # nothing to compare by
        fact("g", original_size=[90, 90]),
    ]
    judged = decided(pa.Table.from_pylist(rows, INDEX_SCHEMA), FilterConfig(near_duplicate_bits=2)).to_pylist()
    assert {row["path"]: (row["reject_reason"], row["reject_detail"]) for row in judged if row["path"] != "e"} == {
        "a": ("near_duplicate", "2 of 64 bits from b"),
        "b": (None, None),
        "c": ("near_duplicate", "1 of 64 bits from b"),
        "d": (None, None),
        "f": (None, None),
        "g": (None, None),
    }
    assert set(reasons(rows).values()) == {None, "no_caption"}  # off by default


@pytest.fixture
def source(tmp_path) -> Storage:
    """Seven pictures of sides 8 to 56, and one that is broken."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(1, 8):
        image = Image.new("RGB", (8 * number, 8 * number), (number, 0, 0))
        image.putpixel((0, 0), (255, 255, 255))  # one colour alone would be blank
        image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("caption")
    (folder / "broken.png").write_bytes(b"broken")
    return Storage(str(folder))


def sources(folder: Storage) -> list[SourceConfig]:
    return [SourceConfig(path=folder.uri)]


def originals(folder: Storage) -> Originals:
    return Originals(sources(folder), StorageOptions())


def index_of(source: Storage, dataset: Storage, monkeypatch: pytest.MonkeyPatch, **filters: Any) -> Outcome:
    """build_index, where nothing is left to measure."""

    def here(units: list[pa.Table]) -> Any:
        raise AssertionError(f"{len(units)} units would be read")

    monkeypatch.setattr("pipelines.preprocess.pipeline.dataset_of", here)
    with lease(dataset) as held:
        return build_index(
            sources=sources(source),
            filters=FilterConfig(**filters),
            buckets=BUCKETS,
            held=held,
            rows_per_file=3,
            resources=StageResources(),
            alerts=AlertConfig(),
            begin=lambda: None,
        )


def test_a_changed_threshold_reads_no_pixel_and_keeps_the_latents_keys(source, tmp_path, monkeypatch):
    dataset = Storage(str(tmp_path / "index"))
    inputs = pa.concat_tables(list_inputs([survey(one, StorageOptions()) for one in sources(source)], StorageOptions()))
    table = bucket_table(BUCKETS)
    rows = assign_buckets(measure(inputs, originals(source), FilterConfig()), table)
    monkeypatch.setattr("pipelines.preprocess.pipeline._folder", lambda fingerprint: "data/x")
    for unit in cut(rows, 3):
        write_units(unit, dataset, "data/x", "zstd")
    for path in Path(source.uri).glob("*.png"):  # from here on, whoever reads a pixel reads garbage
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    loose = index_of(source, dataset, monkeypatch).manifest
    before = kept_rows(dataset, loose)
    strict = index_of(source, dataset, monkeypatch, min_side=30).manifest
    after = kept_rows(dataset, strict)
    assert (loose.counts, strict.counts) == (
        {"kept": 7, "unreadable": 1},
        {"kept": 4, "too_small": 3, "unreadable": 1},
    )
    assert set(after.column(Column.KEY).to_pylist()) < set(before.column(Column.KEY).to_pylist())
    assert index_of(source, dataset, monkeypatch).manifest.digest == loose.digest
    assert sum(file.rows for file in data_files(dataset, strict)) == strict.rows == 8


def test_latents_files_are_of_one_weight_and_another_weight_makes_no_row_anew(tmp_path):
    dataset = Storage(str(tmp_path / "latents"))
    sources, work = ["one", "one", "two", "two", "two", "one"], Work(DriverConfig())
    wanted = want([pa.chunked_array([list("abcdef")])], work)
    for number, keys in enumerate(("ab", "cd", "ef")):  # the last one's sources changed since it was written
        write_rows(pa.table({"key": list(keys)}), dataset, f"data/x/32x32/{number}.parquet", "none")

    def commit(one: float, two: float) -> dict[str, float]:
        weights = {"one": one, "two": two}
        with lease(dataset) as held:
            manifest = _commit_latents(
                held=held,
                folder="data/x",
                have=stored(dataset, "data/x", wanted, work),
                made_by={"schema": SCHEMA_VERSION},
                facts={},
                parents={},
                failures={},
                weights=np.array([weights[source] for source in sources]),
            )
        files = data_files(dataset, manifest)
        found = {key: f.weight for f in files for key in dataset.read_table(f.name).column("key").to_pylist()}
        assert len(found) == manifest.rows == 6
        return found

    assert commit(1.0, 1.0) == dict.fromkeys("abcdef", 1.0)
    assert commit(1.0, 2.5) == {"a": 1.0, "b": 1.0, "c": 2.5, "d": 2.5, "e": 2.5, "f": 1.0}
    before = {file.name for file in dataset.list("data")}
    assert commit(3.0, 0.0)["a"] == 3.0
    assert {file.name for file in dataset.list("data")} == before


def test_a_writer_that_was_replaced_commits_nothing(source, tmp_path, monkeypatch):
    dataset = Storage(str(tmp_path / "index"))
    monkeypatch.setattr("pipelines.preprocess.pipeline._folder", lambda fingerprint: "data/x")
    rows = measure(
        pa.concat_tables(list_inputs([survey(one, StorageOptions()) for one in sources(source)], StorageOptions())),
        originals(source),
        FilterConfig(),
    )
    for unit in cut(assign_buckets(rows, bucket_table(BUCKETS)), 3):
        write_units(unit, dataset, "data/x", "zstd")
    index_of(source, dataset, monkeypatch)
    before = dataset.read("manifest.json")
    replaced = lambda held: dataset.write(f"lease/{held.claim.owner}.broken", b"")  # noqa: E731
    real = Lease.check
    monkeypatch.setattr(Lease, "check", lambda held: [replaced(held), real(held)])
    with pytest.raises(LeaseLostError, match="nothing was committed"):
        index_of(source, dataset, monkeypatch, min_side=30)
    assert dataset.read("manifest.json") == before
