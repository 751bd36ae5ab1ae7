"""Weights on disk, as safetensors: our own files, which carry their config, and the published single files.

An own file names its parameters like the module that it belongs to, and its metadata holds `kind` and `config`, so a
file alone says what network it is. A published file holds several networks, each behind a prefix, and no config.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.config import (
    Conditioning,
    DiscriminatorConfig,
    TextConfig,
    TextTowerConfig,
    UNetConfig,
    VAEConfig,
)
from model.unet import UNet
from model.vae import VAE

Config = UNetConfig | VAEConfig | TextConfig | DiscriminatorConfig


class Kind(StrEnum):
    """Which network a file holds."""

    UNET = "unet"
    VAE = "vae"
    TEXT = "text"
    DISCRIMINATOR = "discriminator"


PREFIXES = {Kind.UNET: "model.diffusion_model.", Kind.VAE: "first_stage_model."}  # in the published single files


def save_weights(
    path: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    kind: Kind | str,
    config: Config,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write a module's state dict with its config, and `extra` (JSON values) beside it.

    The file appears under its name only when it is complete: whoever reads it never sees half of one.
    """
    metadata = {
        "kind": str(Kind(kind)),
        "config": json.dumps(asdict(config), sort_keys=True),
        "extra": json.dumps(dict(extra or {}), sort_keys=True),
    }
    save_atomically(path, state_dict, metadata)


def save_atomically(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file under another name, then give it its own."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    try:
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial, dict(metadata or {})
        )
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_config(path: str | os.PathLike[str]) -> tuple[Kind, Config]:
    """What an own file holds. Raises ValueError for a file without our metadata."""
    metadata = _metadata(path)
    if "kind" not in metadata or "config" not in metadata:
        raise ValueError(f"{path} carries no config: it was not written by save_weights")
    kind = Kind(metadata["kind"])
    return kind, _config(kind, json.loads(metadata["config"]))


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether a file was written by save_weights and so carries its config."""
    return "kind" in _metadata(path)


def read_extra(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_weights` was given as `extra`."""
    return json.loads(_metadata(path).get("extra", "{}"))


def load_unet(
    path: str | os.PathLike[str],
    config: UNetConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> UNet:
    """The U-Net of an own or a published file, in `dtype`, or the file's own where None.

    A published file needs `config`; for an own file it is optional and must agree. Raises ValueError where it does not,
    and for every key that is missing, unexpected or of another shape.
    """
    agreed = _agreed(path, Kind.UNET, config)
    assert isinstance(agreed, UNetConfig)
    with torch.device("meta"):
        module = UNet(agreed)
    _stream(path, Kind.UNET, module, dtype, device)
    return module


def load_vae(
    path: str | os.PathLike[str],
    config: VAEConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> VAE:
    """The VAE of an own or a published file; as `load_unet`."""
    agreed = _agreed(path, Kind.VAE, config)
    assert isinstance(agreed, VAEConfig)
    with torch.device("meta"):
        module = VAE(agreed)
    _stream(path, Kind.VAE, module, dtype, device)
    return module


def fingerprint(source: Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]) -> str:
    """64 hex digits that name weights: sha256 over every tensor's key, dtype, shape and bytes, in order of the keys.

    A state dict, a module and the own file of it have the same one; metadata does not enter.
    """
    digest = hashlib.sha256()
    for key, tensor in _tensors(source):
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(f"{key}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def _tensors(source: Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if isinstance(source, Mapping):
        for key in sorted(source):
            yield key, source[key]
        return
    with safe_open(source, framework="pt") as file:
        for key in sorted(file.keys()):
            yield key, file.get_tensor(key)


def _metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _config(kind: Kind, values: dict[str, Any]) -> Config:
    """A config from its JSON: lists are tuples, conditionings and towers get their types back."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    if kind is Kind.UNET:
        values["conditioning"] = tuple(Conditioning(name) for name in values["conditioning"])
        return UNetConfig(**values)
    if kind is Kind.TEXT:
        return TextConfig(**{name: TextTowerConfig(**tower) for name, tower in values.items()})
    return {Kind.VAE: VAEConfig, Kind.DISCRIMINATOR: DiscriminatorConfig}[kind](**values)


def _agreed(path: str | os.PathLike[str], kind: Kind, config: Config | None) -> Config:
    """The file's own config, or the given one where the file has none."""
    if not is_own(path):
        if config is None:
            raise ValueError(f"{path} carries no config; name the one it was made with")
        return config
    found_kind, found = read_config(path)
    if found_kind is not kind:
        raise ValueError(f"{path} holds a {found_kind}, not a {kind}")
    if config is not None and config != found:
        raise ValueError(f"{path} holds {found}, not {config}")
    return found


def _stream(
    path: str | os.PathLike[str], kind: Kind, module: nn.Module, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Fill a module built on the meta device, one tensor at a time: the peak is one model and one tensor."""
    expected = dict(module.named_parameters())
    with safe_open(path, framework="pt") as file:
        in_file = list(file.keys())
        prefix = PREFIXES[kind] if any(key.startswith(PREFIXES[kind]) for key in in_file) else ""
        # Some published files hold the autoencoder's averages and constant position ids, which no network reads.
        keys = {
            key.removeprefix(prefix): key
            for key in in_file
            if key.startswith(prefix) and "model_ema." not in key and not key.endswith("position_ids")
        }
        found = {name: tuple(file.get_slice(key).get_shape()) for name, key in keys.items()}
        check_keys(f"{path}", found, shapes(expected))
        for name, key in keys.items():
            owner, _, attribute = name.rpartition(".")
            tensor = file.get_tensor(key).to(device, dtype, copy=True)  # a copy, not a view of the mapped file
            setattr(module.get_submodule(owner), attribute, nn.Parameter(tensor))


def check_keys(what: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that lists every key that is missing, unexpected or of another shape."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    differ = [
        f"{key}: {found[key]} for {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key]
    ]
    if missing or unexpected or differ:
        raise ValueError(f"{what} does not fit.\nmissing: {missing}\nunexpected: {unexpected}\nshapes: {differ}")


def shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, for `check_keys`."""
    return {key: tuple(value.shape) for key, value in state.items()}
