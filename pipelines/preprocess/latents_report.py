"""The report on latents: how many there are of each bucket, what could not be encoded, and what each stage took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.preprocess.charts import columns, page, section, table, tiles
from pipelines.preprocess.report import throughput, up_to_date
from pipelines.schema import Manifest
from pipelines.storage import Storage

SHOWN_FAILURES = 50  # the manifest has them all


def write_latents_report(latents: Storage, manifest: Manifest, times: Mapping[str, Any] | None) -> str:
    """Bring the page beside the latents up to date; gives it. `times` are as those of an index."""
    return up_to_date(latents, manifest, times, lambda noted: render(manifest, noted))


def render(manifest: Manifest, times: Mapping[str, Any]) -> str:
    """The page."""
    buckets = [f"{height}x{width}" for height, width in manifest.fingerprint["buckets"]]
    counts = [manifest.counts.get(bucket, 0) for bucket in buckets]
    parts = [
        f"<h1>Latents report</h1>\n<p>Manifest <code>{manifest.digest}</code></p>",
        tiles(
            [
                (f"{manifest.rows:,}", "images encoded"),
                (f"{len(manifest.failed):,}", "could not be encoded"),
                (f"{sum(map(bool, counts))} of {len(buckets)}", "buckets have images"),
                (str(manifest.fingerprint["dtype"]), "the networks computed in"),
            ]
        ),
        section(
            "Buckets",
            "Encoded images by bucket (height x width), from the widest to the tallest.",
            columns([bucket.replace("x", " x ") for bucket in buckets], counts, axis="", upright=True),
        ),
        throughput(times),
    ]
    if manifest.failed:
        text = "Kept images that could not be encoded. The next run tries them again."
        lines = [[name, reason] for name, reason in list(manifest.failed.items())[:SHOWN_FAILURES]]
        parts.append(section("Not encoded", text, table(["image", "why"], lines, words=True)))
    return page("Latents report", manifest.digest, [part for part in parts if part])
