"""How settings are read: every mistake that can be seen before anything starts is an error in words."""

import pytest

from jobs.cli import JobError, load
from jobs.config import DemoJob, GenerateJob, PreprocessJob
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob
from tests.jobs.settings import JOBS, LINE, toml, wrong


@pytest.mark.parametrize("kind", JOBS)
def test_each_job_of_these_tests_is_valid(make, kind):
    assert isinstance(make(kind), kind)


@pytest.mark.parametrize(
    ("kind", "override", "key", "near"),
    [
        (TrainBaseJob, "shedule.images=5", "shedule", "schedule"),
        (TrainBaseJob, "optimizer.learning_rate=1", "optimizer.learning_rate", None),
        (TrainBaseJob, "optimizer.weightdecay=1", "optimizer.weightdecay", "weight_decay"),
        (TrainBaseJob, "task.unet.pre_set=base", "task.unet.pre_set", "preset"),
        (TrainBaseJob, "task.diffusion.num_timestep=5", "task.diffusion.num_timestep", "num_timesteps"),
        (TrainBaseJob, "task.loss.text_drop_out=0", "task.loss.text_drop_out", "text_dropout"),
        (TrainBaseJob, "storage.s3_endpont='x'", "storage.s3_endpont", "s3_endpoint"),
        (PreprocessJob, "encode.resources.worker=[1,2]", "encode.resources.worker", "workers"),
        (PreprocessJob, "crop.flip_change=0.5", "crop.flip_change", "flip_chance"),
        (PreprocessJob, "source.columns.captions='x'", "source.columns.captions", "caption"),
        (PreprocessJob, "filters.scores.aesthetic_score.mim=1", "filters.scores.aesthetic_score.mim", "min"),
        (TrainVAEJob, "task.source.pat='x'", "task.source.pat", "path"),
        (GenerateJob, "generate.prompts.text=['x']", "generate.prompts.text", "texts"),
        (GenerateJob, "generate.sampling.hand_over=3", "generate.sampling.hand_over", "handover"),
        (DemoJob, "ray.adress='auto'", "ray.adress", "address"),
    ],
)
def test_a_mistyped_key_at_any_depth_is_named_and_the_near_one_suggested(make, kind, override, key, near):
    message = wrong(make, kind, override)
    assert f"{key}: there is no such setting" in message
    assert near is None or f"did you mean {near}?" in message


def test_a_key_in_the_file_is_checked_as_an_override_is(make):
    with pytest.raises(JobError, match=r"imagess: there is no such setting; did you mean images\?"):
        make(DemoJob, text="imagess = 5")


def test_all_mistakes_are_told_at_once(make):
    message = wrong(make, TrainBaseJob, "optimizer.lr=0", "batch.micro=3", "workers.dtype=float16")
    assert [key in message for key in ("optimizer.lr:", "batch.micro:", "workers.dtype:")] == [True] * 3


@pytest.mark.parametrize("key", ["output", "schedule.images", "batch.global_size", "task.latents", "task.unet.preset"])
def test_a_missing_setting_is_named(make, key):
    text = LINE.join(line for line in toml(TrainBaseJob).splitlines() if not line.startswith(f"{key} "))
    with pytest.raises(JobError, match=rf"(?m)^\s*{key.replace('.', '[.]')}: is missing|{key.split('.')[0]}.*missing"):
        make(TrainBaseJob, text=text)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=3e-5", 3e-5),
        ("optimizer.lr=1", 1.0),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("workers.gpu=true", True),
        ("workers.dtype=bfloat16", "bfloat16"),
        ('workers.dtype="bfloat16"', "bfloat16"),
        ("schedule.images=1_000", 1000),
        ("tracking.run_name=", ""),
        ("tracking.run_name=two words, and = signs", "two words, and = signs"),
        ("tracking.uri=http://host:5000/a?b=c", "http://host:5000/a?b=c"),
        ("task.unet.path=/data/lr=1e-4/weights.safetensors", "/data/lr=1e-4/weights.safetensors"),
        ("task.unet.path=s3://bucket/a=b", "s3://bucket/a=b"),
    ],
)
def test_an_override_is_toml_or_else_the_word_itself(make, override, value):
    job = make(TrainBaseJob, override)
    for name in override.partition("=")[0].split("."):
        job = getattr(job, name)
    assert job == value
    assert type(job) is type(value)


