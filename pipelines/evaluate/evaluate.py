"""Measure a trained network: as it is now, or each checkpoint of its run as it appears, beside the training.

The output folder is what there is to come back to: a state whose metrics.json is there has been measured.

    pinned.json                     the version of the index that all results are measured on, by the index's place
    metrics.json                    all results so far, the least trained first; written after each
    <state>-<settings>/metrics.json one result; written last
    <state>-<settings>/pictures/    what was made for it, and its grid.png
    real/                           moments of the real images' features
    weights/                        copies of checkpoints that have not been measured yet
"""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from model.metrics import Moments, frechet_distance
from model.weights import Kind
from pipelines.captions import likeliest
from pipelines.checkpoints import RUN
from pipelines.config import SourceConfig, all_sources
from pipelines.evaluate.config import PINNED, EvaluateConfig
from pipelines.evaluate.generate import generate_pictures
from pipelines.evaluate.measure import FEATURES, MeasurePictures, MeasureReconstructions, measured, png
from pipelines.evaluate.prompts import index_rows
from pipelines.evaluate.subjects import Subject, copied_out, copies, copy_name, is_finished, subjects
from pipelines.lease import Lease
from pipelines.originals import Originals
from pipelines.pictures import contact_sheet
from pipelines.schema import PLACE, Column, Manifest, digest, read_manifest, require_manifest
from pipelines.storage import Storage, StorageOptions

METRICS, GRID = "metrics.json", "grid.png"
COPY_ATTEMPTS = 5  # a checkpoint that is being written, or deleted, is looked at again so often
SHEET_COLUMNS, SHEET_SIDE = 4, 256
MADE_PIXELS = 2**28  # no picture that was made has more
FREE = ("watch", "poll_seconds", "every_images", "source", "sources", "batch", "shown", "resources")
FREE_IN_GENERATE = ("resources", "batch", "sheets")
"""Settings that do not change a figure."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The figures of one state of a network."""

    name: str
    """The state."""
    images_seen: int | None
    """How far its run had trained it; None where it is of no run."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Figures by name."""
    grid: bytes
    """Some of the pictures, as a PNG file."""
    time_ms: int
    """When it was measured, milliseconds since 1970."""
    measured: bool
    """Whether it was measured now; otherwise it was there."""


def evaluate(config: EvaluateConfig, held: Lease) -> Iterator[Result]:
    """Each result once it is stored, the least trained first. With config.watch, until the run is finished; those that
    earlier calls have stored come first.

    `held` is the right to write the output. All are measured on the index as it was at the first: a commit beside it
    changes no figure. Raises FileNotFoundError where there is nothing to measure, or where that version of the index is
    gone.
    """
    output = held.dataset
    weights, kind = config.weights, Kind.VAE if config.network == "vae" else Kind.UNET
    assert weights.path is not None
    output.remove_incomplete()
    run, index = Storage(weights.path, output.options), pinned_index(config, output)
    output.write_json(PINNED, _pins(output) | {config.index: index.digest})
    settings = _settings(config, index)
    results = _stored(output, settings)
    if not config.watch:
        found = subjects(weights, kind, output.options)
        if not found:
            raise FileNotFoundError(f"{weights.path}: the run has no checkpoint yet; evaluate.watch waits")
        newest = found[-1]
        if newest.name not in results:
            subject = copied_out(newest, weights, kind, output)
            results[newest.name] = _measure(config, subject, held, settings, index)
        _write_summary(config, results, set(), output)
        yield results[newest.name]
        return
    yield from (results[name] for name in sorted(results))
    waiting = {subject.name: subject for subject in copies(output) if subject.name not in results}
    attempts: Counter[str] = Counter()
    while True:
        # Looked at before the checkpoints: what is there after the end is all that there will be.
        ended = run.exists(RUN) and is_finished(run.read_json(RUN))
        unread = False
        for subject in subjects(weights, kind, output.options) if run.exists(RUN) else []:
            taken = [name for name in (*waiting, *results) if name.isdecimal()]
            if subject.name in waiting or subject.name in results or not _is_due(subject, taken, config.every_images):
                continue
            try:
                waiting[subject.name] = copied_out(subject, weights, kind, output)
            except (OSError, ValueError) as error:  # it is being written, or deleted: both end
                attempts[subject.name] += 1
                unread = True
                if attempts[subject.name] >= COPY_ATTEMPTS:
                    raise RuntimeError(f"{subject.path} cannot be read: {error}") from error
        if waiting:
            subject = waiting.pop(min(waiting))
            results[subject.name] = _measure(config, subject, held, settings, index)
            _write_summary(config, results, attempts.keys() - waiting.keys() - results.keys(), output)
            yield results[subject.name]
        elif ended and not unread:
            if missed := attempts.keys() - results.keys():
                _write_summary(config, results, missed, output)
            return
        else:
            time.sleep(config.poll_seconds)


