"""What the settings of a job may be: every mistake that can be seen before anything starts is an error in words."""

import re
from pathlib import Path

import pytest

from jobs.cli import SUBMITTED, JobError, load
from jobs.config import DemoJob, EvaluateJob, GenerateJob, PreprocessJob, TrainBaseJob, TrainRefinerJob, TrainVAEJob
from model.config import SamplerName

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


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A valid job of a kind, with overrides, loaded from a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def make(kind: type, *overrides: str, text: str | None = None):
        Path("job.toml").write_text(toml(kind) if text is None else text)
        return load(kind, "job.toml", overrides)

    return make


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


@pytest.mark.parametrize("kind", JOBS)
def test_each_job_of_these_tests_is_valid(make, kind):
    assert isinstance(make(kind), kind)


def wrong(make, kind: type, *overrides: str) -> str:
    with pytest.raises(JobError) as error:
        make(kind, *overrides)
    return str(error.value)


def test_crops_that_would_be_alike_and_passes_that_would_not_be_full_are_refused(make):
    several = ["encode.crops=2", "crop.placement=center"]
    assert "encode.crops: 2 crops of an image are all alike" in wrong(make, PreprocessJob, *several)
    assert make(PreprocessJob, *several, "crop.flip_chance=0.5").encode.crops == 2
    sizes = ["encode.rows_per_file=50", "encode.batch=16"]
    assert "encode.rows_per_file: 50 is not a multiple of encode.batch, 16" in wrong(make, PreprocessJob, *sizes)
    assert make(PreprocessJob, "encode.rows_per_file=8", "encode.batch=16").encode.rows_per_file == 8


def test_captions_are_a_column_or_several_with_a_weight_each(make):
    columns = make(PreprocessJob, "source.columns.caption.long=3", "source.columns.caption.short=0.5").source.columns
    assert columns.caption == {"long": 3.0, "short": 0.5}
    assert make(PreprocessJob, "source.columns.caption_weights=odds").source.columns.caption_weights == "odds"
    for wrongly in (["source.columns.caption=''"], ["source.columns.caption.long=3"]):
        message = wrong(make, PreprocessJob, "source.columns.caption_weights=odds", *wrongly)
        assert "source.columns.caption_weights: weighs the captions of one column" in message
    assert "source.columns.caption" in wrong(make, PreprocessJob, "source.columns.caption.long=0")


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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["filters.scores.unsafe.max=0.5"], "filters.scores.unsafe: .* no such score; there is aesthetic_score, mark"),
        (["filters.scores.mark={min=2, max=1}"], "filters.scores.mark: nothing lies between min 2.0 and max 1.0"),
        (["source.columns.scores.aesthetic_score=a"], "set source.columns.aesthetic_score instead"),
    ],
)
def test_a_limit_is_set_on_a_score_that_the_source_has(make, overrides, words):
    assert make(PreprocessJob, "source.columns.scores.mark=m", "filters.scores.mark.max=1").filters.scores
    assert re.search(words, wrong(make, PreprocessJob, "source.columns.scores.mark=m", *overrides))


SEVERAL = 'sources=[{name="one", path="images"}, {name="two", path="/more", columns.scores.mark="m"}]'


def test_several_sources_take_the_place_of_one(make, tmp_path):
    def several(kind: type, *overrides: str):
        return make(kind, *overrides, text=LINE.join(line for line in toml(kind).split(LINE) if "source." not in line))

    job = several(PreprocessJob, SEVERAL, "sources.1.columns.caption=text", "filters.scores.mark.max=1")
    assert [source.name for source in job.all_sources] == ["one", "two"]
    assert (job.sources[0].path, job.sources[1].columns.caption) == (f"{tmp_path}/images", "text")
    assert several(TrainVAEJob, f"task.{SEVERAL}").task.sources == several(PreprocessJob, SEVERAL).sources
    for kind, prefix in ((PreprocessJob, ""), (TrainVAEJob, "task.")):
        for given, message in (
            ([], f"{prefix}source: give a source, or {prefix}sources"),
            ([f"{prefix}{SEVERAL}", f"{prefix}source.path=x"], f"{prefix}source: give a source, or {prefix}sources"),
            ([f"{prefix}{SEVERAL}", f"{prefix}sources.1.name=one"], f"{prefix}sources: 2 have the name 'one'"),
            ([f"{prefix}{SEVERAL}", f"{prefix}sources.2.name=x"], f"{prefix}sources.2.name: 2 is not a table"),
            ([f"{prefix}{SEVERAL}", f"{prefix}sources.name=x"], f"{prefix}sources.name: sources is no table"),
        ):
            with pytest.raises(JobError, match=re.escape(message)):
                several(kind, *given)


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


