"""What preprocessing may be told."""

import re

import pytest

from jobs.cli import JobError
from jobs.config import PreprocessJob
from jobs.training_config import TrainVAEJob
from tests.jobs.settings import LINE, toml, wrong

SEVERAL = 'sources=[{name="one", path="images"}, {name="two", path="/more", columns.scores.mark="m"}]'


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


def test_latents_need_a_folder_and_a_trained_vae_and_the_index_needs_neither(make):
    text = LINE.join(line for line in toml(PreprocessJob).splitlines() if not line.startswith("latents"))
    with pytest.raises(JobError, match="latents: the latents stage needs a folder"):
        make(PreprocessJob, text=text)
    text = LINE.join(line for line in text.splitlines() if not line.startswith(("vae.path", "text.seed")))
    assert make(PreprocessJob, 'stages=["index"]', text=text).stages == ("index",)
    with pytest.raises(JobError, match=r"vae.path: the latents stage needs"):
        make(PreprocessJob, "latents=/l", "text.seed=0", text=text)


@pytest.mark.parametrize("root", ["", "s3://bucket/"])
def test_outputs_have_folders_of_their_own_outside_the_sources(make, root):
    place = lambda **paths: [f"{name}={root}{path}" for name, path in paths.items()]  # noqa: E731
    inside = wrong(make, PreprocessJob, *place(latents="images/made/latents"), f"source.path={root}images")
    assert re.search("latents: .*images/made/latents lies in the source .*images, which would be found", inside)
    assert "index: " in wrong(make, PreprocessJob, *place(index="images/"), f"source.path={root}images")
    alike = wrong(make, PreprocessJob, *place(index="made", latents="made/"))
    assert re.search("made/? is (latents|index) as well", alike)
    beside = [*place(index="images-index", latents="images.latents"), f"source.path={root}images"]
    assert make(PreprocessJob, *beside).index.endswith("images-index")
    assert make(PreprocessJob, *place(index="images/index"), f"source.path={root}images/0.tar")


def test_the_longest_caption_is_no_shorter_than_the_shortest(make):
    limits = ["filters.min_caption_characters=10", "filters.max_caption_characters=9"]
    assert "filters.max_caption_characters: 9 is below" in wrong(make, PreprocessJob, *limits)
