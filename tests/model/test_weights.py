import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from model.config import DISCRIMINATOR_PRESETS, TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS
from model.layouts import (
    diffusers_config,
    from_diffusers,
    load_diffusers,
    save_diffusers,
    save_single_file,
    to_diffusers,
)
from model.unet import UNet
from model.vae import VAE
from model.weights import Kind, fingerprint, load_unet, load_vae, read_config, read_extra, save_weights, shapes

UNET_CONFIG, VAE_CONFIG = UNET_PRESETS["tiny-refiner"], VAE_PRESETS["tiny"]


@pytest.fixture(scope="module")
def unet():
    return UNet(UNET_CONFIG)


@pytest.fixture(scope="module")
def vae():
    return VAE(VAE_CONFIG)


def equal(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_own_file_gives_back_the_network_to_the_bit(unet, vae, tmp_path, dtype):
    for module, kind, load in ((unet, Kind.UNET, load_unet), (vae, Kind.VAE, load_vae)):
        path = tmp_path / f"{kind}.safetensors"
        state = {key: value.to(dtype) for key, value in module.state_dict().items()}
        save_weights(path, state, kind, module.config, {"images_seen": 7})
        loaded = load(path)
        assert loaded.config == module.config
        assert equal(loaded.state_dict(), state)
        assert all(weight.requires_grad for weight in loaded.parameters())
        assert fingerprint(loaded) == fingerprint(state) == fingerprint(path)
        assert read_extra(path) == {"images_seen": 7}
        assert next(load(path, dtype=torch.float16).parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    ("kind", "presets"),
    [
        (Kind.UNET, UNET_PRESETS),
        (Kind.VAE, VAE_PRESETS),
        (Kind.TEXT, TEXT_PRESETS),
        (Kind.DISCRIMINATOR, DISCRIMINATOR_PRESETS),
    ],
)
def test_every_config_survives_its_file(kind, presets, tmp_path):
    for config in presets.values():
        save_weights(tmp_path / "file.safetensors", {"weight": torch.zeros(1)}, kind, config)
        assert read_config(tmp_path / "file.safetensors") == (kind, config)


def test_a_published_file_loads_each_network_and_ignores_averages(unet, vae, tmp_path):
    path = tmp_path / "sdxl.safetensors"
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in vae.state_dict().items()}
    tensors["first_stage_model.model_ema.decay"] = torch.zeros(1)
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.zeros(1)
    save_file(tensors, path)
    assert equal(load_unet(path, UNET_CONFIG).state_dict(), unet.state_dict())
    assert equal(load_vae(path, VAE_CONFIG).state_dict(), vae.state_dict())
    with pytest.raises(ValueError, match="carries no config"):
        load_unet(path)
    with pytest.raises(ValueError, match="carries no config"):
        read_config(path)


def test_our_single_file_is_the_published_layout(unet, vae, tmp_path):
    path = tmp_path / "sdxl.safetensors"
    save_single_file(path, {Kind.UNET: unet.state_dict(), Kind.VAE: vae.state_dict()})
    assert fingerprint(load_unet(path, UNET_CONFIG)) == fingerprint(unet)
    assert fingerprint(load_vae(path, VAE_CONFIG)) == fingerprint(vae)


def test_keys_that_do_not_fit_are_listed(unet, vae, tmp_path):
    path = tmp_path / "file.safetensors"
    state = unet.state_dict()
    state["surplus"] = state.pop("out.2.bias")
    state["out.0.bias"] = state["out.0.bias"][1:]
    save_weights(path, state, Kind.UNET, UNET_CONFIG)
    with pytest.raises(
        ValueError, match=r"missing: \['out.2.bias'\]\nunexpected: \['surplus'\]\nshapes: \['out.0.bias"
    ):
        load_unet(path)
    with pytest.raises(ValueError, match="holds a unet, not a vae"):
        load_vae(path)
    with pytest.raises(ValueError, match="not UNetConfig"):
        load_unet(path, UNET_PRESETS["tiny-base"])
    with pytest.raises(ValueError, match=r"out.2.bias"):
        to_diffusers(state, UNET_CONFIG)


def test_a_file_is_written_whole_or_not_at_all(unet, tmp_path):
    path = tmp_path / "file.safetensors"
    save_weights(path, unet.state_dict(), Kind.UNET, UNET_CONFIG)
    before = path.read_bytes()
    shared = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save_weights(path, {"a": shared, "b": shared}, Kind.UNET, UNET_CONFIG)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_fingerprint_tells_key_dtype_shape_and_every_bit():
    state = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    same = fingerprint(dict(reversed(state.items())))
    assert fingerprint(state) == same
    assert len(same) == 64
    others = [
        {"a": state["a"], "c": state["b"]},
        state | {"a": torch.zeros(3, 2)},
        state | {"a": torch.zeros(2, 3, dtype=torch.int32)},
        state | {"a": -state["a"]},  # minus zero
    ]
    assert len({same, *map(fingerprint, others)}) == 5
    strided = {"a": torch.zeros(3, 2).T, "b": state["b"]}
    assert fingerprint(strided) == same


@pytest.mark.parametrize("config", [*UNET_PRESETS.values(), *VAE_PRESETS.values()])
def test_the_diffusers_layout_has_diffusers_keys_and_shapes(config):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    is_vae = config in VAE_PRESETS.values()
    with torch.device("meta"):
        own = (VAE if is_vae else UNet)(config)
        theirs = (AutoencoderKL if is_vae else UNet2DConditionModel).from_config(diffusers_config(config))
    assert shapes(to_diffusers(own.state_dict(), config)) == shapes(theirs.state_dict())


def test_the_diffusers_layout_is_exact_both_ways(unet, vae):
    for module in (unet, vae):
        there = to_diffusers(module.state_dict(), module.config)
        assert equal(from_diffusers(there, module.config), module.state_dict())


def test_diffusers_reads_our_folder_and_we_read_its(unet, vae, tmp_path):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for module, theirs in ((unet, UNet2DConditionModel), (vae, AutoencoderKL)):
        save_diffusers(tmp_path / "ours", module.state_dict(), module.config)
        read = theirs.from_pretrained(tmp_path / "ours")
        assert equal(read.state_dict(), to_diffusers(module.state_dict(), module.config))
        read.save_pretrained(tmp_path / "theirs")
        again = load_diffusers(tmp_path / "theirs", module.config)
        assert fingerprint(again) == fingerprint(module)
        assert all(weight.requires_grad for weight in again.parameters())
    with pytest.raises(ValueError, match="scaling_factor"):
        load_diffusers(tmp_path / "theirs", dataclasses.replace(VAE_CONFIG, scaling_factor=0.13025))


def test_a_depth_that_diffusers_cannot_say_is_refused():
    with pytest.raises(ValueError, match="middle block"):
        diffusers_config(dataclasses.replace(UNET_PRESETS["tiny-base"], middle_depth=2))
