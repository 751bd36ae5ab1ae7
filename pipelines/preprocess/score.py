"""Images and captions -> scores that a CLIP model gives: how well they fit, and how well a head likes the image.

Scores lie beside the index in files of their own, a row for each image that could be read, under the key of its index
row. A folder of them belongs to one set of weights. So an image is scored once, and a changed limit reads none.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from model.weights import fingerprint as weights_fingerprint
from pipelines.images import DECODE_ERRORS, UNREADABLE_ERRORS, content_id, decode_reduced
from pipelines.originals import Originals
from pipelines.preprocess.config import ScoringConfig
from pipelines.preprocess.measure import READ_THREADS, without_place
from pipelines.preprocess.write import FAILURE, UNIT, timed
from pipelines.schema import PLACE, SCHEMA_VERSION, Column
from pipelines.sources import local_copy
from pipelines.storage import StorageOptions

ASKED = [  # columns of index rows that scoring asks for
    Column.KEY,
    Column.ID,
    Column.SOURCE,
    Column.PATH,
    *(field.name for field in PLACE),
    Column.FILE_SIZE,
    Column.CAPTIONS,
    Column.REJECT_REASON,
]
SCORES = {Column.CLIP_SIMILARITY: pa.float32(), Column.AESTHETIC_SCORE: pa.float32(), FAILURE: pa.string()}
LOCAL_WEIGHTS = "open_clip_model.safetensors"  # what open_clip calls the weights in a folder
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # open_clip's names


class Scorer:
    """One actor of the scoring stage: the CLIP model and the head on one device."""

    def __init__(self, config: ScoringConfig, originals: Originals, max_pixels: int, options: StorageOptions) -> None:
        if config.resources.gpus:
            self._device = torch.device("cuda")
        else:
            self._device = torch.device("cpu")
            torch.set_num_threads(max(1, int(config.resources.cpus)))
        self._config, self._originals, self._max_pixels = config, originals, max_pixels
        self._model, self._prepare = clip(config, options, self._device)
        self._dtype = getattr(torch, config.dtype)
        aesthetic = head(config, options, self._model.visual.output_dim)
        self._head = None if aesthetic is None else aesthetic.to(self._device)
        self._tokenize = open_clip.get_tokenizer(config.model)
        size = self._model.visual.image_size
        self._side = max(size) if isinstance(size, tuple) else size

    @timed("score")
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Index rows -> rows of scores; an image that cannot be read any more has a reason in place of them."""
        groups = [rows.slice(start, self._config.batch) for start in range(0, rows.num_rows, self._config.batch)]
        scored: list[dict[str, list[Any]]] = []
        with ThreadPoolExecutor(READ_THREADS) as pool:
            ahead: list[list[Future[Tensor | str]]] = []
            for group in [*groups, rows.slice(0, 0)]:  # one is decoded while the one before it is scored
                ahead.append([pool.submit(self._image, row) for row in group.to_pylist()])
                if len(ahead) > 1:
                    images = [image.result() for image in ahead.pop(0)]
                    scored.append(self._score(groups[len(scored)].column(Column.CAPTIONS).to_pylist(), images))
        table = rows.select(
            [Column.KEY, Column.SOURCE, Column.PATH, *(n for n in rows.column_names if n.startswith(UNIT))]
        )
        for name, kind in SCORES.items():
            table = table.append_column(name, pa.array([value for part in scored for value in part[name]], kind))
        return table

    def _image(self, row: dict[str, Any]) -> Tensor | str:
        """The image as the model takes it, or why it cannot be read."""
        try:
            data = self._originals.read(row)
            if content_id(data) != row[Column.ID]:
                return "the file has changed since it was indexed"
            return self._prepare(decode_reduced(data, self._max_pixels, (self._side, self._side))[0])
        except (*UNREADABLE_ERRORS, *DECODE_ERRORS) as error:
            return without_place(error, self._originals, row[Column.SOURCE])

    @torch.no_grad()
    def _score(self, captions: list[list[str] | None], images: list[Tensor | str]) -> dict[str, list[Any]]:
        """The columns of SCORES, for the captions of each image and images of which some may be missing."""
        found: dict[str, list[Any]] = {name: [None] * len(images) for name in SCORES}
        found[FAILURE] = [image if isinstance(image, str) else None for image in images]
        there = [place for place, image in enumerate(images) if isinstance(image, Tensor)]
        if not there:
            return found
        pixels = torch.stack([images[place] for place in there]).to(self._device, self._dtype)  # type: ignore[misc]
        embedding = F.normalize(self._model.encode_image(pixels).float(), dim=-1)  # [N,D]
        if self._head is not None:
            self._record(found, Column.AESTHETIC_SCORE, there, self._head(embedding)[:, 0].cpu().numpy())
        told = [(number, text) for number, place in enumerate(there) for text in captions[place] or () if text.strip()]
        if told:
            numbers = [number for number, _ in told]
            tokens = self._tokenize([text for _, text in told]).to(self._device)
            text = F.normalize(self._model.encode_text(tokens).float(), dim=-1)
            best = np.full(len(images), -np.inf)  # of each image's captions
            np.maximum.at(
                best, [there[number] for number in numbers], (embedding[numbers] * text).sum(-1).cpu().numpy()
            )
            described = sorted({there[number] for number in numbers})
            self._record(found, Column.CLIP_SIMILARITY, described, best[described])
        return found

    def _record(self, found: dict[str, list[Any]], name: str, places: list[int], values: np.ndarray) -> None:
        for place, value in zip(places, values.tolist(), strict=True):
            if math.isfinite(value):
                found[name][place] = value
            else:
                found[FAILURE][place] = f"{name} is not finite in {self._config.dtype}"


