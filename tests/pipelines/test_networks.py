import sys
from pathlib import Path

import pytest
import torch

from model.weights import fingerprint as weights_fingerprint
from pipelines import networks
from pipelines.config import GuidanceConfig, TextWeightsConfig, WeightsConfig, flat
from pipelines.progress import progress
from pipelines.sampling import generate, refine
from pipelines.storage import StorageOptions

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


@pytest.mark.parametrize("path", ["folder", "folder/", "folder/weights.safetensors", "other.safetensors"])
def test_weights_that_are_missing_are_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / path)):
        unet(path=f"{tmp_path}/{path}")


def test_a_file_and_a_runs_folder_name_the_same_weights(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / networks.WEIGHTS_FILE).write_bytes(b"weights")
    for path in ("run", "run/", f"run/{networks.WEIGHTS_FILE}"):
        with networks.local_file(f"{tmp_path}/{path}", OPTIONS) as file:
            assert Path(file).read_bytes() == b"weights"


def test_text_encoders_are_named_or_seeded_and_never_silently_random():
    with pytest.raises(ValueError, match="name both clip_l and bigg, or give a seed"):
        networks.text_encoders(TextWeightsConfig(preset="tiny"))


def constant(value: float):
    return lambda x, sigma, timestep: torch.full_like(x, value)


@pytest.fixture
def diffusion():
    from model.config import DiffusionConfig
    from model.diffusion import Diffusion

    return Diffusion(DiffusionConfig())


NOISE = torch.ones(1, 4, 2, 2)


def test_the_refiner_has_the_last_word_where_it_takes_part(diffusion):
    config = GuidanceConfig(steps=10, handover=200)
    assert generate(constant(1), None, NOISE, diffusion, config).unique().tolist() == pytest.approx([1])
    assert generate(constant(1), constant(2), NOISE, diffusion, config).unique().tolist() == pytest.approx([2])
    alone = GuidanceConfig(steps=10, handover=0)
    assert generate(constant(1), constant(2), NOISE, diffusion, alone).unique().tolist() == pytest.approx([1])


def test_refining_ends_at_what_the_refiner_sees(diffusion):
    config = GuidanceConfig(steps=10, handover=200)
    assert refine(constant(2), NOISE, NOISE, diffusion, config).unique().tolist() == pytest.approx([2])


@pytest.mark.parametrize(("steps", "handover"), [(1, 200), (10, 50), (10, 1), (50, 200), (3, 999)])
def test_refining_starts_below_the_hand_over_however_few_the_steps(diffusion, steps, handover):
    seen = []

    def record(x, sigma, timestep):
        seen.append(timestep)
        return x

    refine(record, NOISE, NOISE, diffusion, GuidanceConfig(steps=steps, handover=handover))
    assert seen == sorted(seen, reverse=True)
    assert seen[0] < handover
    assert seen[0] >= handover // 2


def test_settings_are_named_by_their_dotted_path():
    assert flat({"a": 1, "b": {"c": {"d": None}, "e": [2]}, "f": {}}) == {"a": 1, "b.c.d": None, "b.e": [2]}


def test_progress_in_a_log_is_whole_lines_and_counts_to_the_end(capsys):
    assert not sys.stderr.isatty()
    with progress("render", 3) as bar:
        for _ in range(3):
            bar.update(1)
    printed = capsys.readouterr().err
    lines = printed.strip().split("\n")
    assert "render: 100%" in lines[-1]
    assert "3/3" in lines[-1]
    assert "\r" not in printed
    assert all(line.startswith("render:") for line in lines)