def test_a_batch_that_does_not_divide_names_both_keys(make):
    message = wrong(make, TrainBaseJob, "batch.global_size=12")
    assert "batch.global_size" in message
    assert "batch.micro_size x workers.count = 4 x 2" in message
    assert make(TrainBaseJob, "batch.global_size=24").batch.global_size == 24


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["buckets.table=[[16, 48], [32, 36]]"], "side 36 of 32 x 36 is not a multiple of 8"),
        (["buckets.table=square", "buckets.resolution=36"], "side 36 of 36 x 36"),
        (["buckets.table=sdxl", "buckets.resolution=512", "buckets.multiple=64"], "not a multiple of 64"),
        (["buckets.table=sdxl", "buckets.resolution=1000"], "1000 does not scale"),
        (["buckets.multiple=6"], "buckets.multiple: 6 is not a multiple of vae.preset's reduction, 4"),
    ],
)
def test_an_impossible_bucket_is_refused(make, overrides, words):
    assert words in wrong(make, PreprocessJob, *overrides)


def test_the_papers_table_is_allowed_as_it_is(make):
    assert make(PreprocessJob, "buckets.table=sdxl", "buckets.resolution=1024", "buckets.multiple=64")
    assert make(PreprocessJob, "buckets.table=sdxl", "buckets.resolution=512", "buckets.multiple=32")


def test_a_bucket_table_without_a_bucket_is_refused(make):
    assert "buckets.table" in wrong(make, PreprocessJob, "buckets.table=[]")


@pytest.mark.parametrize("table", ["sdlx", "[[32]]", "[[0, 8]]"])
def test_a_mistake_in_a_choice_is_told_by_the_settings_name_alone(make, table):
    message = wrong(make, PreprocessJob, f"buckets.table={table}")
    assert "buckets.table" in message
    assert "constrained-int" not in message
    assert "literal[" not in message


@pytest.mark.parametrize("timesteps", ["[0, 1001]", "[-1, 200]", "[200, 200]", "[300, 200]"])
@pytest.mark.parametrize("kind", [TrainBaseJob, TrainRefinerJob])
def test_timesteps_outside_the_schedule_are_refused(make, kind, timesteps):
    assert "task.loss.timesteps" in wrong(make, kind, f"task.loss.timesteps={timesteps}")


def test_a_shorter_schedule_bounds_the_timesteps(make):
    assert make(TrainRefinerJob, "task.diffusion.num_timesteps=200").task.loss.timesteps == (0, 200)
    assert "schedule's 100" in wrong(make, TrainRefinerJob, "task.diffusion.num_timesteps=100")


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


@pytest.mark.parametrize(
    "setting",
    [
        "crop.flip_chance=1.5",
        "crop.flip_chance=-0.1",
        "crop.flip_chance=nan",
        "crop.seed=-1",
        "encode.resources.workers=[3, 2]",
        "encode.resources.gpus=-1",
        'stages=["images"]',
        "stages=[]",
        "filters.max_aspect=0.5",
    ],
)
def test_preprocessing_is_refused_with(make, setting):
    assert setting.partition("=")[0] in wrong(make, PreprocessJob, setting)


@pytest.mark.parametrize(
    "setting",
    [
        "batch.seed=-1",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.betas=[-0.1, 0.9]",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "optimizer.weight_decay=-1",
        "optimizer.clip_norm=-1",
        "ema.rampup=0",
        "task.loss.text_dropout=1.5",
        "task.loss.caption_dropout=-0.1",
        "task.loss.min_snr_gamma=0",
        "task.loss.timestep_bias.multiplier=0",
        "task.loss.timestep_bias.portion=0",
        "task.loss.timestep_bias.strategy=sometimes",
        "task.loss.size_dropout=-0.5",
        "task.loss.offset_noise=-1",
        "task.diffusion.prediction_type=velocity",
        "workers.zero_stage=4",
        "workers.offload_optimizer=true",
        "workers.dtype=float16",
        "optimizer.decay_shape=step",
        "optimizer.final_lr_share=1.5",
        "optimizer.guard.action=shrug",
        "workers.count=two",
        "workers.min_count=0",
        "workers.min_count=3",
        "workers.grow_seconds=0",
    ],
)
def test_training_is_refused_with(make, setting):
    assert setting.partition("=")[0] in wrong(make, TrainBaseJob, setting)


