"""Valid settings of each job, for tests to spoil."""

import pytest

from jobs.cli import JobError
from jobs.config import DemoJob, EvaluateJob, GenerateJob, PreprocessJob
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob

JOBS = {
    PreprocessJob: """
        index = "out/index"
        latents = "out/latents"
        source.path = "images"
        buckets.table = [[16, 48], [32, 32]]
        buckets.multiple = 8
        vae = {preset = "tiny", path = "out/vae"}
        text = {preset = "tiny", seed = 0}
    """,
    TrainVAEJob: """
        output = "out/vae"
        task = {index = "out/index", discriminator = "tiny", vae.preset = "tiny", source.path = "images"}
        batch = {global_size = 16, micro_size = 4}
        schedule = {images = 160, checkpoint_images = 80}
        workers.count = 2
    """,
    TrainBaseJob: """
        output = "out/base"
        task = {latents = "out/latents", unet.preset = "tiny-base", text.preset = "tiny", text.seed = 0}
        task.vae = {preset = "tiny", path = "out/vae"}
        batch = {global_size = 16, micro_size = 4}
        schedule = {images = 160, checkpoint_images = 80}
        workers.count = 2
    """,
    TrainRefinerJob: """
        output = "out/refiner"
        task = {latents = "out/latents", unet.preset = "tiny-refiner", text.preset = "tiny", text.seed = 0}
        task.vae = {preset = "tiny", path = "out/vae"}
        task.loss.timesteps = [0, 200]
        batch = {global_size = 16, micro_size = 4}
        schedule = {images = 160, checkpoint_images = 80}
    """,
    GenerateJob: """
        output = "out/pictures"
        generate.base = {preset = "tiny-base", path = "out/base"}
        generate.refiner = {preset = "tiny-refiner", path = "out/refiner"}
        generate.vae = {preset = "tiny", path = "out/vae"}
        generate.text = {preset = "tiny", seed = 0}
        generate.prompts = {texts = ["a cat"], size = [32, 48]}
    """,
    EvaluateJob: """
        output = "out/evaluation"
        evaluate.network = "base"
        evaluate.source.path = "images"
        evaluate.generate.base = {preset = "tiny-base", path = "out/base"}
        evaluate.generate.vae = {preset = "tiny", path = "out/vae"}
        evaluate.generate.text = {preset = "tiny", seed = 0}
        evaluate.generate.prompts = {index = "out/index", count = 8}
        evaluate.inception.path = "out/inception.pt"
    """,
    DemoJob: "images = 8",
}
LINE = "\n"


def toml(kind: type) -> str:
    """The settings as TOML: inline tables of one line each may not be reopened, so they become dotted keys."""
    lines = []
    for line in filter(None, map(str.strip, JOBS[kind].splitlines())):
        key, _, value = line.partition(" = ")
        if value.startswith("{"):
            depth, part, parts = 0, "", []
            for character in value[1:-1]:
                depth += (character in "[{") - (character in "]}")
                if character == "," and not depth:
                    parts.append(part)
                    part = ""
                else:
                    part += character
            lines += [f"{key}.{entry.strip()}" for entry in [*parts, part]]
        else:
            lines.append(line)
    return LINE.join(lines)


def wrong(make, kind: type, *overrides: str) -> str:
    with pytest.raises(JobError) as error:
        make(kind, *overrides)
    return str(error.value)