def test_an_override_replaces_the_files_value_and_the_last_one_counts(make):
    assert make(TrainBaseJob).batch.micro_size == 4
    assert make(TrainBaseJob, "batch.micro_size=2", "batch.micro_size=8").batch.micro_size == 8


def test_an_override_of_null_takes_a_setting_or_a_whole_table_out_of_the_file(make):
    assert make(GenerateJob).generate.refiner is not None
    assert make(GenerateJob, "generate.refiner=null").generate.refiner is None
    assert make(TrainBaseJob, "batch.micro_size=8", "schedule.log_images=null").batch.micro_size == 8
    assert "generate.refiner.path: is missing" in wrong(make, GenerateJob, "generate.refiner.path=null")
    assert "output" in wrong(make, GenerateJob, "output=null")
    assert "there is no such setting" in wrong(make, GenerateJob, "generate.refinement.path=null")


def test_an_override_may_name_what_the_file_leaves_out(make):
    assert make(TrainBaseJob, "task.samples.steps=3").task.samples.steps == 3


def test_an_override_may_be_a_table(make):
    job = make(TrainBaseJob, 'task.vae={preset="tiny", path="/v", seed=3}')
    assert (job.task.vae.path, job.task.vae.seed) == ("/v", 3)


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", ""])
def test_an_override_that_is_none_is_quoted(make, override):
    assert override in wrong(make, TrainBaseJob, override)


def test_a_setting_is_no_table(make):
    assert "output.x: output is not a table" in wrong(make, TrainBaseJob, "output.x=1")


@pytest.mark.parametrize(
    ("kind", "key", "one"),
    [
        (PreprocessJob, "vae.preset", "sdxl"),
        (PreprocessJob, "text.preset", "sdxl"),
        (TrainVAEJob, "task.vae.preset", "tiny"),
        (TrainVAEJob, "task.discriminator", "tiny"),
        (TrainBaseJob, "task.unet.preset", "tiny-base"),
        (TrainBaseJob, "task.vae.preset", "sdxl"),
        (TrainRefinerJob, "task.text.preset", "sdxl"),
        (GenerateJob, "generate.base.preset", "refiner"),
        (GenerateJob, "generate.refiner.preset", "refiner"),
        (GenerateJob, "generate.vae.preset", "sdxl"),
    ],
)
def test_a_preset_that_is_not_there_lists_those_that_are(make, kind, key, one):
    message = wrong(make, kind, f"{key}=sdxxl")
    assert f"{key}: there is no preset 'sdxxl'; there are " in message
    assert one in message.partition("there are")[2]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (TrainBaseJob, "batch.global_size"),
        (TrainBaseJob, "batch.micro_size"),
        (TrainBaseJob, "batch.shuffle_rows"),
        (TrainBaseJob, "workers.count"),
        (TrainBaseJob, "schedule.images"),
        (TrainBaseJob, "schedule.checkpoint_images"),
        (TrainBaseJob, "schedule.keep_checkpoints"),
        (TrainBaseJob, "optimizer.lr"),
        (TrainBaseJob, "ema.halflife_images"),
        (TrainBaseJob, "task.samples.steps"),
        (TrainBaseJob, "storage.s3_attempts"),
        (TrainBaseJob, "storage.s3_timeout_seconds"),
        (PreprocessJob, "encode.batch"),
        (PreprocessJob, "encode.rows_per_file"),
        (PreprocessJob, "index_rows_per_file"),
        (PreprocessJob, "filters.min_side"),
        (PreprocessJob, "filters.max_pixels"),
        (PreprocessJob, "buckets.resolution"),
        (GenerateJob, "generate.batch"),
        (GenerateJob, "generate.prompts.count"),
        (DemoJob, "images"),
        (DemoJob, "ray.cpus"),
    ],
)
@pytest.mark.parametrize("value", [0, -1])
def test_a_count_is_at_least_one(make, kind, key, value):
    assert key in wrong(make, kind, f"{key}={value}")