def test_biased_timesteps_lie_among_those_that_are_drawn(make):
    strategy = "task.loss.timestep_bias.strategy"
    assert make(TrainRefinerJob, f"{strategy}=later").task.loss.biased_timesteps == (150, 200)
    assert make(TrainBaseJob, f"{strategy}=earlier").task.loss.biased_timesteps == (0, 250)
    bounds = "task.loss.timestep_bias.range=[100, 300]"
    assert make(TrainBaseJob, f"{strategy}=range", bounds).task.loss.biased_timesteps == (100, 300)
    assert "[100, 300], which are none or not all" in wrong(make, TrainRefinerJob, f"{strategy}=range", bounds)
    assert "timestep_bias: range is None with the strategy 'range'" in wrong(make, TrainBaseJob, f"{strategy}=range")
    assert "timestep_bias: range is (100, 300) with the strategy 'none'" in wrong(make, TrainBaseJob, bounds)
    few = "task.loss.timestep_bias.portion=0.001"
    assert "[200, 200], which are none" in wrong(make, TrainRefinerJob, f"{strategy}=later", few)


def test_a_schedule_that_ends_without_a_signal_needs_v(make):
    zero, v = "task.diffusion.zero_terminal_snr=true", "task.diffusion.prediction_type=v"
    message = wrong(make, TrainBaseJob, zero)
    assert "task.diffusion" in message
    assert "zero_terminal_snr needs prediction_type 'v'" in message
    assert make(TrainBaseJob, zero, v).task.diffusion.zero_terminal_snr


def test_the_perceptual_loss_is_left_out_or_named_in_full(make, tmp_path):
    trunk, heads = "task.lpips.trunk=vgg16.safetensors", "task.lpips.heads=heads.safetensors"
    assert make(TrainVAEJob).task.lpips is None
    assert make(TrainVAEJob, trunk, heads).task.lpips.trunk == f"{tmp_path}/vgg16.safetensors"
    assert "task.lpips.heads: is missing" in wrong(make, TrainVAEJob, trunk)
    assert "task.lpips.trunk: is missing" in wrong(make, TrainVAEJob, heads)
    assert "there is no preset 'vgg'" in wrong(make, TrainVAEJob, trunk, heads, "task.lpips.preset=vgg")
    pickled = "task.lpips.trunk=vgg16.pth"
    assert "set task.lpips.allow_pickle" in wrong(make, TrainVAEJob, pickled, heads)
    assert make(TrainVAEJob, pickled, heads, "task.lpips.allow_pickle=true")


@pytest.mark.parametrize("name", ["perceptual_weight", "kl_weight", "adversarial_weight", "adversarial_start_images"])
def test_weights_of_the_vaes_loss_are_not_negative(make, name):
    assert f"task.loss.{name}" in wrong(make, TrainVAEJob, f"task.loss.{name}=-1")


def test_latents_need_a_folder_and_a_trained_vae_and_the_index_needs_neither(make):
    text = LINE.join(line for line in toml(PreprocessJob).splitlines() if not line.startswith("latents"))
    with pytest.raises(JobError, match="latents: the latents stage needs a folder"):
        make(PreprocessJob, text=text)
    text = LINE.join(line for line in text.splitlines() if not line.startswith(("vae.path", "text.seed")))
    assert make(PreprocessJob, 'stages=["index"]', text=text).stages == ("index",)
    with pytest.raises(JobError, match=r"vae.path: the latents stage needs"):
        make(PreprocessJob, "latents=/l", "text.seed=0", text=text)


def test_a_denoiser_names_the_vae_that_made_its_latents(make):
    text = LINE.join(line for line in toml(TrainBaseJob).splitlines() if not line.startswith("task.vae.path"))
    with pytest.raises(JobError, match=r"task.vae.path: name the VAE"):
        make(TrainBaseJob, text=text)


def test_the_base_is_no_refiner_and_the_refiner_no_base(make):
    assert "'tiny-refiner' is not conditioned on target_size" in wrong(
        make, TrainBaseJob, "task.unet.preset=tiny-refiner"
    )
    message = wrong(make, TrainRefinerJob, "task.unet.preset=tiny-base")
    assert "'tiny-base' is not conditioned on aesthetic_score" in message


def test_pictures_are_begun_by_a_base_and_refined_by_a_refiner(make):
    message = wrong(make, GenerateJob, "generate.base.preset=tiny-refiner")
    assert "generate.base.preset" in message
    message = wrong(make, GenerateJob, "generate.refiner.preset=tiny-base")
    assert "generate.refiner.preset" in message


