"""Pictures without Ray: the actor's work on tiny networks with random weights."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import DiffusionConfig, SamplerName, Spacing
from model.vae import VAE
from model.weights import Kind, save_weights
from pipelines import networks
from pipelines.config import SamplingConfig, TextWeightsConfig, WeightsConfig
from pipelines.evaluate.config import GenerateConfig, PromptsConfig
from pipelines.evaluate.generate import Generator, _fingerprint, checked_prompts
from pipelines.evaluate.prompts import batches, read_prompts
from pipelines.storage import Storage, StorageOptions

OPTIONS = StorageOptions()
TEXTS = ("a red fox", "a green bird", "two trees", "rain", "a boat")
MADE_BY = {"dtype": "float32"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of networks whose every weight counts: what starts at zero is filled."""
    folder = tmp_path_factory.mktemp("weights")
    paths = {}
    for name, preset in (("base", "tiny-base"), ("refiner", "tiny-refiner"), ("vae", "tiny")):
        config = WeightsConfig(preset=preset)
        network = networks.vae(config, OPTIONS) if name == "vae" else networks.unet(config, OPTIONS)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05, generator=generator)
        kind = Kind.VAE if name == "vae" else Kind.UNET
        save_weights(folder / f"{name}.safetensors", network.state_dict(), kind, network.config)
        paths[name] = WeightsConfig(preset=preset, path=str(folder / f"{name}.safetensors"))
    return paths


@pytest.fixture
def configured(weights):
    def build(prompts=None, refiner=False, **sampling):
        return GenerateConfig(
            base=weights["base"],
            refiner=weights["refiner"] if refiner else None,
            vae=weights["vae"],
            text=TextWeightsConfig(preset="tiny", seed=0),
            prompts=PromptsConfig(**({"texts": TEXTS, "size": (32, 32)} | (prompts or {}))),
            diffusion=DiffusionConfig(),
            sampling=SamplingConfig(**({"steps": 4} | sampling)),
        )

    return build


def pictures(config, texts=None, tmp="unused"):
    """The pictures of the config's prompts, or of some of them, in their order."""
    found = read_prompts(config.prompts, OPTIONS)
    chosen = found if texts is None else [p for text in texts for p in found if p.text == text]
    return np.stack(Generator(config, MADE_BY, Storage(tmp)).pictures(chosen))


def apart(one, other):
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"sampler": SamplerName.EULER_ANCESTRAL},
        {"sampler": SamplerName.DDIM, "eta": 0.5},
        {"refiner": True},
        {"refiner": True, "refiner_scale": 3.0},
    ],
    ids=["euler", "ancestral", "ddim", "refined", "refined-guided"],
)
def test_a_picture_depends_on_its_prompt_and_not_on_its_neighbours_or_place(configured, sampling):
    config = configured(**sampling)
    together = pictures(config)
    shuffled = pictures(config, TEXTS[::-1])[::-1]
    alone = np.concatenate([pictures(config, [text]) for text in TEXTS])
    assert together.std() > 10  # a picture and not one grey
    assert apart(together, shuffled) <= 1  # passes of another size round differently in the last digit
    assert apart(together, alone) <= 1
    assert apart(together[0], together[1]) > 10


def test_a_seed_is_another_picture_and_the_same_seed_the_same(configured):
    first, again, other = (pictures(configured({"seed": seed}), ["rain"]) for seed in (3, 3, 4))
    assert np.array_equal(first, again)
    assert apart(first, other) > 10


@pytest.mark.parametrize(
    "prompts",
    [
        {"negative": "blurry"},
        {"original_size": (512, 16)},
        {"crop_top_left": (256, 0)},
        {"negative_original_size": (16, 16)},
    ],
    ids=str,
)
def test_what_the_networks_are_told_reaches_the_picture(configured, prompts):
    assert apart(pictures(configured(), ["rain"]), pictures(configured(prompts), ["rain"])) > 0


def test_no_negative_prompt_is_zeros_and_not_the_empty_prompt(configured):
    absent, empty = pictures(configured(), ["rain"]), pictures(configured({"negative": ""}), ["rain"])
    assert apart(absent, empty) > 0


def test_files_carry_what_made_them(configured, tmp_path):
    config = configured({"texts": ("a café", "rain"), "negative": "blé", "seed": 7, "size": (32, 64)})
    found = read_prompts(config.prompts, OPTIONS)
    names = [prompt.picture_name(MADE_BY) for prompt in found]
    (table,) = batches(found, names, 8)
    generator = Generator(config, MADE_BY, Storage(str(tmp_path)))
    assert generator(table).column("name").to_pylist() == names
    for prompt, name in zip(found, names, strict=True):
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            assert image.size == (64, 32)
            assert image.text["prompt"] == prompt.text
            assert (image.text["negative_prompt"], image.text["seed"]) == ("blé", "7")
            settings = json.loads(image.text["settings"])
        assert (settings["size"], settings["dtype"]) == ([32, 64], "float32")


def test_pictures_that_start_elsewhere_than_an_earlier_versions_have_other_names(configured):
    changed = [
        (sampler, spacing)
        for sampler in SamplerName
        for spacing in Spacing
        if "start" in _fingerprint(configured(sampler=sampler, spacing=spacing), OPTIONS)
    ]
    eulers = (SamplerName.EULER, SamplerName.EULER_ANCESTRAL)
    assert changed == [(sampler, spacing) for sampler in eulers for spacing in (Spacing.TRAILING, Spacing.KARRAS)]


def test_pictures_larger_than_a_tile_are_decoded_in_tiles(configured, monkeypatch):
    config = configured({"size": (32, 96)})
    decoded = []
    plain = VAE.decode
    monkeypatch.setattr(VAE, "decode", lambda self, x: decoded.append(tuple(x.shape[2:])) or plain(self, x))
    whole = pictures(config, ["rain"])
    assert decoded == [(8, 24)]
    assert np.array_equal(pictures(replace(config, decode_tile=96), ["rain"]), whole)
    decoded.clear()
    tiled = pictures(replace(config, decode_tile=32), ["rain"])
    assert len(decoded) == 1 + 4  # a small copy for the norms, then tiles that overlap by a quarter
    assert set(decoded[1:]) == {(8, 8)}
    assert tiled.shape == whole.shape
    assert np.abs(tiled.astype(float) - whole).mean() < 0.25 * np.abs(whole - whole.mean()).mean()


def test_sizes_that_the_networks_cannot_make_are_counted(configured):
    with pytest.raises(ValueError, match=r"multiples of 8.*36 x 32 \(5 prompts\)"):
        checked_prompts(configured({"size": (36, 32)}), OPTIONS)
