"""U-Net and VAE on disk: our own files, which carry their config, and both public layouts.

An own file names its parameters like the module that it belongs to, and its metadata holds `kind` and `config`, so a
file alone says what network it is. A published single file holds several networks, each behind a prefix, and no
config; a diffusers folder holds one network, in names of its own, and a config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import (
    Conditioning,
    DiscriminatorConfig,
    TextConfig,
    TextTowerConfig,
    UNetConfig,
    VAEConfig,
)
from model.layouts import UNET_PREFIX, VAE_PREFIX, agreed_config, from_diffusers, on_meta
from model.tensors import (
    Name,
    State,
    Stored,
    below,
    check_keys,
    fill,
    is_ignored,
    is_lora,
    raw,
    read_file,
    read_folder,
    read_json,
    read_metadata,
    shapes,
    stored,
    write_file,
)
from model.unet import UNet
from model.vae import VAE

Config = UNetConfig | VAEConfig | TextConfig | DiscriminatorConfig

SCALING_FACTOR = "vae_scaling_factor"  # in the metadata of a single file, whose layout has no other place for it
PIPELINE, CONFIG = "model_index.json", "config.json"  # files of a diffusers folder


class Kind(StrEnum):
    """Which network a file holds."""

    UNET = "unet"
    VAE = "vae"
    TEXT = "text"
    DISCRIMINATOR = "discriminator"


PREFIXES = {Kind.UNET: UNET_PREFIX, Kind.VAE: VAE_PREFIX}  # in a single file
WHOLE = (UNET_PREFIX, VAE_PREFIX, "conditioner.")  # how keys of a single file begin, the text encoders' last


def save_weights(
    path: Name,
    state_dict: Mapping[str, Tensor | Stored],
    kind: Kind | str,
    config: Config,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a module's state dict, tensor by tensor, with its config, and `extra` (JSON values) beside it.

    The file appears under its name only when it is complete: whoever reads it never sees half of one.
    """
    metadata = {
        "kind": str(Kind(kind)),
        "config": json.dumps(asdict(config), sort_keys=True),
        "extra": json.dumps(dict(extra or {}), sort_keys=True),
    }
    write_file(path, stored(state_dict), metadata)


def read_config(path: Name) -> tuple[Kind, Config]:
    """What an own file holds. Raises ValueError for a file without our metadata."""
    metadata = read_metadata(path)
    if "kind" not in metadata or "config" not in metadata:
        raise ValueError(f"{path} carries no config: it was not written by save_weights")
    kind = Kind(metadata["kind"])
    return kind, _config(kind, json.loads(metadata["config"]))


def is_own(path: Name) -> bool:
    """Whether a file was written by save_weights and so carries its config."""
    return os.path.isfile(path) and "kind" in read_metadata(path)


def read_extra(path: Name) -> dict[str, Any]:
    """What `save_weights` was given as `extra`."""
    return json.loads(read_metadata(path).get("extra", "{}"))


