"""Kept images -> latents rows: crop to the bucket on CPUs, encode image and caption where the networks are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.config import CONTEXT_LENGTH
from model.finite import NotFiniteError
from model.text import tokenize
from model.vae import VAE, Posterior
from pipelines import networks
from pipelines.captions import in_lists, out_of_lists
from pipelines.config import CropConfig, Size, TextWeightsConfig, WeightsConfig
from pipelines.images import DECODE_ERRORS, UNREADABLE_ERRORS, content_id, read_crop
from pipelines.originals import Originals
from pipelines.preprocess.config import EncodeConfig
from pipelines.preprocess.measure import map_rows, without_place
from pipelines.preprocess.quarantine import decoding
from pipelines.preprocess.write import FAILURE, UNIT, timed
from pipelines.schema import PAIR, Column, latents_schema, tensor_column
from pipelines.storage import StorageOptions

PIXELS = "pixels"  # uint8 [height, width, 3] of the bucket, as fixed-size bytes


@timed("crop")
def crop_images(
    rows: pa.Table,
    originals: Originals,
    crop: CropConfig,
    max_pixels: int,
    attempt: Callable[[], int] | None = None,
) -> pa.Table:
    """Index rows of one bucket, with pixels, crop_top_left, target_size and flip, or the failure.

    `attempt` says how often this task's process has died before (preprocess/quarantine.py).
    """
    height, width = rows.column(Column.BUCKET)[0].as_py()
    schema = rows.schema
    for field in (
        pa.field(Column.CROP_TOP_LEFT, PAIR),
        pa.field(Column.TARGET_SIZE, PAIR),
        pa.field(Column.FLIP, pa.bool_()),
        pa.field(PIXELS, pa.binary(height * width * 3)),
        pa.field(FAILURE, pa.string()),
    ):
        schema = schema.append(field)

    def row(values: dict[str, Any]) -> dict[str, Any]:
        try:
            data = originals.read(values)
        except UNREADABLE_ERRORS as error:
            return values | {FAILURE: without_place(error, originals, values[Column.SOURCE])}
        if content_id(data) != values[Column.ID]:
            return values | {FAILURE: "the file has changed since it was indexed"}
        try:
            pixels, top_left, flip = call(read_crop, data, (height, width), crop, values[Column.ID], max_pixels)
        except DECODE_ERRORS as error:
            return values | {FAILURE: f"{type(error).__name__}: {error}"}
        return values | {
            PIXELS: pixels.tobytes(),
            Column.CROP_TOP_LEFT: top_left,
            Column.TARGET_SIZE: (height, width),
            Column.FLIP: flip,
        }

    with decoding(attempt and attempt(), max_pixels) as call:
        return map_rows(row, rows, schema)


class Encoder:
    """One actor of the encode stage: the VAE and both text encoders on one device."""

    def __init__(
        self, vae: WeightsConfig, text: TextWeightsConfig, config: EncodeConfig, options: StorageOptions
    ) -> None:
        if config.resources.gpus:
            self.device = torch.device("cuda")
        else:
            self.device = torch.device("cpu")
            torch.set_num_threads(max(1, int(config.resources.cpus)))
        self.config = config
        dtype = getattr(torch, config.dtype)
        self.vae = networks.vae(vae, options, dtype, self.device).eval().requires_grad_(False)
        self.text = networks.text_encoders(text, options, dtype, self.device)
        self.text_config = networks.text_config(text)

    @timed("encode")
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows with pixels and captions -> latents rows; failed rows pass through with their reason."""
        good = rows.filter(pc.is_null(rows.column(FAILURE)))
        failed = rows.filter(pc.is_valid(rows.column(FAILURE)))
        height, width = rows.column(Column.BUCKET)[0].as_py()
        mean, std = self._encode_images(good.column(PIXELS), (height, width))
        places, captions = out_of_lists(good.column(Column.CAPTIONS))
        context, pooled = self._encode_captions(captions.to_pylist())
        schema = latents_schema(mean.shape[1:], context.shape[1:], pooled.shape[1:])
        unit = [name for name in rows.column_names if name.startswith(UNIT)]
        for name in (Column.SOURCE, Column.PATH, FAILURE, *unit):
            schema = schema.append(rows.schema.field(name))

        finite = np.ones(good.num_rows, bool)
        rows_of = np.arange(good.num_rows)
        for array, row in ((mean, rows_of), (std, rows_of), (context, places), (pooled, places)):
            finite[row[~np.isfinite(array).all(tuple(range(1, array.ndim)))]] = False
        reason = f"not finite in {self.config.dtype}"
        if self.config.dtype == "float16":
            reason += "; set encode.dtype to bfloat16 or float32"
        reasons = pa.array([None if ok else reason for ok in finite], pa.string())

        made: dict[str, pa.Array] = {
            Column.LATENT_MEAN: tensor_column(mean),
            Column.LATENT_STD: tensor_column(std),
            FAILURE: reasons,
        }
        for name, array in ((Column.CONTEXT, context), (Column.POOLED, pooled)):
            made[name] = in_lists(good.num_rows, places, tensor_column(array), schema.field(name).type)
        arrays = [
            made[field.name] if field.name in made else good.column(field.name).cast(field.type) for field in schema
        ]
        table = pa.Table.from_arrays(arrays, schema=schema)
        return pa.concat_tables([table, _without_tensors(failed, schema)]) if failed.num_rows else table

    def _encode_images(self, pixels: pa.ChunkedArray, bucket: Size) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and std, each float16 [N, 4, h, w]."""
        height, width = bucket
        down = self.vae.config.downsample
        empty = np.empty((0, self.vae.config.latent_channels, height // down, width // down), np.float16)
        means, stds = [empty], [empty]
        for batch in _batches(pixels.to_pylist(), self.config.batch):
            uint8 = np.frombuffer(b"".join(batch), np.uint8).reshape(len(batch), height, width, 3)
            posterior = encode_image(self.vae, torch.from_numpy(uint8.copy()).to(self.device))
            means.append(posterior.mean.to(torch.float16).cpu().numpy())
            stds.append(posterior.std.to(torch.float16).cpu().numpy())
        return np.concatenate(means), np.concatenate(stds)

    def _encode_captions(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Context [M, 77, channels] and pooled [M, channels], float16; each distinct caption is encoded once."""
        distinct = sorted(set(captions))
        contexts = [np.empty((0, CONTEXT_LENGTH, self.text_config.context_dim), np.float16)]
        pooled = [np.empty((0, self.text_config.pooled_dim), np.float16)]
        for batch in _batches(distinct, self.config.text_batch):
            features = self.text(tokenize(batch, self.text_config).to(self.device))
            contexts.append(features.context.to(torch.float16).cpu().numpy())
            pooled.append(features.pooled.to(torch.float16).cpu().numpy())
        position = {caption: row for row, caption in enumerate(distinct)}
        rows = np.array([position[caption] for caption in captions], np.int64)
        return np.concatenate(contexts)[rows], np.concatenate(pooled)[rows]