def pinned_index(config: EvaluateConfig, output: Storage) -> Manifest:
    """The version of the index that an output measures on: that of its results, or the current one for the first."""
    index, pinned = Storage(config.index, output.options), _pins(output).get(config.index)
    if pinned is None:
        return require_manifest(index, "index")
    manifest = read_manifest(index, "index", pinned)
    if manifest is None:
        raise FileNotFoundError(
            f"{output.uri} measures on version {pinned} of {index.uri}, which is gone; choose another output, and name "
            "this one among evaluations where jobs.clean is run"
        )
    return manifest


def evaluated_rows(config: EvaluateConfig, options: StorageOptions, index: Manifest) -> list[dict[str, Any]]:
    """Those images: path, id, caption, and the size [height, width] that they are cut to. ValueError for none."""
    part = config.generate.prompts if config.generate else config.reconstruct
    assert part is not None
    found = index_rows(Storage(config.index, options), part.count, part.validation_share, index.digest)
    if not found:
        raise ValueError(f"{config.index}: there is no image to measure")
    size = list(config.reconstruct.size) if config.reconstruct else None
    place = [field.name for field in PLACE]
    names = (Column.SOURCE, Column.PATH, *place, Column.FILE_SIZE, Column.ID)
    return [
        {str(name): row[name] for name in names}
        | {"caption": likeliest(row[Column.CAPTIONS], row[Column.CAPTION_WEIGHTS])}
        | {"size": size or row[Column.BUCKET]}
        for row in found
    ]


def _measure(config: EvaluateConfig, subject: Subject, held: Lease, settings: str, index: Manifest) -> Result:
    """The figures of a subject, stored; its copy is not needed any more."""
    output = held.dataset
    folder, begun = output.folder(f"{subject.name}-{settings}"), time.perf_counter()
    figures = _reconstructions if config.network == "vae" else _pictures
    numbers, grid = figures(config, subject, folder, held, index)
    held.check()
    folder.write(GRID, grid)
    document = {
        "images_seen": subject.images_seen,
        "weights": subject.path,
        "seconds": time.perf_counter() - begun,
        "time_ms": int(time.time() * 1000),
        "numbers": numbers,
    }
    folder.write_json(METRICS, document)
    if output.exists(copy_name(subject)):
        output.delete(copy_name(subject))
    return _result(subject.name, folder, measured=True)


def _stored(output: Storage, settings: str) -> dict[str, Result]:
    """The results that are there already, by name."""
    names = [file.name for file in output.list() if file.name.endswith(f"-{settings}/{METRICS}")]
    folders = {name.removesuffix(f"-{settings}/{METRICS}"): name.removesuffix(f"/{METRICS}") for name in names}
    return {name: _result(name, output.folder(folder), measured=False) for name, folder in folders.items()}


def _result(name: str, folder: Storage, measured: bool) -> Result:
    document = folder.read_json(METRICS)
    return Result(
        name=name,
        images_seen=document["images_seen"],
        numbers=document["numbers"],
        grid=folder.read(GRID),
        time_ms=document["time_ms"],
        measured=measured,
    )