def load_unet(
    path: Name,
    config: UNetConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> UNet:
    """The U-Net of an own file, a single file or a diffusers folder, in `dtype`, or the file's own where None.

    A published one needs `config`; for an own file it is optional and must agree. Raises ValueError where it does not,
    and for every key that is missing, unexpected or of another shape.
    """
    config, state = read_unet(path, config, allow_pickle)
    module = on_meta(config)
    fill(module, state, os.fspath(path), dtype, device)
    assert isinstance(module, UNet)
    return module


def load_vae(
    path: Name,
    config: VAEConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    allow_pickle: bool = False,
) -> VAE:
    """The VAE of an own file, a single file or a diffusers folder; as `load_unet`.

    Its scaling factor is the one that the file or folder says, and `config`'s where a single file says none.
    """
    config, state = read_vae(path, config, allow_pickle)
    module = on_meta(config)
    fill(module, state, os.fspath(path), dtype, device)
    assert isinstance(module, VAE)
    return module


def read_unet(
    path: Name, config: UNetConfig | None = None, allow_pickle: bool = False
) -> tuple[UNetConfig, dict[str, Stored]]:
    """Shape and weights of the U-Net at `path` in our names, as `load_unet`; the weights are not read yet."""
    agreed, state = _read(path, Kind.UNET, config, allow_pickle)
    assert isinstance(agreed, UNetConfig)
    return agreed, state


def read_vae(
    path: Name, config: VAEConfig | None = None, allow_pickle: bool = False
) -> tuple[VAEConfig, dict[str, Stored]]:
    """Shape and weights of the VAE at `path` in our names, as `load_vae`; the weights are not read yet."""
    agreed, state = _read(path, Kind.VAE, config, allow_pickle)
    assert isinstance(agreed, VAEConfig)
    return agreed, state


def part_of_file(path: Name, state: State, prefix: str) -> dict[str, Stored]:
    """What a published single file holds behind a prefix. Raises ValueError for keys that belong to no network."""
    others = sorted(key for key in state if not key.startswith(WHOLE) and not is_ignored(key))
    if others:
        raise ValueError(
            f"{path} holds keys that belong to no network of SDXL, which may say that it is sampled otherwise (v_pred, "
            f"ztsnr): take them out where you know better\nunexpected: {others}"
        )
    return below(state, prefix)


def component(folder: Name, part: str) -> Path:
    """The folder of one network: below a pipeline's folder, or the given one."""
    return Path(folder, part) if Path(folder, PIPELINE).is_file() else Path(folder)


def fingerprint(source: Mapping[str, Tensor] | State | nn.Module | Name) -> str:
    """64 hex digits that name weights: sha256 over every tensor's key, dtype, shape and bytes, in order of the keys.

    A state dict, a module and the own file of it have the same one; metadata does not enter.
    """
    digest = hashlib.sha256()
    for key, tensor in _tensors(source):
        value = tensor.detach().contiguous().cpu()
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(raw(value))
    return digest.hexdigest()


def _tensors(source: Mapping[str, Tensor] | State | nn.Module | Name) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        source = source.state_dict()
    elif not isinstance(source, Mapping):
        source = read_file(source)
    for key in sorted(source):
        value = source[key]
        yield key, value.read() if isinstance(value, Stored) else value


def _config(kind: Kind, values: dict[str, Any]) -> Config:
    """A config from its JSON: lists are tuples, conditionings and towers get their types back."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if kind is Kind.UNET:
        values["conditioning"] = tuple(Conditioning(name) for name in values["conditioning"])
        return UNetConfig(**values)
    if kind is Kind.TEXT:
        return TextConfig(**{name: TextTowerConfig(**tower) for name, tower in values.items()})
    return {Kind.VAE: VAEConfig, Kind.DISCRIMINATOR: DiscriminatorConfig}[kind](**values)


def _read(
    path: Name, kind: Kind, config: UNetConfig | VAEConfig | None, allow_pickle: bool
) -> tuple[UNetConfig | VAEConfig, dict[str, Stored]]:
    if is_own(path):
        agreed, state = _own_config(path, kind, config), read_file(path)
    elif config is None:
        raise ValueError(f"{path} carries no config; name the one it was made with")
    elif os.path.isdir(path):
        folder = component(path, kind)
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"no {CONFIG} in {folder}")
        agreed = agreed_config(read_json(folder / CONFIG), config, str(folder / CONFIG))
        state = from_diffusers(read_folder(folder, allow_pickle), agreed, str(folder))
    else:
        agreed, state = config, _behind(path, PREFIXES[kind], allow_pickle)
        if isinstance(config, VAEConfig):
            factor = read_metadata(path).get(SCALING_FACTOR, config.scaling_factor)
            agreed = replace(config, scaling_factor=float(factor))
    check_keys(os.fspath(path), shapes(state), shapes(on_meta(agreed).state_dict()))
    return agreed, state


def _own_config(path: Name, kind: Kind, config: UNetConfig | VAEConfig | None) -> UNetConfig | VAEConfig:
    """What an own file says, which agrees with `config` but for the scaling factor, which training measures."""
    found_kind, found = read_config(path)
    if found_kind is not kind:
        raise ValueError(f"{path} holds a {found_kind}, not a {kind}")
    assert isinstance(found, UNetConfig | VAEConfig)
    expected = config
    if isinstance(found, VAEConfig) and isinstance(config, VAEConfig):
        expected = replace(config, scaling_factor=found.scaling_factor)
    if expected is not None and found != expected:
        differ = {
            name: (value, asdict(expected)[name])
            for name, value in asdict(found).items()
            if value != asdict(expected)[name]
        }
        raise ValueError(f"{path} holds another network (found, expected): {differ}")
    return found


def _behind(path: Name, prefix: str, allow_pickle: bool) -> dict[str, Stored]:
    """A network's part of a single file; all of a file that holds it alone, without a prefix."""
    state = read_file(path, allow_pickle)
    if any("down_blocks." in key for key in state) and not is_lora(state):
        raise ValueError(f"{path} has diffusers' names: name its folder, whose {CONFIG} says the network's shape")
    return part_of_file(path, state, prefix) if any(key.startswith(WHOLE) for key in state) else below(state, "")