@pytest.mark.parametrize("kind", [TrainBaseJob, TrainRefinerJob, GenerateJob])
def test_text_of_another_width_is_refused(make, kind):
    key = "generate.text.preset" if kind is GenerateJob else "task.text.preset"
    assert "give 2048, pooled 1280" in wrong(make, kind, f"{key}=sdxl")


@pytest.mark.parametrize("count", [0, 2, 3])
def test_prompts_come_from_exactly_one_place(make, count):
    places = ['texts=["a"]', "file=/prompts.txt", "index=/index"][:count]
    settings = [f"generate.prompts.{place}" for place in places] or ["generate.prompts.texts=[]"]
    assert "exactly one of texts, file, parquet and index" in wrong(make, GenerateJob, *settings)


@pytest.mark.parametrize("size", ["[36, 48]", "[32, 44]"])
def test_pictures_have_sides_that_the_networks_can_halve(make, size):
    assert "not a multiple of 8" in wrong(make, GenerateJob, f"generate.prompts.size={size}")


def test_the_base_keeps_a_timestep(make):
    assert "leaves no timestep to the base" in wrong(make, GenerateJob, "generate.sampling.handover=1000")


@pytest.mark.parametrize(("kind", "key"), [(GenerateJob, "generate.decode_tile"), (PreprocessJob, "encode.tile")])
def test_tiles_share_a_quarter_that_the_vae_can_reduce(make, kind, key):
    assert f"{key}: 72 is not a multiple of 16" in wrong(make, kind, f"{key}=72")
    make(kind, f"{key}=48")


def test_a_refiners_samples_need_a_timestep_below_the_hand_over(make):
    message = wrong(make, TrainRefinerJob, "schedule.sample_images=80", "task.samples.handover=0")
    assert "task.samples.handover" in message


def test_a_refiner_by_sdedit_needs_a_step_and_no_hand_over(make):
    sdedit = ("generate.sampling.refiner='sdedit'", "generate.sampling.handover=0", "generate.sampling.steps=20")
    sampling = make(GenerateJob, *sdedit, "generate.sampling.sampler='dpmpp_2m'").generate.sampling
    assert (sampling.refiner, sampling.sampler, sampling.eta) == ("sdedit", SamplerName.DPMPP_2M, None)
    message = wrong(make, GenerateJob, *sdedit, "generate.sampling.strength=0.04")
    assert "generate.sampling.strength: 0.04 of 20 steps leaves none" in message


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


@pytest.mark.parametrize("name", ["base", "refiner", "vae"])
def test_pictures_need_trained_weights(make, name):
    text = LINE.join(line for line in toml(GenerateJob).splitlines() if not line.startswith(f"generate.{name}.path"))
    with pytest.raises(JobError, match=f"generate.{name}.path: is missing"):
        make(GenerateJob, text=text)


def test_a_file_that_is_not_there_or_not_toml_is_an_error(make, tmp_path):
    with pytest.raises(JobError, match="cannot be read: No such file"):
        load(DemoJob, str(tmp_path / "nothing.toml"), [])
    with pytest.raises(JobError, match=r"not TOML: .*line 1"):
        make(DemoJob, text="images: 5")


@pytest.fixture
def submitted(make, monkeypatch):
    """A job as its driver sees it that `ray job submit` has started."""
    monkeypatch.setenv(SUBMITTED, "{}")
    return make


SERVER = "tracking.uri=http://mlflow:5000"


def test_a_submitted_job_may_not_write_where_it_is_lost(submitted):
    message = wrong(submitted, PreprocessJob, "latents=/data/latents", SERVER)
    assert message.startswith("index: a submitted job runs in a temporary copy")
    message = wrong(submitted, TrainBaseJob)
    assert message.startswith("output, tracking.uri: ")


def test_a_submitted_job_may_write_to_absolute_paths_and_s3(submitted):
    assert submitted(TrainBaseJob, "output=/data/base", SERVER)
    assert submitted(TrainBaseJob, "output=s3://bucket/base", "tracking.uri=sqlite:////data/mlflow.db")
    assert submitted(PreprocessJob, "index=s3://b/i", "latents=/data/l", SERVER)


def test_a_submitted_jobs_default_output_is_lost_as_well(submitted):
    assert "output" in wrong(submitted, DemoJob, SERVER)
    assert submitted(DemoJob, "output=/data/demo", SERVER)


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "./mlruns"])
def test_a_submitted_jobs_tracking_may_not_be_a_relative_file(submitted, uri):
    assert "tracking.uri" in wrong(submitted, TrainBaseJob, "output=/data/base", f"tracking.uri={uri}")


