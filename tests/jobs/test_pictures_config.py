"""What the jobs may be told that make pictures and measure them."""

import pytest

from jobs.cli import JobError
from jobs.config import EvaluateJob, GenerateJob, PreprocessJob
from model.config import SamplerName
from tests.jobs.settings import LINE, toml, wrong


def test_pictures_are_begun_by_a_base_and_refined_by_a_refiner(make):
    message = wrong(make, GenerateJob, "generate.base.preset=tiny-refiner")
    assert "generate.base.preset" in message
    message = wrong(make, GenerateJob, "generate.refiner.preset=tiny-base")
    assert "generate.refiner.preset" in message


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


def test_a_refiner_by_sdedit_needs_a_step_and_no_hand_over(make):
    sdedit = ("generate.sampling.refiner='sdedit'", "generate.sampling.handover=0", "generate.sampling.steps=20")
    sampling = make(GenerateJob, *sdedit, "generate.sampling.sampler='dpmpp_2m'").generate.sampling
    assert (sampling.refiner, sampling.sampler, sampling.eta) == ("sdedit", SamplerName.DPMPP_2M, None)
    message = wrong(make, GenerateJob, *sdedit, "generate.sampling.strength=0.04")
    assert "generate.sampling.strength: 0.04 of 20 steps leaves none" in message


@pytest.mark.parametrize("name", ["base", "refiner", "vae"])
def test_pictures_need_trained_weights(make, name):
    text = LINE.join(line for line in toml(GenerateJob).splitlines() if not line.startswith(f"generate.{name}.path"))
    with pytest.raises(JobError, match=f"generate.{name}.path: is missing"):
        make(GenerateJob, text=text)


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
