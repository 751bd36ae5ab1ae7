"""The report on an index: one HTML page that says what became of the images, and shows some of them.

It lies beside the index as report.html, names no place of a machine, and is a function of the index, the pictures and
the times that its last run noted. It is written again when the index has changed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from model.config import CONTEXT_LENGTH
from pipelines.images import DECODE_ERRORS, UNREADABLE_ERRORS, decode_reduced
from pipelines.preprocess.charts import (
    MUTED,
    cards,
    columns,
    funnel,
    heat_map,
    page,
    pairs,
    percent,
    picture,
    section,
    short,
    table,
    tiles,
)
from pipelines.preprocess.near import leaders
from pipelines.preprocess.sources.inputs import passed_over_words
from pipelines.preprocess.summary import MOST_WORDS, SHARE_BINS, SIDE_EDGES, Row, Summary, summarize
from pipelines.schema import PASSED_OVER, Column, Manifest, Reject
from pipelines.storage import Storage

REPORT, TIMES = "report.html", "times.json"  # beside manifest.json
EXAMPLES, KEPT_EXAMPLES, PAIRS = 12, 18, 12  # pictures per reason, of kept ones, and of duplicates
NAMED = 5  # images whose captions are no text
THUMBNAIL, QUALITY = 200, 80  # longest side in pixels, of JPEG
LARGEST_DRAWN, READERS = 50_000_000, 4  # pixels of an image that is decoded for its thumbnail; how many at a time
ENCODED_TOKENS = CONTEXT_LENGTH - 2  # without those for begin and end
PREVIEW_BITS = (0, 2, 4, 6, 8)
Read = Callable[[Row], bytes]  # the bytes of a row's image file


def write_report(index: Storage, manifest: Manifest, times: Mapping[str, Any] | None, read: Read) -> str:
    """Bring the page beside the index up to date; gives it.

    `times` are those of a run that measured images: rows, seconds, and the seconds of each stage's tasks; None leaves
    those of an earlier run in place.
    """
    return up_to_date(
        index,
        manifest,
        times,
        lambda noted: render(summarize(index, manifest, max(EXAMPLES, KEPT_EXAMPLES)), manifest, noted, read),
    )


def up_to_date(
    dataset: Storage,
    manifest: Manifest,
    times: Mapping[str, Any] | None,
    make: Callable[[Mapping[str, Any]], str],
) -> str:
    """The page beside a dataset, made again from its times if it shows another version."""
    if times is not None:
        dataset.write_json(TIMES, times)
    if dataset.exists(REPORT):
        html = dataset.read(REPORT).decode()
        if f'name="digest" content="{manifest.digest}"' in html[:500]:
            return html
    html = make(times or (dataset.read_json(TIMES) if dataset.exists(TIMES) else {}))
    dataset.write(REPORT, html.encode())
    return html


def render(summary: Summary, manifest: Manifest, times: Mapping[str, Any], read: Read) -> str:
    """The page."""
    thumbnails = _thumbnails(summary, read)
    parts = [
        _head(summary, manifest),
        _funnel(summary, manifest),
        _sizes(summary),
        _buckets(summary, manifest),
        _crops(summary),
        _captions(summary),
        throughput(times),
        _near(summary),
        _duplicates(summary, thumbnails),
        _examples(summary, thumbnails),
    ]
    return page("Index report", manifest.digest, [part for part in parts if part])


def _head(summary: Summary, manifest: Manifest) -> str:
    rows = manifest.rows
    filled = len(summary.buckets)
    return (
        f"<h1>Index report</h1>\n<p>Every input, and what became of it. Manifest <code>{manifest.digest}</code></p>"
    ) + tiles(
        [
            (f"{rows:,}", "inputs"),
            (f"{summary.kept:,}", f"kept, {percent(summary.kept, rows)}"),
            (f"{rows - summary.kept:,}", f"rejected, {percent(rows - summary.kept, rows)}"),
            (f"{filled} of {len(manifest.fingerprint['buckets'])}", "buckets have images"),
        ]
    )


def _funnel(summary: Summary, manifest: Manifest) -> str:
    rest = sum(summary.reasons.values())
    steps = [("inputs", rest, 0)]
    for reason in _reasons(summary):
        rest -= summary.reasons[reason]
        steps.append((_words(reason), rest, summary.reasons[reason]))
    text = "Each reason takes away what no earlier one has. A row has one reason, and its detail stands in the index."
    if passed_over := manifest.facts.get(PASSED_OVER):
        text += f" In the sources' folders, {passed_over_words(passed_over)}."
    return section("What is kept", text, funnel([*steps, ("kept", rest, 0)]))


def _sizes(summary: Summary) -> str:
    known = int(summary.sizes.sum())
    if not known:
        return ""
    text = (
        f"Height and width before any resize, of {known:,} images whose size is known (SDXL, Figure 2). "
        f"The shortest side of {percent(summary.small, known)} is below {summary.side}: "
        "a filter on it would lose these; size conditioning uses them."
    )
    return section("Original sizes", text, heat_map(summary.sizes, SIDE_EDGES, mark=summary.side))


def _buckets(summary: Summary, manifest: Manifest) -> str:
    if not summary.kept:
        return ""
    buckets = [tuple(size) for size in manifest.fingerprint["buckets"]]
    (height, width), least = min(summary.buckets.items(), key=lambda item: (item[1], item[0]))
    text = (
        "Kept images by bucket (height x width), from the widest to the tallest. "
        f"The smallest that has any, {height} x {width}, has {least:,}. "
        "Buckets too small for a batch are kept: training carries their rest over."
    )
    labels = [f"{height} x {width}" for height, width in buckets]
    return section("Buckets", text, columns(labels, [summary.buckets[b] for b in buckets], axis="", upright=True))


def _crops(summary: Summary) -> str:
    if not summary.kept:
        return ""
    ours, square = summary.kept_share_sum / summary.kept, summary.square_share_sum / summary.kept
    text = (
        f"Share of an image's pixels that its crop to the bucket keeps: {100 * ours:.1f}% on average, "
        f"where a centre square would keep {100 * square:.1f}%. "
        f"{percent(summary.enlarged, summary.kept)} of the images are smaller than their bucket, and enlarged."
    )
    both = summary.kept_shares + summary.square_shares
    low = min(int(np.flatnonzero(both)[0]) // 5 * 5, SHARE_BINS - 10)
    labels = [f"{round(100 * place / SHARE_BINS)}%" if place % 5 == 0 else "" for place in range(low, SHARE_BINS)]
    charts = (
        columns(labels, summary.kept_shares[low:].tolist(), axis="pixels kept by the bucket's crop", height=130),
        columns(labels, summary.square_shares[low:].tolist(), axis="by a centre square", height=130, colour=MUTED),
    )
    return section("Crop loss", text, *charts)


def _captions(summary: Summary) -> str:
    if not summary.kept:
        return ""
    long, count = int(summary.words[ENCODED_TOKENS + 1 :].sum()), int(summary.words.sum())
    text = (
        f"Words of the {count:,} captions that kept images are seen with; {summary.captions_dropped:,} more are left "
        f"out for their length. The text encoders see {ENCODED_TOKENS} tokens, and a word is one at least: "
        f"{percent(long, count)} of the captions have more words than that, and are cut."
    )
    if summary.garbled:
        text += (
            f" Captions of {summary.garbled_count:,} images, kept or not, have bytes that are no UTF-8, for which "
            f"U+FFFD stands, such as those of {', '.join(summary.garbled[:NAMED])}."
        )
    last = min(MOST_WORDS, max(20, int(np.flatnonzero(summary.words)[-1])))
    labels = [str(place) if place % 5 == 0 else "" for place in range(last + 1)]
    if last == MOST_WORDS:
        labels[-1] = f"{MOST_WORDS}+"
    return section("Captions", text, columns(labels, summary.words[: last + 1].tolist(), axis="words", height=160))


def throughput(times: Mapping[str, Any]) -> str:
    """Images a second of each stage; nothing where no run has noted its times."""
    if not times:
        return ""
    rows, wall = times["rows"], times["seconds"]
    lines = [
        [name, f"{rows:,}", f"{seconds:,.1f}", f"{rows / seconds:,.1f}"]
        for name, seconds in times["stages"].items()
        if seconds
    ]
    text = (
        f"The last run that made rows did {rows:,} in {wall:,.1f} s, {rows / wall:,.1f} a second in all. "
        "Below, the seconds of all tasks together, and images a second of one task."
    )
    return section("Throughput", text, table(["stage", "images", "task seconds", "images/s of a task"], lines))


def _near(summary: Summary) -> str:
    if not len(summary.hashes):
        return ""
    text = (
        f"What filters.near_duplicate_bits would reject of the {summary.kept:,} images that are kept now, "
        "without reading any again."
    )
    own = np.arange(len(summary.hashes))
    counts = [int((leaders(summary.hashes, bits) != own).sum()) for bits in PREVIEW_BITS]
    lines = [
        [str(b), f"{count:,}", percent(count, summary.kept)] for b, count in zip(PREVIEW_BITS, counts, strict=True)
    ]
    return section("Near-duplicates", text, table(["bits of 64", "images", "of those kept"], lines))


def _duplicates(summary: Summary, thumbnails: Mapping[str, str | None]) -> str:
    if not summary.pairs:
        return ""
    found = [
        (_card(original, thumbnails, "kept"), _card(row, thumbnails, "rejected"), row[Column.REJECT_DETAIL])
        for row, original in summary.pairs[:PAIRS]
    ]
    return section(
        "Duplicates", "Some rejected duplicates, each to the right of the image that is kept for it.", pairs(found)
    )


def _examples(summary: Summary, thumbnails: Mapping[str, str | None]) -> str:
    parts = []
    for reason in ("kept", *_reasons(summary)):
        rows = summary.examples.get(reason, [])[: KEPT_EXAMPLES if reason == "kept" else EXAMPLES]
        if rows:
            shown = [_card(row, thumbnails, row[Column.REJECT_DETAIL] or row[Column.PATH]) for row in rows]
            parts.append(f"<h3>{escape(_words(reason))}, {short(summary.reasons[reason])}</h3>" + cards(shown))
    return section("Examples", "A sample of each kind, the same at every run: the rows with the smallest keys.", *parts)


def _card(row: Row, thumbnails: Mapping[str, str | None], note: str) -> str:
    size = row[Column.ORIGINAL_SIZE]
    words = f"{size[0]} x {size[1]}, {note}" if size else note
    return picture(thumbnails.get(row[Column.KEY]), " | ".join(row[Column.CAPTIONS] or ()) or "(no caption)", words)


def _reasons(summary: Summary) -> list[str]:
    """The reject reasons that rows have, in the order in which they are looked for."""
    return [str(reason) for reason in Reject if summary.reasons[reason]]


def _words(reason: str) -> str:
    return str(reason).replace("_", " ")


def _thumbnails(summary: Summary, read: Read) -> dict[str, str | None]:
    """A small JPEG, base64, of each sampled row by its key; None where the image cannot be drawn."""
    rows = [row for shown in summary.examples.values() for row in shown]
    rows += [row for pair in summary.pairs for row in pair]
    distinct = {row[Column.KEY]: row for row in rows}

    def draw(row: Row) -> str | None:
        size = row[Column.ORIGINAL_SIZE]
        if size is None or size[0] * size[1] > LARGEST_DRAWN:
            return None
        try:
            image, _ = decode_reduced(read(row), LARGEST_DRAWN, (THUMBNAIL, THUMBNAIL))
        except (*UNREADABLE_ERRORS, *DECODE_ERRORS):  # gone or changed since; the page says that there is no picture
            return None
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=QUALITY)
        return base64.b64encode(buffer.getvalue()).decode()

    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(distinct, pool.map(draw, distinct.values()), strict=True))