def _pictures(
    config: EvaluateConfig, subject: Subject, folder: Storage, held: Lease, index: Manifest
) -> tuple[dict[str, float], bytes]:
    """Pictures of the captions against the index's images: FID, CLIP score, and that of the images themselves."""
    assert config.generate is not None
    weights = replace(config.weights, path=subject.path)
    if config.network == "base":
        generate = replace(config.generate, base=weights)
    else:
        generate = replace(config.generate, refiner=weights)
    pictures = generate_pictures(generate, folder, held, pinned=index.digest).pictures
    rows = [
        {"source": SourceConfig.name, "path": row["file"], "size": row["size"], "caption": row["text"]}
        for row in pictures
    ]
    there = Originals((SourceConfig(path=folder.uri),), folder.options)
    made = measured(MeasurePictures, (folder.options, there, MADE_PIXELS), rows, config)
    real, real_score = _real_images(config, held.dataset, index)
    numbers: dict[str, float] = {"images": made.count, **made.means}
    if real_score is not None:
        numbers["clip_score_of_real_images"] = real_score
    if config.inception is not None:
        numbers["fid"] = frechet_distance(real, made.moments[FEATURES])
    return numbers, _sheet([(row["text"], folder.read(row["file"])) for row in pictures[: config.shown]])


def _real_images(config: EvaluateConfig, output: Storage, index: Manifest) -> tuple[Moments, float | None]:
    """Moments of the features of the images that the captions are of, and their CLIP score; measured once."""
    assert config.generate is not None
    rows = evaluated_rows(config, output.options, index)
    measured_by = [asdict(part) if part is not None else None for part in (config.inception, config.clip)]
    name = f"real/{digest([rows, measured_by])}.safetensors"
    if not output.exists(name):
        found = measured(MeasurePictures, _images(config, output.options, index), rows, config)
        mean = torch.tensor(found.means.get("clip_score", 0.0), dtype=torch.float64)
        moments = found.moments.get(FEATURES, Moments(1)).state()
        output.write(name, save_tensors({"clip_score": mean, **moments}))
    state = load_tensors(output.read(name))
    score = float(state.pop("clip_score"))
    return Moments.restored(state), score if config.clip is not None else None


def _reconstructions(
    config: EvaluateConfig, subject: Subject, folder: Storage, held: Lease, index: Manifest
) -> tuple[dict[str, float], bytes]:
    """Images through the VAE against the images: PSNR, SSIM, LPIPS, and the FID between the two sets (rFID)."""
    rows = evaluated_rows(config, folder.options, index)
    found = measured(MeasureReconstructions, (*_images(config, folder.options, index), subject.path), rows, config)
    numbers: dict[str, float] = {"images": found.count, **found.means}
    if config.inception is not None:
        numbers["rfid"] = frechet_distance(found.moments[f"{FEATURES}_real"], found.moments[f"{FEATURES}_made"])
    return numbers, _sheet([("image, reconstruction", pair) for pair in found.shown])


def _images(config: EvaluateConfig, options: StorageOptions, index: Manifest) -> tuple[StorageOptions, Originals, int]:
    """How actors find the images: the options, the sources, and the largest image that is decoded, in pixels."""
    originals = Originals(all_sources(config.source, config.sources), options)
    return options, originals, int(index.fingerprint["max_pixels"])


def _settings(config: EvaluateConfig, index: Manifest) -> str:
    """A digest of all that a figure depends on besides the measured weights."""
    values = {name: value for name, value in asdict(config).items() if name not in FREE}
    for part, free in (("generate", (*FREE_IN_GENERATE, config.network)), ("reconstruct", ("vae",))):
        if values[part] is not None:
            values[part] = {name: value for name, value in values[part].items() if name not in free}
    return digest([values, index.digest])[:8]


def _pins(output: Storage) -> dict[str, str]:
    return output.read_json(PINNED) if output.exists(PINNED) else {}


def _is_due(subject: Subject, taken: list[str], every_images: int) -> bool:
    """Whether a state is measured: a run's end always, a checkpoint where a multiple of `every_images` lies before it
    and after those that are taken."""
    if not subject.is_checkpoint or not every_images or subject.images_seen is None:
        return True
    return all(int(name) // every_images < subject.images_seen // every_images for name in taken)


def _write_summary(config: EvaluateConfig, results: dict[str, Result], missed: set[str], output: Storage) -> None:
    rows = [
        {"state": name, "images_seen": results[name].images_seen, **results[name].numbers} for name in sorted(results)
    ]
    output.write_json(METRICS, {"network": config.network, "results": rows, "missed": sorted(missed)})


def _sheet(cells: list[tuple[str, bytes]]) -> bytes:
    """A contact sheet of labelled PNG files, as PNG."""
    opened = [(label, [Image.open(io.BytesIO(data))]) for label, data in cells]
    return png(np.asarray(contact_sheet(opened, SHEET_COLUMNS, SHEET_SIDE)))