def fingerprint(config: ScoringConfig, options: StorageOptions) -> dict[str, Any]:
    """What scores depend on besides image and caption. Raises where the weights are missing or do not fit."""
    model, prepare = clip(config, options, torch.device("cpu"))
    aesthetic = head(config, options, model.visual.output_dim)
    return {
        "schema": SCHEMA_VERSION,
        "model": config.model if "/" not in config.model else "",  # no dataset names a place
        "clip": weights_fingerprint(model),
        "prepare": repr(prepare),
        "head": None if aesthetic is None else weights_fingerprint(aesthetic),
        "dtype": config.dtype,
    }


def clip(
    config: ScoringConfig, options: StorageOptions, device: torch.device
) -> tuple[Any, Callable[[Image.Image], Tensor]]:
    """open_clip's model, and what brings an image to it. Raises FileNotFoundError, or what open_clip does, where the
    weights are missing or do not fit."""
    folder = config.model.removeprefix("local-dir:")
    if folder != config.model and not config.allow_pickle and not os.path.exists(f"{folder}/{LOCAL_WEIGHTS}"):
        raise FileNotFoundError(
            f"scoring.model: there is no {folder}/{LOCAL_WEIGHTS}; set scoring.allow_pickle for others"
        )
    with local_copy(config.weights, options) if config.weights is not None else nullcontext() as weights:
        model, prepare = open_clip.create_model_from_pretrained(
            config.model, pretrained=weights, precision=PRECISIONS[config.dtype], device=device
        )
    return model.eval().requires_grad_(False), prepare


def head(config: ScoringConfig, options: StorageOptions, width: int) -> nn.Linear | None:
    """The aesthetic head. Raises ValueError, with what the file has, where that is no linear one for the model."""
    if config.aesthetic_head is None:
        return None
    with local_copy(config.aesthetic_head, options) as path:
        state = load_file(path)
    shapes = {name.rpartition(".")[2]: tuple(tensor.shape) for name, tensor in state.items()}
    if len(state) != len(shapes) or shapes not in ({"weight": (1, width)}, {"weight": (1, width), "bias": (1,)}):
        there = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
        raise ValueError(
            f"scoring.aesthetic_head: {config.aesthetic_head} has {there}; a weight [1, {width}] and a bias [1] were "
            f"expected, of one linear layer on the image embedding of {config.model}"
        )
    layer = nn.Linear(width, 1, bias="bias" in shapes)
    layer.load_state_dict({name.rpartition(".")[2]: tensor.float() for name, tensor in state.items()})
    return layer.requires_grad_(False)
