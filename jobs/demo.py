"""The whole pipeline on rendered pictures, from images to pictures: python -m jobs.demo jobs/configs/demo.toml"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from jobs import generate, preprocess, train_base, train_refiner, train_vae
from jobs.cli import load, main
from jobs.config import DemoJob, GenerateJob, Job, PreprocessJob
from jobs.demo_images import render_images
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob
from pipelines.config import flat
from pipelines.evaluate.generate import MANIFEST
from pipelines.evaluate.retrieval import retrieval
from pipelines.images import decode
from pipelines.pictures import contact_sheet
from pipelines.schema import read_manifest
from pipelines.storage import Storage
from pipelines.tracking import LOCAL_DATABASE

CONFIGS = Path(__file__).parent / "configs" / "demo"
RENDERED = {"cpu": (160, 256), "gpu": (1_500, 640)}  # pictures, and the longest side of the largest in pixels
SHEET, SHEET_PAIRS, SHEET_COLUMNS, SHEET_SIDE = "contact_sheet.png", 48, 6, 96


@dataclass
class Report:
    """Rows and seconds of each stage."""

    lines: list[tuple[str, int, float]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, rows: Callable[[], int]) -> Iterator[None]:
        """Time a stage; `rows` counts what it made, at its end."""
        print(f"\n=== {name}", flush=True)
        begun = time.perf_counter()
        yield
        self.lines.append((name, rows(), time.perf_counter() - begun))

    def __str__(self) -> str:
        head = f"{'stage':<16}{'rows':>10}{'seconds':>10}{'rows/s':>10}"
        lines = [
            f"{name:<16}{rows:>10,}{s:>10.1f}{rows / s:>10.1f}" if s >= 1 else f"{name:<16}{rows:>10,}   was there"
            for name, rows, s in self.lines
        ]
        total = f"{'total':<16}{'':>10}{sum(s for *_, s in self.lines):>10.1f}"
        return "\n".join([head, *lines, total])


def run(job: DemoJob) -> None:
    """Render, preprocess, train all three networks, make pictures, and say how well they fit their prompts."""
    root = Path(os.path.abspath(job.output))
    stages = stage_jobs(job)
    report = Report()
    images, pixels = _rendered(job)
    with report.stage("render", lambda: images):
        render_images(root / "images", images, pixels)
    with report.stage("index", lambda: _rows(root / "index", "index")):
        preprocess.run_stage(stages.preprocess, "index")
    with report.stage("train VAE", lambda: stages.vae.schedule.images):
        train_vae.run(stages.vae)
    with report.stage("latents", lambda: _rows(root / "latents", "latents")):
        preprocess.run_stage(stages.preprocess, "latents")
    with report.stage("train base", lambda: stages.base.schedule.images):
        train_base.run(stages.base)
    with report.stage("train refiner", lambda: stages.refiner.schedule.images):
        train_refiner.run(stages.refiner)
    with report.stage("generate", lambda: len(_pictures(root))):
        generate.run(stages.generate)
    pairs = _pairs(root, stages.preprocess)
    _write_sheet(root / SHEET, pairs)
    found = retrieval([pair.made for pair in pairs], [pair.real for pair in pairs], [pair.size for pair in pairs])
    database = root / LOCAL_DATABASE
    print(
        f"\n{report}\n\npictures against their prompts: {found}\n\n"
        f"everything:    {root}\ncontact sheet: {root / SHEET}\npictures:      {root / 'pictures'}\n"
        f"MLflow page:   {os.path.relpath(sys.executable)} -m mlflow ui --backend-store-uri sqlite:///{database}"
        f"   (or: make ui)"
    )


def _rendered(job: DemoJob) -> tuple[int, int]:
    images, pixels = RENDERED[job.preset]
    return job.images or images, job.image_pixels or pixels


def plan(job: DemoJob) -> None:
    """Print what each stage would read and write."""
    stages = stage_jobs(job)
    images, pixels = _rendered(job)
    print(f"render: {images} pictures, longest side up to {pixels} pixels")
    for stage in (stages.vae, stages.base, stages.refiner):
        print(f"{stage.output}: {stage.schedule.images} images in steps of {stage.batch.global_size}")
    print(f"{stages.generate.output}: a picture of each kept image's caption")


@dataclass(frozen=True)
class Stages:
    """The job of each stage."""

    preprocess: PreprocessJob
    vae: TrainVAEJob
    base: TrainBaseJob
    refiner: TrainRefinerJob
    generate: GenerateJob


def stage_jobs(job: DemoJob) -> Stages:
    """The configured preset's jobs, with all paths below the demo's output."""
    root = Path(os.path.abspath(job.output))
    inputs = {"task.vae.path": root / "vae", "task.latents": root / "latents"}

    def read(kind: type[Job], name: str, **paths: Path) -> Any:
        overrides = [f'{key}="{path}"' for key, path in paths.items()]
        given = job.model_dump(mode="json")  # with the passwords that settings() leaves out
        shared = flat({name: given[name] for name in ("storage", "tracking", "ray")})
        shared["tracking.uri"] = job.tracking.uri or f"sqlite:///{root / LOCAL_DATABASE}"
        overrides += [f"{key}={json.dumps(value)}" for key, value in shared.items() if value is not None]
        return load(kind, str(CONFIGS / job.preset / f"{name}.toml"), overrides)

    return Stages(
        preprocess=read(
            PreprocessJob,
            "preprocess",
            **{
                "source.path": root / "images",
                "index": root / "index",
                "latents": root / "latents",
                "vae.path": root / "vae",
            },
        ),
        vae=read(
            TrainVAEJob,
            "train_vae",
            **{"output": root / "vae", "task.index": root / "index", "task.source.path": root / "images"},
        ),
        base=read(TrainBaseJob, "train_base", **{"output": root / "base"}, **inputs),
        refiner=read(TrainRefinerJob, "train_refiner", **{"output": root / "refiner"}, **inputs),
        generate=read(
            GenerateJob,
            "generate",
            **{
                "output": root / "pictures",
                "generate.base.path": root / "base",
                "generate.refiner.path": root / "refiner",
                "generate.vae.path": root / "vae",
                "generate.prompts.index": root / "index",
            },
        ),
    )


@dataclass(frozen=True)
class Pair:
    """A training image and the picture made of its caption."""

    caption: str
    size: tuple[int, int]
    real: Image.Image
    made: Image.Image


def _pictures(root: Path) -> list[dict[str, Any]]:
    return Storage(str(root / "pictures")).read_json(MANIFEST)["pictures"]


def _pairs(root: Path, job: PreprocessJob) -> list[Pair]:
    images, pictures = Storage(str(root / "images")), Storage(str(root / "pictures"))
    return [
        Pair(
            caption=row["text"],
            size=tuple(row["size"]),
            real=decode(images.read(row["path"]), job.filters.max_pixels),
            made=Image.open(io.BytesIO(pictures.read(row["file"]))),
        )
        for row in _pictures(root)
    ]


def _write_sheet(path: Path, pairs: list[Pair]) -> None:
    cells = [(pair.caption, (pair.real, pair.made)) for pair in pairs[:SHEET_PAIRS]]
    contact_sheet(cells, SHEET_COLUMNS, SHEET_SIDE, "left: training image, right: generated from its caption").save(
        path
    )


def _rows(folder: Path, kind: str) -> int:
    manifest = read_manifest(Storage(str(folder)), kind)
    return manifest.rows if manifest else 0


if __name__ == "__main__":
    main(DemoJob, run, plan)
