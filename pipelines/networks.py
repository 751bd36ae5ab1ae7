"""Networks as the configs name them: a preset's shape with random values, or values from a file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from model.config import (
    DISCRIMINATOR_PRESETS,
    LPIPS_PRESETS,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    DiffusionConfig,
    PredictionType,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from model.layers import map_format
from model.lpips import LPIPS, load_lpips
from model.publish import DIFFUSION, read_scheduler
from model.text import TextEncoders, load_text_encoders, random_text_encoders
from model.unet import UNet
from model.vae import VAE
from model.vae_loss import PatchDiscriminator
from model.weights import Kind, load_unet, load_vae, read_unet, read_vae, save_weights
from model.weights import fingerprint as weights_fingerprint
from pipelines.checkpoints import averaged_weights, is_checkpoint, run_settings
from pipelines.config import LPIPSWeightsConfig, TextWeightsConfig, WeightsConfig
from pipelines.schema import digest
from pipelines.sources import (
    WEIGHTS_FILE,
    find,
    local_copy,
    local_text,
    local_weights,
    scheduler_json,
)
from pipelines.storage import Storage, StorageOptions


def unet(
    config: WeightsConfig,
    options: StorageOptions,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet:
    """The base or refiner U-Net. Raises FileNotFoundError or ValueError naming the file that does not fit."""
    preset = UNET_PRESETS[config.preset]
    if config.path is None:
        network = _seeded(lambda: UNet(preset), config.seed).to(device, dtype)
    else:
        with unet_weights(config, options) as path:
            network = load_unet(path, preset, dtype, device, allow_pickle=config.allow_pickle)
    return network.to(memory_format=map_format(torch.device(device)))


def vae(
    config: WeightsConfig,
    options: StorageOptions,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VAE:
    """The VAE, with the scaling factor that its file says. Raises as `unet` does."""
    preset = VAE_PRESETS[config.preset]
    if config.path is None:
        network = _seeded(lambda: VAE(preset), config.seed).to(device, dtype)
    else:
        with local_weights(config.path, "vae", options, config.allow_pickle) as path:
            network = load_vae(path, preset, dtype, device, allow_pickle=config.allow_pickle)
    return network.to(memory_format=map_format(torch.device(device)))


def text_encoders(
    config: TextWeightsConfig,
    options: StorageOptions | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoders:
    """Both text encoders, frozen."""
    preset, options = TEXT_PRESETS[config.preset], options or StorageOptions()
    if config.seed is not None:
        return random_text_encoders(preset, config.seed).to(device, dtype)
    if config.clip_l is None or config.bigg is None:
        raise ValueError("text: name both clip_l and bigg, or give a seed for random weights")
    pickles = config.allow_pickle
    with (
        local_text(config.clip_l, "text_encoder", options, pickles) as clip_l,
        local_text(config.bigg, "text_encoder_2", options, pickles) as bigg,
    ):
        return load_text_encoders(preset, clip_l, bigg, allow_pickle=pickles, dtype=dtype, device=device)


def require_weights(config: WeightsConfig, part: str, options: StorageOptions) -> None:
    """Raise FileNotFoundError or ValueError where the weights of "unet" or "vae" are missing or do not fit.

    No tensor is read, and nothing is copied: of weights on s3:// and of checkpoints it tells only that they are there.
    """
    assert config.path is not None
    if part == "unet" and is_checkpoint(Storage(config.path, options)):
        return
    if not find(config.path, part, options, config.allow_pickle).storage.is_local:
        return
    with local_weights(config.path, part, options, config.allow_pickle) as path:
        if part == "unet":
            read_unet(path, UNET_PRESETS[config.preset], config.allow_pickle)
        else:
            read_vae(path, VAE_PRESETS[config.preset], config.allow_pickle)


def trained_diffusion(config: WeightsConfig, options: StorageOptions) -> DiffusionConfig:
    """The noise schedule that a U-Net's file or folder says it was trained with; the published one if it says none."""
    assert config.path is not None
    folder = Storage(config.path, options)
    if is_checkpoint(folder):
        return _diffusion(run_settings(folder)["task"]["diffusion"])
    source = find(config.path, "unet", options, config.allow_pickle)
    if source.is_folder:
        scheduler = scheduler_json(source)
        return DiffusionConfig() if scheduler is None else read_scheduler(scheduler, config.path)
    metadata = source.metadata()
    values = json.loads(metadata.get("extra" if "kind" in metadata else DIFFUSION, "{}"))
    return _diffusion(values)


def discriminator(preset: str, seed: int) -> PatchDiscriminator:
    """The VAE's discriminator, always from random weights."""
    return _seeded(lambda: PatchDiscriminator(DISCRIMINATOR_PRESETS[preset]), seed)


def lpips(config: LPIPSWeightsConfig, options: StorageOptions) -> LPIPS:
    """The network of the perceptual loss, frozen, in fp32. Raises as `unet` does."""
    with local_copy(config.trunk, options) as trunk, local_copy(config.heads, options) as heads:
        return load_lpips(trunk, heads, LPIPS_PRESETS[config.preset], allow_pickle=config.allow_pickle)


def fingerprint(vae_weights: WeightsConfig, text: TextWeightsConfig, options: StorageOptions) -> dict[str, str]:
    """What latents depend on besides their images: shape and weights of the VAE and of the text encoders."""
    network, encoders = vae(vae_weights, options), text_encoders(text, options)
    shape = asdict(network.config)
    del shape["scaling_factor"]  # it enters in training, not in what is stored
    return {
        "vae": digest([shape, weights_fingerprint(network)]),
        "text": digest([asdict(encoders.config), weights_fingerprint(encoders)]),
    }


def unet_fingerprint(config: WeightsConfig, options: StorageOptions) -> str:
    """The content of a U-Net as `unet` gives it, whatever its layout, read without building the network."""
    assert config.path is not None
    with unet_weights(config, options) as path:
        _, state = read_unet(path, UNET_PRESETS[config.preset], config.allow_pickle)
        return weights_fingerprint({key: value.to(torch.float32) for key, value in state.items()})


def unet_config(config: WeightsConfig) -> UNetConfig:
    """The U-Net's shape."""
    return UNET_PRESETS[config.preset]


def vae_config(config: WeightsConfig) -> VAEConfig:
    """The VAE's shape, as its preset has it; a trained file may carry another scaling factor."""
    return VAE_PRESETS[config.preset]


def text_config(config: TextWeightsConfig) -> TextConfig:
    """The text encoders' shape."""
    return TEXT_PRESETS[config.preset]


@contextmanager
def unet_weights(config: WeightsConfig, options: StorageOptions) -> Iterator[str]:
    """The U-Net's file or folder on this machine; of a training checkpoint, a file of its averaged weights."""
    assert config.path is not None
    folder = Storage(config.path, options)
    if not is_checkpoint(folder):
        with local_weights(config.path, "unet", options, config.allow_pickle) as path:
            yield path
        return
    preset = UNET_PRESETS[config.preset]
    with torch.device("meta"):
        shape = UNet(preset)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, WEIGHTS_FILE)
        save_weights(path, averaged_weights(folder, "unet", shape), Kind.UNET, preset)
        yield path


def _diffusion(values: dict[str, Any]) -> DiffusionConfig:
    """A noise schedule from its JSON; a field that an older version did not write is at its default."""
    if "prediction_type" in values:
        values = values | {"prediction_type": PredictionType(values["prediction_type"])}
    return DiffusionConfig(**values)


def _seeded(build, seed: int):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
