"""Networks as the configs name them: a preset's shape with random values, or values from a file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from model.config import (
    DISCRIMINATOR_PRESETS,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    DiffusionConfig,
    PredictionType,
    TextConfig,
    UNetConfig,
    VAEConfig,
)
from model.text import TextEncoders, load_text_encoders, random_text_encoders
from model.unet import UNet
from model.vae import VAE
from model.vae_loss import PatchDiscriminator
from model.weights import fingerprint as weights_fingerprint
from model.weights import is_own, load_unet, load_vae, read_extra
from pipelines.config import TextWeightsConfig, WeightsConfig
from pipelines.schema import digest
from pipelines.storage import Storage, StorageOptions

WEIGHTS_FILE = "weights.safetensors"  # what a training run's output folder offers


def unet(config: WeightsConfig, options: StorageOptions) -> UNet:
    """The base or refiner U-Net, in fp32. Raises FileNotFoundError or ValueError naming the file that does not fit."""
    if config.path is None:
        return _seeded(lambda: UNet(UNET_PRESETS[config.preset]), config.seed)
    with local_file(config.path, options) as path:
        return load_unet(path, UNET_PRESETS[config.preset], torch.float32)


def vae(config: WeightsConfig, options: StorageOptions) -> VAE:
    """The VAE, in fp32. Raises FileNotFoundError or ValueError naming the file that does not fit."""
    if config.path is None:
        return _seeded(lambda: VAE(VAE_PRESETS[config.preset]), config.seed)
    preset = VAE_PRESETS[config.preset]
    with local_file(config.path, options) as path:
        if not is_own(path):
            return load_vae(path, preset, torch.float32)
        network = load_vae(path, dtype=torch.float32)  # with the scaling factor that was measured in training
    if replace(network.config, scaling_factor=preset.scaling_factor) != preset:
        raise ValueError(f"{config.path} holds {network.config}, and the preset {config.preset!r} is {preset}")
    return network


def text_encoders(config: TextWeightsConfig) -> TextEncoders:
    """Both text encoders, frozen."""
    preset = TEXT_PRESETS[config.preset]
    if config.seed is not None:
        return random_text_encoders(preset, config.seed)
    if config.clip_l is None or config.bigg is None:
        raise ValueError("text: name both clip_l and bigg, or give a seed for random weights")
    return load_text_encoders(preset, config.clip_l, config.bigg)


def trained_diffusion(config: WeightsConfig, options: StorageOptions) -> DiffusionConfig:
    """The noise schedule that a U-Net's file says it was trained with; the published one where it says nothing."""
    assert config.path is not None
    with local_file(config.path, options) as path:
        if not is_own(path):
            return DiffusionConfig()
        values = read_extra(path)
    return DiffusionConfig(**values | {"prediction_type": PredictionType(values["prediction_type"])})


def discriminator(preset: str, seed: int) -> PatchDiscriminator:
    """The VAE's discriminator, always from random weights."""
    return _seeded(lambda: PatchDiscriminator(DISCRIMINATOR_PRESETS[preset]), seed)


def fingerprint(vae_weights: WeightsConfig, text: TextWeightsConfig, options: StorageOptions) -> dict[str, str]:
    """What latents depend on besides their images: shape and weights of the VAE and of the text encoders."""
    network, encoders = vae(vae_weights, options), text_encoders(text)
    shape = asdict(network.config)
    del shape["scaling_factor"]  # it enters in training, not in what is stored
    return {
        "vae": digest([shape, weights_fingerprint(network)]),
        "text": digest([asdict(encoders.config), weights_fingerprint(encoders)]),
    }


def unet_fingerprint(config: WeightsConfig, options: StorageOptions) -> str:
    """The content of a U-Net's file, read without building the network."""
    assert config.path is not None
    with local_file(config.path, options) as path:
        return weights_fingerprint(path)


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
def local_file(path: str, options: StorageOptions) -> Iterator[str]:
    """A weights file on this machine: the file itself, a run's exported weights, or a copy of an s3:// file."""
    folder, _, name = path.rstrip("/").rpartition("/")
    if not name.endswith(".safetensors"):
        folder, name = path.rstrip("/"), WEIGHTS_FILE
    storage = Storage(folder or ".", options)
    if not storage.exists(name):
        raise FileNotFoundError(f"no weights at {path}: expected a safetensors file, or a finished run's output folder")
    if storage.is_local:
        yield storage.path(name)
        return
    with tempfile.TemporaryDirectory() as directory:
        copy = os.path.join(directory, name)
        with open(copy, "wb") as file, storage.filesystem.open_input_stream(storage.path(name)) as stream:
            while chunk := stream.read(64 * 2**20):
                file.write(chunk)
        yield copy


def _seeded(build, seed: int):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
