"""Write a model in a public layout: python -m jobs.export CONFIG.toml"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jobs.cli import main
from jobs.config import ExportJob

if TYPE_CHECKING:
    from model.publish import Model
    from pipelines.export import Export, Part


def run(job: ExportJob) -> None:
    """Write it, whole or not at all."""
    from pipelines.estimate import readable
    from pipelines.export import opened, parts_of, write

    begun = time.perf_counter()
    export = _export(job)
    with opened(export, job.storage) as model:
        parts = parts_of(model, export.layout)
        seconds = write(model, export, job.output, job.storage)
    for part in parts:
        print(f"{_line(part)} in {seconds[part.name]:.1f} s")
    _print_notes(job, model)
    total = sum(part.size for part in parts)
    print(f"export: {readable(total)} of {job.dtype} in {time.perf_counter() - begun:.1f} s, in {job.output}")


def plan(job: ExportJob) -> None:
    """Check that everything is there and fits, and print what would be written."""
    from pipelines.export import opened, parts_of

    export = _export(job)
    with opened(export, job.storage) as model:
        for part in parts_of(model, export.layout):
            print(_line(part))
        _print_notes(job, model)
    what = "one file" if job.layout == "single_file" else "a diffusers folder"
    print(f"export: would write {what} of {job.dtype} to {job.output}")


def _export(job: ExportJob) -> Export:
    """The job with its noise schedule; raises where the output is there already."""
    import torch

    from pipelines.export import Export, require_absent
    from pipelines.networks import trained_diffusion

    require_absent(job.output, job.storage)
    return Export(
        layout=job.layout,
        unet=job.unet,
        vae=job.vae,
        text=job.text,
        diffusion=job.diffusion or trained_diffusion(job.unet, job.storage),
        dtype=getattr(torch, job.dtype),
        resolution=job.resolution,
    )


def _line(part: Part) -> str:
    from pipelines.estimate import readable

    return f"{part.name}: {part.parameters:,} parameters, {readable(part.size)}"


def _print_notes(job: ExportJob, model: Model) -> None:
    """What the written schedule is, and what a single file cannot say to other programs."""
    from model.config import DiffusionConfig, VAEConfig

    schedule = ", zero terminal SNR" if model.diffusion.zero_terminal_snr else ""
    print(f"schedule: predicts {model.diffusion.prediction_type}{schedule}")
    if job.layout != "single_file":
        return
    factor, published = model.vae.scaling_factor, VAEConfig().scaling_factor
    if factor != published:
        print(
            f"warning: the VAE's scaling factor is {factor}, and a single file has no place for it but its metadata, "
            f"which this project reads; other programs take {published} and make wrong pictures: set it there, or "
            "export layout diffusers"
        )
    if model.diffusion != DiffusionConfig():
        print(
            "warning: a single file has no place for this schedule but its metadata, which this project reads; set it "
            "in other programs, or export layout diffusers"
        )


if __name__ == "__main__":
    main(ExportJob, run, plan, needs_ray=False)