@torch.no_grad()
def encode_image(vae: VAE, pixels: torch.Tensor) -> Posterior:
    """uint8 [B, H, W, 3] -> the VAE's posterior; NaN for the images that overflow in float16, which fails their row."""
    image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W]
    try:
        return vae.encode(image)
    except NotFiniteError as error:
        fits = torch.ones(len(image), dtype=torch.bool)
        fits[list(error.samples)] = False
    mean = image.new_full(
        (len(image), vae.config.latent_channels, *(side // vae.config.downsample for side in image.shape[2:])),
        float("nan"),
    )
    std = mean.clone()
    if fits.any():
        rest = encode_image(vae, pixels[fits.to(pixels.device)])
        mean[fits.to(mean.device)], std[fits.to(std.device)] = rest.mean, rest.std
    return Posterior(mean=mean, std=std)


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _without_tensors(failed: pa.Table, schema: pa.Schema) -> pa.Table:
    """Failed rows in the schema of finished ones; they are reported and never stored, so any value will do."""
    arrays = []
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type):
            arrays.append(pa.array([bytes(field.type.byte_width)] * failed.num_rows, field.type))
        elif field.name in (Column.CONTEXT, Column.POOLED):
            arrays.append(pa.array([[]] * failed.num_rows, field.type))
        elif field.name in failed.column_names:
            arrays.append(failed.column(field.name).cast(field.type))
        else:
            arrays.append(pa.nulls(failed.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=schema.remove_metadata())
