"""Weights on disk: exact, whole or absent, one tensor at a time, and never a pickle by accident."""

import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import (
    DISCRIMINATOR_PRESETS,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    TextConfig,
    TextTowerConfig,
    VAEConfig,
)
from model.layouts import diffusers_config, to_diffusers
from model.publish import write_json
from model.tensors import read_file, read_folder, stored, weight_files, write_file
from model.text import TextEncoders, load_text_encoders, text_states
from model.text_weights import to_transformers, transformers_config
from model.unet import UNet
from model.vae import VAE
from model.weights import Kind, fingerprint, load_unet, load_vae, read_config, read_extra, save_weights

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
        assert {weight.device.type for weight in load(path, device="meta").parameters()} == {"meta"}


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


def test_a_file_without_the_network_lacks_all_of_its_keys_and_has_no_surplus(unet, tmp_path):
    path = tmp_path / "unet.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}, path)
    with pytest.raises(
        ValueError, match=r"nothing of this network.\nmissing: \['decoder\.conv_in\.bias', [^\n]*\nunexpected: \[\]"
    ):
        load_vae(path, VAE_CONFIG)
    with pytest.raises(ValueError, match=r"bigG of .* nothing of this network"):
        load_text_encoders(TEXT_PRESETS["tiny"], str(path), str(path))


@pytest.mark.parametrize(
    "key", ["lora_unet_down_blocks_1.lora_down.weight", "unet.down_blocks.1.proj_in.lora_A.weight"]
)
def test_a_lora_is_told_from_a_model(tmp_path, key):
    path = tmp_path / "style.safetensors"
    save_file({key: torch.zeros(4, 8)}, path)
    for load in (
        lambda: load_unet(path, UNET_CONFIG),
        lambda: load_vae(path, VAE_CONFIG),
        lambda: load_text_encoders(TEXT_PRESETS["tiny"], str(path), str(path)),
    ):
        with pytest.raises(
            ValueError, match=r"does not fit: \d+ keys are missing, 1 unexpected.* It is a LoRA.* merge it"
        ):
            load()


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
    with pytest.raises(ValueError, match=r"another network \(found, expected\): .*'transformer_depth'"):
        load_unet(path, UNET_PRESETS["tiny-base"])
    with pytest.raises(ValueError, match=r"out.2.bias"):
        to_diffusers(state, UNET_CONFIG)


def test_a_path_that_is_not_there_is_no_pickle():
    for name in ("nowhere", "nowhere.ckpt", "nowhere.safetensors"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_unet(f"/{name}", UNET_CONFIG)


def test_types_that_no_network_runs_in_are_named(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    state, key = vae.state_dict(), "decoder.conv_in.weight"

    def with_type(dtype):
        save_weights(path, state | {key: state[key].to(dtype)}, Kind.VAE, VAE_CONFIG)

    with_type(torch.int64)
    with pytest.raises(ValueError, match=rf"no floating-point numbers: .*{key}.*int64"):
        load_vae(path, dtype=torch.float32)
    for dtype in (torch.float16, torch.float8_e4m3fn):
        with_type(dtype)
        with pytest.raises(ValueError, match=rf"{dtype}'.*name one type"):
            load_vae(path)
        assert torch.equal(load_vae(path, dtype=torch.float32).decoder.conv_in.weight, state[key].to(dtype).float())


def test_a_file_in_diffusers_names_asks_for_its_folder(vae, tmp_path):
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    write_file(path, to_diffusers(stored(vae.state_dict()), VAE_CONFIG))
    with pytest.raises(ValueError, match=r"name its folder, whose config\.json"):
        load_vae(path, VAE_CONFIG)


def test_a_file_is_written_whole_or_not_at_all(unet, tmp_path):
    path = tmp_path / "file.safetensors"
    save_weights(path, unet.state_dict(), Kind.UNET, UNET_CONFIG)
    before = path.read_bytes()

    def fails():
        raise RuntimeError("in the middle")

    state = stored(unet.state_dict())
    last = max(state)
    state[last] = type(state[last])(state[last].shape, state[last].dtype, fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        write_file(path, state)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 1, 1)])
def test_what_is_written_is_what_the_library_reads_and_the_other_way_round(tmp_path, shape):
    generator = torch.Generator().manual_seed(0)
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    tensors = {f"{kind}": (torch.rand(shape, generator=generator) * 9).to(kind) for kind in kinds}
    write_file(tmp_path / "ours.safetensors", stored(tensors), {"a": "b"})
    assert equal(load_file(tmp_path / "ours.safetensors"), tensors)
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        assert file.metadata() == {"a": "b"}
    save_file(tensors, tmp_path / "theirs.safetensors")
    read = read_file(tmp_path / "theirs.safetensors")
    assert equal({key: value.read() for key, value in read.items()}, tensors)


def test_a_file_that_is_not_whole_is_refused(vae, tmp_path):
    path = tmp_path / "vae.safetensors"
    save_weights(path, vae.state_dict(), Kind.VAE, VAE_CONFIG)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{path} is no whole safetensors file"):
        load_vae(path)


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "pth", "bin"])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_pickle_is_read_where_it_is_allowed_and_its_code_never_runs(unet, tmp_path, suffix, mapped):
    path, touched = tmp_path / f"sdxl.{suffix}", tmp_path / "touched"
    tensors = {f"model.diffusion_model.{key}": value for key, value in unet.state_dict().items()}

    def save(content):
        torch.save(content, path, _use_new_zipfile_serialization=mapped)

    save({"state_dict": tensors, "global_step": 7})
    with pytest.raises(ValueError, match="allow_pickle"):
        load_unet(path, UNET_CONFIG)
    loaded = load_unet(path, UNET_CONFIG, allow_pickle=True)
    assert equal(loaded.state_dict(), unet.state_dict())
    save({"state_dict": tensors, "extra": Malicious(touched)})
    with pytest.raises(ValueError, match="refused: it holds more than tensors, such as code"):
        load_unet(path, UNET_CONFIG, allow_pickle=True)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists()  # so it was a pickle with code


