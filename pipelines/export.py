"""A model into the world: networks from wherever they lie, written as one single file or as a diffusers folder.

No network is built: tensors pass one at a time from where they are to where they go. What is written has another name,
or no model_index.json, until it is whole.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.config import TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS, DiffusionConfig
from model.publish import Model, is_refiner, pipeline_parts, single_file_parts, write_pipeline, write_single_file
from model.tensors import SAFETENSORS, State, Stored
from model.text import random_text_encoders, read_text, text_states
from model.weights import PIPELINE, read_unet, read_vae
from pipelines.config import TextWeightsConfig, WeightsConfig
from pipelines.networks import unet_weights
from pipelines.sources import local_text, local_weights
from pipelines.storage import TEMPORARY, Storage, StorageOptions

Layout = Literal["single_file", "diffusers"]


@dataclass(frozen=True)
class Part:
    """One network of an export."""

    name: str
    parameters: int
    size: int
    """Bytes."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported, and as what."""

    layout: Layout
    unet: WeightsConfig
    vae: WeightsConfig
    text: TextWeightsConfig
    diffusion: DiffusionConfig
    dtype: torch.dtype
    resolution: int
    """Side of the pictures that the pipeline makes where none is asked for, pixels."""


@contextmanager
def opened(export: Export, options: StorageOptions) -> Iterator[Model]:
    """The model in the export's dtype; its weights are read one by one as they are written.

    Raises ValueError for every key that does not fit, before anything is written.
    """
    unet, vae, text = export.unet, export.vae, export.text
    assert vae.path is not None
    preset = TEXT_PRESETS[text.preset]
    with ExitStack() as files:
        unet_path = files.enter_context(unet_weights(unet, options))
        vae_path = files.enter_context(local_weights(vae.path, "vae", options, vae.allow_pickle))
        unet_config, unet_state = read_unet(unet_path, UNET_PRESETS[unet.preset], unet.allow_pickle)
        vae_config, vae_state = read_vae(vae_path, VAE_PRESETS[vae.preset], vae.allow_pickle)
        refiner = is_refiner(unet_config)
        if text.seed is not None:
            encoders = text_states(random_text_encoders(preset, text.seed))
        else:
            assert text.bigg is not None
            clip_l, bigg = None if refiner else text.clip_l, text.bigg
            if clip_l is not None:
                clip_l = files.enter_context(local_text(clip_l, "text_encoder", options, text.allow_pickle))
            bigg = files.enter_context(local_text(bigg, "text_encoder_2", options, text.allow_pickle))
            encoders = read_text(preset, clip_l, bigg, text.allow_pickle)
        if refiner:
            encoders.pop("clip_l", None)
        states = {"unet": unet_state, "vae": vae_state, **encoders}
        yield Model(
            unet=unet_config,
            vae=vae_config,
            text=preset,
            diffusion=export.diffusion,
            states={
                part: {key: value.to(export.dtype) for key, value in state.items()} for part, state in states.items()
            },
        )


def write(model: Model, export: Export, output: str, options: StorageOptions) -> Mapping[str, float]:
    """Write the model to `output`, a file or folder, local or s3://; gives the seconds by part, without uploading.

    Raises FileExistsError where something is there, and ValueError where a weight is not finite in the export's dtype.
    """
    require_absent(output, options)
    clock = _Clock()
    with _staging(output) as folder:
        target = folder / os.path.basename(output.rstrip("/"))
        checked, lost = _checked(model)
        if export.layout == "single_file":
            write_single_file(target, checked, clock.tick)
        else:
            write_pipeline(target, checked, export.resolution, clock.tick)
        if lost:
            raise ValueError(f"not finite in {export.dtype}; nothing was written: {', '.join(sorted(lost))}")
        _place(target, Storage(output, options))
    return clock.seconds


def parts_of(model: Model, layout: Layout) -> list[Part]:
    """What is written of each network, by the layout's names."""
    parts = single_file_parts(model) if layout == "single_file" else pipeline_parts(model)
    return [_part(name, state) for name, state in sorted(parts.items())]


def require_absent(output: str, options: StorageOptions) -> None:
    """Raise FileExistsError if there is anything at `output`."""
    storage = Storage(output, options)
    if storage.is_local:
        there = os.path.exists(storage.root)
    elif output.endswith(SAFETENSORS):
        parent, _, name = output.rpartition("/")
        there = Storage(parent, options).exists(name)
    else:
        there = bool(storage.list())
    if there:
        raise FileExistsError(
            f"output {output} is there already, and an export replaces nothing: delete it, or choose another. "
            f"(A folder on s3:// without {PIPELINE} is an export that was interrupted.)"
        )


class _Clock:
    """Seconds of each part, from the tensors of it that were written."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def tick(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _checked(model: Model) -> tuple[Model, set[str]]:
    """The model, and the names of tensors that turn out not to be finite while they are read."""
    lost: set[str] = set()

    def watched(name: str, value: Stored) -> Stored:
        def read() -> Tensor:
            tensor = value.read()
            if not bool(tensor.isfinite().all()):
                lost.add(name)
            return tensor

        return replace(value, read=read)

    states = {
        part: {key: watched(f"{part} {key}", value) for key, value in state.items()}
        for part, state in model.states.items()
    }
    return replace(model, states=states), lost


@contextmanager
def _staging(output: str) -> Iterator[Path]:
    """A folder to write in, on the output's file system where that is local."""
    if output.startswith("s3://"):
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        return
    folder = Path(output).absolute().parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _place(written: Path, output: Storage) -> None:
    """Give what is written its name; on S3 a folder's model_index.json comes last."""
    if output.is_local:
        os.rename(written, output.root)
        return
    if written.is_file():
        parent, _, name = output.uri.rpartition("/")
        Storage(parent, output.options).upload(name, written)
        return
    names = [path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()]
    for name in sorted(names, key=lambda name: (name == PIPELINE, name)):
        output.upload(name, written / name)


def _part(name: str, state: State) -> Part:
    counts = {key: math.prod(value.shape) for key, value in state.items()}
    size = sum(counts[key] * value.dtype.itemsize for key, value in state.items())
    return Part(name, sum(counts.values()), size)
