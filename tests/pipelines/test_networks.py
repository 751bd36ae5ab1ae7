from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import DiffusionConfig, PredictionType
from model.publish import Model, write_pipeline, write_single_file
from model.tensors import stored
from model.text import text_states
from model.weights import fingerprint as weights_fingerprint
from model.weights import save_weights
from pipelines import networks
from pipelines import sources as sources_module
from pipelines.config import SamplingConfig, TextWeightsConfig, WeightsConfig, flat
from pipelines.sampling import generate, refine
from pipelines.schema import digest
from pipelines.sources import WEIGHTS_FILE, local_weights
from pipelines.storage import Storage, StorageOptions

OPTIONS = StorageOptions()


def unet(seed: int = 0, **settings):
    return networks.unet(WeightsConfig(preset="tiny-refiner", seed=seed, **settings), OPTIONS)


def test_random_weights_follow_from_their_seed_and_leave_other_draws_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (weights_fingerprint(unet(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert first == again != other


def test_what_latents_depend_on_is_the_content_of_the_weights():
    def found(vae: int, text: int) -> dict[str, str]:
        return networks.fingerprint(
            WeightsConfig(preset="tiny", seed=vae), TextWeightsConfig(preset="tiny", seed=text), OPTIONS
        )

    one, vae, text = found(0, 0), found(1, 0), found(0, 1)
    assert found(0, 0) == one
    assert (one["vae"] == text["vae"], one["text"] == vae["text"]) == (True, True)
    assert one["vae"] != vae["vae"]
    assert one["text"] != text["text"]


@pytest.mark.parametrize("path", ["folder", "folder/", "folder/weights.safetensors", "other.safetensors", "a.ckpt"])
def test_weights_that_are_missing_are_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / path)):
        unet(path=f"{tmp_path}/{path}")


def test_a_file_and_a_runs_folder_name_the_same_weights(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / WEIGHTS_FILE).write_bytes(b"weights")
    for path in ("run", "run/", f"run/{WEIGHTS_FILE}"):
        with local_weights(f"{tmp_path}/{path}", "unet", OPTIONS) as file:
            assert Path(file).read_bytes() == b"weights"


V = DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True)
SOURCES = ("run", "run/weights.safetensors", "single.safetensors", "pipeline", "pipeline/{part}", "single.ckpt")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same networks as a run's output, a single file, a pipeline's folder and a pickle, and the networks."""
    folder = tmp_path_factory.mktemp("sources")
    text = networks.text_encoders(TextWeightsConfig(preset="tiny", seed=0))
    modules = {
        "unet": networks.unet(WeightsConfig(preset="tiny-base"), OPTIONS),
        "vae": networks.vae(WeightsConfig(preset="tiny"), OPTIONS),
    }
    for part, module in modules.items():
        (folder / part).mkdir()
        extra = {"unet": asdict(V), "vae": {"scaling_images": 8}}[part]
        save_weights(folder / part / WEIGHTS_FILE, module.state_dict(), part, module.config, extra)
    states = {part: stored(module.state_dict()) for part, module in modules.items()} | text_states(text)
    model = Model(unet=modules["unet"].config, vae=modules["vae"].config, text=text.config, diffusion=V, states=states)
    write_single_file(folder / "single.safetensors", model)
    write_pipeline(folder / "pipeline", model, 32)
    torch.save({"state_dict": load_file(folder / "single.safetensors")}, folder / "single.ckpt")
    return folder, modules | {"text": text}


def weights_at(folder, source: str, part: str) -> WeightsConfig:
    name = source.replace("run", part, 1).format(part=part)
    return WeightsConfig(
        preset={"unet": "tiny-base", "vae": "tiny"}[part], path=f"{folder}/{name}", allow_pickle=name.endswith(".ckpt")
    )


def text_at(folder, source: str) -> TextWeightsConfig:
    paths = [f"{folder}/{source}".format(part=part) for part in ("text_encoder", "text_encoder_2")]
    return TextWeightsConfig(preset="tiny", clip_l=paths[0], bigg=paths[1], allow_pickle=source.endswith(".ckpt"))


@pytest.mark.parametrize("source", SOURCES)
def test_the_same_weights_have_one_fingerprint_wherever_they_lie(sources, source):
    folder, modules = sources
    config = weights_at(folder, source, "unet")
    assert networks.unet_fingerprint(config, OPTIONS) == weights_fingerprint(modules["unet"])
    assert weights_fingerprint(networks.unet(config, OPTIONS)) == weights_fingerprint(modules["unet"])
    text = TextWeightsConfig(preset="tiny", seed=0) if source.startswith("run") else text_at(folder, source)
    made_by = networks.fingerprint(weights_at(folder, source, "vae"), text, OPTIONS)
    shape = asdict(modules["vae"].config)
    del shape["scaling_factor"]
    assert made_by == {
        "vae": digest([shape, weights_fingerprint(modules["vae"])]),
        "text": digest([asdict(modules["text"].config), weights_fingerprint(modules["text"])]),
    }


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_says_what_schedule_it_was_trained_with(sources, source):
    folder, _ = sources
    found = networks.trained_diffusion(weights_at(folder, source, "unet"), OPTIONS)
    assert found == (DiffusionConfig() if source.endswith(".ckpt") else V)  # a pickle has no place for it


@pytest.mark.parametrize("source", SOURCES)
def test_weights_are_known_to_fit_without_being_read(sources, source):
    folder, _ = sources
    for part, other in (("unet", "tiny-refiner"), ("vae", "sdxl")):
        config = weights_at(folder, source, part)
        networks.require_weights(config, part, OPTIONS)
        with pytest.raises(ValueError, match=r"does not fit|another network|found, expected"):
            networks.require_weights(replace(config, preset=other), part, OPTIONS)
        with pytest.raises(FileNotFoundError, match=r"no weights at .*/gone\.safetensors"):
            networks.require_weights(replace(config, path=f"{folder}/gone.safetensors"), part, OPTIONS)


def test_half_precision_weights_are_the_same_as_the_ones_they_load_to(sources, tmp_path):
    _, modules = sources
    half = {key: value.half() for key, value in modules["unet"].state_dict().items()}
    save_file(half, tmp_path / "unet.safetensors")
    config = WeightsConfig(preset="tiny-base", path=f"{tmp_path}/unet.safetensors")
    assert networks.unet_fingerprint(config, OPTIONS) == weights_fingerprint(networks.unet(config, OPTIONS))
    assert next(networks.unet(config, OPTIONS, torch.float16).parameters()).dtype == torch.float16


def test_a_pickle_is_not_read_unless_it_is_allowed(sources):
    folder, _ = sources
    for part, load in (("unet", networks.unet), ("vae", networks.vae)):
        config = replace(weights_at(folder, "single.ckpt", part), allow_pickle=False)
        with pytest.raises(ValueError, match="allow_pickle"):
            load(config, OPTIONS)
    with pytest.raises(ValueError, match="allow_pickle"):
        networks.text_encoders(replace(text_at(folder, "single.ckpt"), allow_pickle=False))


@pytest.mark.parametrize("source", ["run", "single.safetensors", "pipeline", "pipeline/{part}"])
def test_from_s3_only_what_is_needed_is_copied(sources, s3, source, monkeypatch):
    folder, modules = sources
    options = StorageOptions(s3_endpoint=s3.endpoint)
    bucket = Storage(f"s3://{s3.bucket}/{folder.name}", options)
    if not bucket.exists("single.safetensors"):
        for path in folder.rglob("*"):
            if path.is_file() and path.suffix != ".ckpt":
                bucket.upload(path.relative_to(folder).as_posix(), path)
    copied = []
    download = sources_module._download
    monkeypatch.setattr(sources_module, "_download", lambda *args: copied.append(args[1]) or download(*args))
    config = weights_at(bucket.uri, source, "unet")
    assert networks.trained_diffusion(config, options) == V
    assert copied == []  # the beginning of a file, or a small one beside it, says it
    assert networks.unet_fingerprint(config, options) == weights_fingerprint(modules["unet"])
    assert len(copied) == (2 if source.startswith("pipeline") else 1)
    if source != "run":
        encoders = networks.text_encoders(text_at(bucket.uri, source), options)
        assert weights_fingerprint(encoders) == weights_fingerprint(modules["text"])


def test_text_encoders_are_named_or_seeded_and_never_silently_random():
    with pytest.raises(ValueError, match="name both clip_l and bigg, or give a seed"):
        networks.text_encoders(TextWeightsConfig(preset="tiny"))


def constant(value: float):
    return lambda x, sigma, timestep: torch.full_like(x, value)


@pytest.fixture
def diffusion():
    from model.diffusion import Diffusion

    return Diffusion(DiffusionConfig())


NOISE = torch.ones(1, 4, 2, 2)


def test_the_refiner_has_the_last_word_where_it_takes_part(diffusion):
    config = SamplingConfig(steps=10, handover=200)
    assert generate(constant(1), None, NOISE, diffusion, config).unique().tolist() == pytest.approx([1])
    assert generate(constant(1), constant(2), NOISE, diffusion, config).unique().tolist() == pytest.approx([2])
    alone = SamplingConfig(steps=10, handover=0)
    assert generate(constant(1), constant(2), NOISE, diffusion, alone).unique().tolist() == pytest.approx([1])


def test_refining_ends_at_what_the_refiner_sees(diffusion):
    config = SamplingConfig(steps=10, handover=200)
    assert refine(constant(2), NOISE, NOISE, diffusion, config).unique().tolist() == pytest.approx([2])


@pytest.mark.parametrize(("steps", "handover"), [(1, 200), (10, 50), (10, 1), (50, 200), (3, 999)])
def test_refining_starts_below_the_hand_over_however_few_the_steps(diffusion, steps, handover):
    seen = []

    def record(x, sigma, timestep):
        seen.append(timestep)
        return x

    refine(record, NOISE, NOISE, diffusion, SamplingConfig(steps=steps, handover=handover))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] < handover
    assert seen[0] >= handover // 2


def test_settings_are_named_by_their_dotted_path():
    assert flat({"a": 1, "b": {"c": {"d": None}, "e": [2]}, "f": {}, "g": [{"h": 3}]}) == {
        "a": 1,
        "b.c.d": None,
        "b.e": [2],
        "g.0.h": 3,
    }