def test_a_pickle_in_safetensors_clothes_is_refused(tmp_path):
    path, touched = tmp_path / "sdxl.safetensors", tmp_path / "touched"
    torch.save(Malicious(touched), path)
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_unet(path, UNET_CONFIG, allow_pickle=True)
    assert not touched.exists()


WHOLE, HALF = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
INDEX, PICKLE = "model.safetensors.index.json", "pytorch_model.bin"


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ((HALF, WHOLE, PICKLE), [WHOLE]),
        ((HALF, PICKLE), [HALF]),
        ((INDEX, "a", "b", "c", PICKLE), ["a", "b"]),
        (("model.safetensors.index.fp16.json", "a", "b"), ["a", "b"]),
    ],
)
def test_a_folders_weights_are_whole_before_half_and_never_a_pickle_beside_them(names, chosen):
    index = {"weight_map": {"x": "b", "y": "a", "z": "b"}}
    assert weight_files("folder", names, lambda name: index, allow_pickle=True) == chosen


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of \['diffusion_pytorch_model"):
        read_folder(tmp_path)
    (tmp_path / PICKLE).touch()
    with pytest.raises(ValueError, match="allow_pickle"):
        read_folder(tmp_path)
    for index, message in (("{}", "names no file"), ("<html>", f"{INDEX} is no JSON")):
        (tmp_path / INDEX).write_text(index)
        with pytest.raises(ValueError, match=message):
            read_folder(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"names \['model-1.safetensors'\], which are not there"):
        read_folder(tmp_path)


MIB, SLACK = 2**20, 2**20  # slack for masks, which the text encoders make
LARGE_VAE = VAEConfig(channels=96)  # 90 MiB in half precision
TOWER = TextTowerConfig(width=192, layers=6, heads=3, activation="gelu", pad_token=0)
LARGE_TEXT = TextConfig(clip_l=TOWER, bigg=replace(TOWER, projection_dim=192))


def zeros(state):
    return stored({key: torch.zeros(value.shape, dtype=torch.float16) for key, value in state.items()})


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Networks of some size in every layout, some beside 64 MiB that belong to another."""
    folder, junk = tmp_path_factory.mktemp("large"), {"x": torch.zeros(32 * MIB, dtype=torch.float16)}
    with torch.device("meta"):
        vae, encoders = VAE(LARGE_VAE), TextEncoders(LARGE_TEXT)
    state = zeros(vae.state_dict())
    save_weights(folder / "own.safetensors", {k: v.read() for k, v in state.items()}, Kind.VAE, LARGE_VAE)
    single = {f"first_stage_model.{key}": value for key, value in state.items()}
    write_file(folder / "single.safetensors", single | {"model.diffusion_model.x": stored(junk)["x"]})
    (folder / "vae").mkdir()
    write_json(folder / "vae" / "config.json", diffusers_config(LARGE_VAE))
    theirs, index = to_diffusers(state, LARGE_VAE), {}
    for number in range(3):
        name = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        part = {key: theirs[key] for key in sorted(theirs)[number::3]}
        index |= dict.fromkeys(part, name)
        write_file(folder / "vae" / name, part)
    write_json(folder / "vae" / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": index})
    states = {tower: zeros(weights) for tower, weights in text_states(encoders).items()}
    converted = {"clip_l": to_transformers(states["clip_l"]), "bigg": to_transformers(states["bigg"])}
    for tower, weights in converted.items():
        (folder / tower).mkdir()
        write_json(folder / tower / "config.json", transformers_config(getattr(LARGE_TEXT, tower)))
        write_file(folder / tower / "model.safetensors", weights)
    write_file(folder / "open_clip.safetensors", states["bigg"] | {"visual.x": stored(junk)["x"]})
    return folder


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all storages that operations make and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, address, size)

    def _remove(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


@pytest.mark.parametrize(
    ("load", "scale"),
    [
        (lambda at: load_vae(at / "own.safetensors"), 1),
        (lambda at: load_vae(at / "own.safetensors", dtype=torch.float32), 2),
        (lambda at: load_vae(at / "single.safetensors", LARGE_VAE), 1),
        (lambda at: load_vae(at / "vae", LARGE_VAE), 1),
        (lambda at: load_text_encoders(LARGE_TEXT, str(at / "clip_l"), str(at / "bigg")), 2),
        (lambda at: load_text_encoders(LARGE_TEXT, str(at / "clip_l"), str(at / "open_clip.safetensors")), 2),
    ],
    ids=["own", "own-float32", "single", "sharded", "text", "open_clip"],
)
def test_loading_holds_one_model_and_one_tensor(large, load, scale):
    with LiveTensors():
        load(large)  # imports, of what the watching needs too
    tracemalloc.start()
    with LiveTensors() as tensors:
        module = load(large)
    others = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    sizes = [weight.nbytes for weight in module.parameters()]
    source = max(sizes) // scale  # the largest tensor as it lies in the file
    assert sum(sizes) <= tensors.peak <= sum(sizes) + source + SLACK
    assert others < 8 * MIB  # what is no tensor: bytes of a file would be


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
