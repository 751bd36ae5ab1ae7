"""What is there to be measured: a run's checkpoints and its finished weights, or weights that belong to no run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from model.config import UNET_PRESETS, VAE_PRESETS, UNetConfig, VAEConfig
from model.unet import UNet
from model.vae import VAE
from model.weights import Kind, fingerprint, save_weights
from pipelines import networks
from pipelines.checkpoints import CHECKPOINTS, PROGRESS, RUN, averaged_weights, is_checkpoint
from pipelines.config import WeightsConfig
from pipelines.storage import Storage, StorageOptions

COPIES = "weights"  # folder below the evaluation's output


@dataclass(frozen=True)
class Subject:
    """One state of a network."""

    name: str
    """Its name among the evaluation's results."""
    path: str
    """Where its weights are."""
    images_seen: int | None
    """How far its run had trained it; None where it is of no run."""
    is_checkpoint: bool = False


def run_folder(path: str, options: StorageOptions) -> Storage | None:
    """The training run that a path belongs to: the folder itself, or two above a checkpoint; None for other weights."""
    folder = Storage(path, options)
    if folder.exists(RUN):
        return folder
    if is_checkpoint(folder):
        return Storage(path.rstrip("/").rsplit("/", 2)[0], options)
    return None


def is_finished(run: Mapping[str, Any]) -> bool:
    """Whether a run, by its run.json, has come to its end; one that is trained longer has finished images as well."""
    return (run.get("finished_images") or 0) >= int(run["settings"]["schedule"]["images"])


def subjects(config: WeightsConfig, kind: Kind, options: StorageOptions) -> list[Subject]:
    """All that a path offers now, the least trained first.

    A run's finished weights stand for the checkpoint at the same count of images, which has the same. Raises as
    `networks.unet` and `networks.vae` do where there are no weights.
    """
    assert config.path is not None
    folder = Storage(config.path, options)
    if is_checkpoint(folder):
        return [_checkpoint(folder)]
    if not folder.exists(RUN):
        content = networks.unet_fingerprint(config, options) if kind is Kind.UNET else _vae_fingerprint(config, options)
        return [Subject(f"weights-{content[:12]}", config.path, None)]
    found: dict[int, Subject] = {}
    for file in folder.list(CHECKPOINTS):
        checkpoint, _, name = file.name.rpartition("/")
        if name == PROGRESS and checkpoint.count("/") == 1:
            with suppress(FileNotFoundError):  # its run has deleted it meanwhile
                subject = _checkpoint(folder.folder(checkpoint))
                found[subject.images_seen or 0] = subject
    images = folder.read_json(RUN).get("finished_images")
    if images:
        found[images] = Subject(_name(images), config.path, images)
    return [found[images] for images in sorted(found)]


def copied_out(subject: Subject, config: WeightsConfig, kind: Kind, output: Storage) -> Subject:
    """The subject at a place where it stays: a checkpoint's weights are copied, for its run may delete it at any time.

    Raises FileNotFoundError or ValueError where a part of the checkpoint is missing.
    """
    if not subject.is_checkpoint:
        return subject
    name = copy_name(subject)
    if not output.exists(name):
        preset: UNetConfig | VAEConfig = (UNET_PRESETS if kind is Kind.UNET else VAE_PRESETS)[config.preset]
        with torch.device("meta"):
            network: nn.Module = UNet(preset) if isinstance(preset, UNetConfig) else VAE(preset)
        weights = averaged_weights(Storage(subject.path, output.options), str(kind), network)
        extra = {}
        if kind is Kind.UNET:
            extra = asdict(networks.trained_diffusion(replace(config, path=subject.path), output.options))
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "copy.safetensors")
            save_weights(path, weights, kind, preset, extra)
            output.upload(name, path)
    return replace(subject, path=f"{output.uri.rstrip('/')}/{name}", is_checkpoint=False)


def copies(output: Storage) -> list[Subject]:
    """Checkpoints that were copied and are not measured yet."""
    names = [file.name.removeprefix(f"{COPIES}/").removesuffix(".safetensors") for file in output.list(COPIES)]
    return [Subject(name, f"{output.uri.rstrip('/')}/{COPIES}/{name}.safetensors", int(name)) for name in names]


def copy_name(subject: Subject) -> str:
    """The file of a checkpoint's weights below the evaluation's output."""
    return f"{COPIES}/{subject.name}.safetensors"


def _checkpoint(folder: Storage) -> Subject:
    images_seen = int(folder.read_json(PROGRESS)["images_seen"])
    return Subject(_name(images_seen), folder.uri, images_seen, is_checkpoint=True)


def _name(images_seen: int) -> str:
    return f"{images_seen:012}"


def _vae_fingerprint(config: WeightsConfig, options: StorageOptions) -> str:
    return fingerprint(networks.vae(config, options))
