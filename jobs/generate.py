"""Make pictures of prompts: python -m jobs.generate CONFIG.toml"""

from __future__ import annotations

import time
from collections import Counter

from jobs.cli import check_resources, main, settings, sole_writer, start_ray
from jobs.config import GenerateJob
from pipelines.lease import Lease
from pipelines.schema import require_manifest
from pipelines.storage import Storage
from pipelines.tracking import Lineage, closing, open_run, send_left, tracking_uri


def run(job: GenerateJob) -> None:
    """Make the pictures that are not there yet, in a folder that no other process may write meanwhile."""
    with sole_writer(Storage(job.output, job.storage)) as held:
        _run(job, held)


def _run(job: GenerateJob, held: Lease) -> None:
    from pipelines.evaluate.generate import generate_pictures

    config, output = job.generate, held.dataset

    def begin() -> None:
        start_ray(job)
        if config.resources.gpus:
            check_resources(job, "generate.resources", GPU=config.resources.gpus * config.resources.workers[0])

    inputs = []
    if config.prompts.index is not None:
        index = Storage(config.prompts.index, job.storage)
        inputs = [Lineage(name="index", uri=index.uri, manifest=require_manifest(index, "index"))]
    uri = tracking_uri(job.tracking)
    send_left(uri, output)
    name = job.tracking.run_name
    tracked = open_run(uri, stage="generate", name=name, config=settings(job), inputs=inputs, output=output, alone=True)
    begun = time.perf_counter()
    with closing(tracked):
        done = generate_pictures(config, output, held, begin)
        seconds = time.perf_counter() - begun
        for sheet in done.sheets:
            tracked.file(sheet, output.read(sheet))
        tracked.numbers({"pictures_made": done.made, "seconds": seconds})
    print(f"generate: {done.made} of {len(done.pictures)} pictures made in {seconds:.1f} s, in {job.output}")


def plan(job: GenerateJob) -> None:
    """Print what would be made."""
    from pipelines.estimate import parameters, readable
    from pipelines.evaluate.generate import checked_prompts
    from pipelines.networks import require_weights

    config, sampling = job.generate, job.generate.sampling
    prompts = checked_prompts(config, job.storage)
    sizes = Counter(prompt.size for prompt in prompts)
    print(f"prompts: {len(prompts)}, " + ", ".join(f"{n} of {h} x {w}" for (h, w), n in sorted(sizes.items())))
    print(f"sampler: {sampling.sampler}, {sampling.steps} steps, {sampling.spacing}, guidance {sampling.scale}")
    if config.refiner is not None:
        ensemble = f"takes over below timestep {sampling.handover}"
        again = f"goes back over the last {sampling.strength:.0%} of the steps"
        print(f"refiner: {ensemble if sampling.refiner == 'ensemble' else again}, guidance {sampling.refiner_scale}")
    width = 2 if config.dtype == "bfloat16" else 4
    networks = {"base": ("unet", config.base.preset, width), "VAE": ("vae", config.vae.preset, 4)}
    networks["text encoders"] = ("text", config.text.preset, 4)
    if config.refiner is not None:
        networks["refiner"] = ("unet", config.refiner.preset, width)
    total = 0
    for name, (kind, preset, size) in networks.items():
        count = parameters(kind, preset)
        total += count * size
        print(f"{name}: {count:,} parameters")
    print(f"memory per worker, without activations: {readable(total)}")
    for part, weights in (("unet", config.base), ("unet", config.refiner), ("vae", config.vae)):
        try:
            if weights is not None:
                require_weights(weights, part, job.storage)
        except (FileNotFoundError, ValueError) as error:  # they may be trained yet
            print(f"warning: {error}")


if __name__ == "__main__":
    main(GenerateJob, run, plan, needs_ray=False)