@pytest.mark.parametrize("kind", [TrainBaseJob, TrainRefinerJob, GenerateJob])
def test_text_of_another_width_is_refused(make, kind):
    key = "generate.text.preset" if kind is GenerateJob else "task.text.preset"
    assert "give 2048, pooled 1280" in wrong(make, kind, f"{key}=sdxl")


def test_local_paths_become_absolute(make, tmp_path):
    job = make(PreprocessJob)
    assert (job.index, job.latents) == (f"{tmp_path}/out/index", f"{tmp_path}/out/latents")
    assert (job.source.path, job.vae.path) == (f"{tmp_path}/images", f"{tmp_path}/out/vae")
    job = make(TrainBaseJob, "task.unet.path=../w.safetensors")
    assert (job.output, job.task.latents) == (f"{tmp_path}/out/base", f"{tmp_path}/out/latents")
    assert job.task.unet.path == f"{tmp_path.parent}/w.safetensors"
    job = make(GenerateJob, "generate.prompts.texts=[]", "generate.prompts.file=prompts.txt")
    assert job.generate.prompts.file == f"{tmp_path}/prompts.txt"


def test_what_is_no_local_path_stays(make, tmp_path):
    job = make(PreprocessJob, "index=s3://bucket/index", "source.path=/data/images", "source.columns.caption=path")
    assert (job.index, job.source.path, job.source.columns.caption) == ("s3://bucket/index", "/data/images", "path")


def test_a_text_encoder_is_a_name_or_a_folder_that_is_there(make, tmp_path):
    text = toml(TrainBaseJob).replace("task.text.seed = 0", 'task.text.bigg = "/bigg.safetensors"')
    hub = "openai/clip-vit-large-patch14"
    assert make(TrainBaseJob, f"task.text.clip_l={hub}", text=text).task.text.clip_l == hub
    (tmp_path / hub).mkdir(parents=True)
    assert make(TrainBaseJob, f"task.text.clip_l={hub}", text=text).task.text.clip_l == f"{tmp_path}/{hub}"


@pytest.mark.parametrize("kind", [PreprocessJob, TrainBaseJob, TrainRefinerJob, GenerateJob])
@pytest.mark.parametrize("given", [[], ["clip_l='/c'"], ["bigg='/b'"], ["clip_l='/c'", "bigg='/b'", "seed=0"]])
def test_text_encoders_are_both_named_or_else_seeded(make, kind, given):
    key = {PreprocessJob: "text", GenerateJob: "generate.text"}.get(kind, "task.text")
    text = LINE.join(line for line in toml(kind).splitlines() if not line.startswith(f"{key}.seed"))
    with pytest.raises(JobError, match=f"{key}: name both clip_l and bigg, or give a seed"):
        make(kind, *(f"{key}.{setting}" for setting in given), text=text)
    assert make(kind, f"{key}.clip_l=/c", f"{key}.bigg=/b", text=text)


def test_a_file_that_is_not_there_or_not_toml_is_an_error(make, tmp_path):
    with pytest.raises(JobError, match="cannot be read: No such file"):
        load(DemoJob, str(tmp_path / "nothing.toml"), [])
    with pytest.raises(JobError, match=r"not TOML: .*line 1"):
        make(DemoJob, text="images: 5")


def test_the_resolved_settings_load_to_the_same_job(make):
    for kind in JOBS:
        job = make(kind)
        assert kind.model_validate(job.model_dump(mode="json")) == job