@pytest.mark.parametrize("overrides", [["tracking=3", "output=/o"], ["output=3", SERVER]])
def test_a_submitted_job_with_values_of_the_wrong_kind_is_an_error_in_words(submitted, overrides):
    assert overrides[0].partition("=")[0] in wrong(submitted, TrainBaseJob, *overrides)


def test_the_environment_of_a_job_that_was_not_submitted_does_not_matter(make, monkeypatch):
    monkeypatch.delenv(SUBMITTED, raising=False)
    assert make(TrainBaseJob)


def test_the_resolved_settings_load_to_the_same_job(make):
    for kind in JOBS:
        job = make(kind)
        assert kind.model_validate(job.model_dump(mode="json")) == job


def test_stages_are_refused_where_they_cannot_work(make):
    for settings in (["workers.zero_stage=3"], ["workers.zero_stage=0"], ["workers.zero_stage=2", OFFLOADED]):
        make(TrainBaseJob, *settings)
    message = wrong(make, TrainBaseJob, "workers.zero_stage=1", OFFLOADED)
    assert "workers.offload_optimizer: stage 1 does not offload; take 2 or 3" in message
    message = wrong(make, TrainBaseJob, "workers.zero_stage=0", "workers.dtype=bfloat16")
    assert "workers.zero_stage: stage 0 adds up 2 passes in bfloat16" in message
    make(TrainBaseJob, "workers.zero_stage=0", "workers.dtype=bfloat16", "batch.micro_size=8")
    make(TrainVAEJob, "workers.zero_stage=3")
    make(TrainBaseJob, "workers.zero_stage=2", "workers.compile=true", "optimizer.implementation=8bit")
    message = wrong(make, TrainBaseJob, "workers.zero_stage=3", "optimizer.implementation=8bit")
    assert 'optimizer.implementation: "8bit" works under stages 0 to 2' in message
    message = wrong(make, TrainBaseJob, "workers.zero_stage=3", "workers.compile=true")
    assert "workers.compile: blocks are compiled whole, and stage 3 gathers weights within them" in message


OFFLOADED = "workers.offload_optimizer=true"


def test_validation_needs_rows_that_are_held_out(make):
    message = wrong(make, TrainBaseJob, "schedule.validation_images=16")
    assert "schedule.validation_images" in message
    assert "batch.validation_share is 0" in message
    job = make(TrainBaseJob, "schedule.validation_images=16", "batch.validation_share=0.1")
    assert job.batch.validation_share == 0.1


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (['evaluate.network="vae"'], "evaluate.reconstruct"),
        (['evaluate.network="refiner"'], "evaluate.generate.refiner"),
        (['evaluate.generate.prompts={texts=["a cat"]}'], "evaluate.generate.prompts.index"),
        (['evaluate.generate.base.preset="tiny-refiner"'], "evaluate.generate.base.preset"),
        (["evaluate.resources.workers=[2, 1]"], "evaluate.resources.workers"),
        (['evaluate.lpips={trunk="vgg.pth", heads="heads.safetensors"}'], "evaluate.lpips.trunk"),
        (['output="out/base"'], "output"),
        (["evaluate.watch=true", 'evaluate.generate.base.path="base.safetensors"'], "evaluate.watch"),
        (['evaluate.reconstruct={index="index", vae={preset="tiny", path="vae"}}'], "evaluate.generate"),
    ],
)
def test_an_evaluation_that_cannot_be_made_names_what_it_lacks(make, overrides, key):
    assert key in wrong(make, EvaluateJob, *overrides)


def test_an_evaluation_measures_something(make):
    text = LINE.join(line for line in toml(EvaluateJob).splitlines() if "inception" not in line)
    with pytest.raises(JobError, match="name the weights of inception, of clip, or of both"):
        make(EvaluateJob, text=text)


def test_a_vae_is_measured_at_sizes_that_it_takes(make):
    text = """
        output = "out/evaluation"
        evaluate.network = "vae"
        evaluate.source.path = "images"
        evaluate.reconstruct = {index = "out/index", vae = {preset = "tiny", path = "out/vae"}, size = [32, 34]}
    """
    with pytest.raises(JobError, match=r"evaluate\.reconstruct\.size: \(32, 34\)"):
        make(EvaluateJob, text=text)
    job = make(EvaluateJob, text=text.replace("34", "36"))
    assert job.evaluate.reconstruct.vae.path.endswith("/out/vae")
    assert job.evaluate.reconstruct.vae.path.startswith("/")
