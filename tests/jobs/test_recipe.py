"""The shipped configurations of the paper's stages (SDXL 2.4 and 2.5), and that each starts from the one before."""

from pathlib import Path

import pytest

from jobs.cli import load
from jobs.config import PreprocessJob
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob
from pipelines.preprocess.bucket import bucket_table

CONFIGS = Path(__file__).parents[2] / "jobs/configs/sdxl"


def stage(kind, name):
    return load(kind, str(CONFIGS / f"{name}.toml"), [])


@pytest.mark.parametrize(("name", "steps"), [("train_base_256", 600_000), ("train_base_512", 200_000)])
def test_the_fixed_sizes_train_for_the_papers_steps(name, steps):
    job = stage(TrainBaseJob, name)
    assert job.batch.global_size == 2048
    assert job.schedule.images == steps * 2048
    assert job.task.loss.offset_noise == 0


def test_the_base_goes_from_256_to_512_to_the_papers_buckets_with_offset_noise():
    first, second, last = (stage(TrainBaseJob, name) for name in ("train_base_256", "train_base_512", "train_base"))
    assert first.task.unet.path is None
    assert second.task.unet.path == first.output
    assert last.task.unet.path == second.output
    assert last.task.loss.offset_noise == 0.05


@pytest.mark.parametrize(
    ("preprocessing", "training", "buckets"),
    [
        ("preprocess_256", "train_base_256", ((256, 256),)),
        ("preprocess_512", "train_base_512", ((512, 512),)),
        ("preprocess", "train_base", None),
    ],
)
def test_each_stage_reads_what_its_preprocessing_writes(preprocessing, training, buckets):
    made, read = stage(PreprocessJob, preprocessing), stage(TrainBaseJob, training)
    assert made.latents == read.task.latents
    assert made.vae == read.task.vae
    assert made.text == read.task.text
    table = bucket_table(made.buckets)
    assert len(table) == 40 if buckets is None else table == buckets


def test_the_vae_trains_at_256_on_batches_of_256_with_an_average():
    job = stage(TrainVAEJob, "train_vae")
    assert job.batch.global_size == 256
    assert job.task.index == stage(PreprocessJob, "preprocess_256").index
    assert job.ema.halflife_images > 0


def test_the_refiner_trains_on_the_lowest_200_timesteps():
    assert stage(TrainRefinerJob, "train_refiner").task.loss.timesteps == (0, 200)
