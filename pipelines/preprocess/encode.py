"""Crops -> latents rows, where the networks are: the VAE encodes pixels, both text towers encode captions."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from model.config import CONTEXT_LENGTH, TextConfig
from model.finite import NotFiniteError
from model.text import tokenize
from model.tiling import encode_tiled
from model.vae import VAE, Posterior
from pipelines import networks
from pipelines.captions import in_lists, out_of_lists
from pipelines.config import OVERLAPS_PER_TILE, Size, TextWeightsConfig, WeightsConfig
from pipelines.latents import OF_CAPTIONS
from pipelines.preprocess.config import EncodeConfig
from pipelines.preprocess.crop import PIXELS
from pipelines.preprocess.write import FAILURE, PAGE_BYTES, UNIT, UNIT_COUNT, timed
from pipelines.schema import Column, latents_schema, tensor_column
from pipelines.storage import StorageOptions

SLOTS, SLOTS_FILLED = "vae_slots", "vae_slots_filled"  # places in passes of the VAE, and those that had an image
CAPTIONS, CAPTIONS_ENCODED = "captions", "captions_encoded"  # captions of all rows, and those that the towers ran on


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
        if config.text == "embeddings":
            self.text = networks.text_encoders(text, options, dtype, self.device)
        self.text_config = networks.text_config(text)
        self.known: OrderedDict[str, tuple[np.ndarray, np.ndarray]] = OrderedDict()  # text of captions, latest last

    @timed("encode")
    def __call__(self, rows: pa.Table) -> pa.Table:
        """Rows with pixels and captions -> latents rows; failed rows pass through with their reason."""
        self.counts: Counter[str] = Counter()
        good = rows.filter(pc.is_null(rows.column(FAILURE)))
        failed = rows.filter(pc.is_valid(rows.column(FAILURE)))
        height, width = rows.column(Column.BUCKET)[0].as_py()
        mean, std = self._encode_images(good.column(PIXELS), (height, width))
        places, captions = out_of_lists(good.column(Column.CAPTIONS))  # the row of each caption, and the caption
        texts = (self._tokens if self.config.text == "tokens" else self._encode_captions)(captions.to_pylist())
        finite = _finite(mean) & _finite(std)
        for tensors in texts.values():
            finite[places[~_finite(tensors)]] = False

        embeddings = () if Column.TOKENS in texts else (tensors.shape[1:] for tensors in texts.values())
        schema = latents_schema(mean.shape[1:], *embeddings)
        for name in rows.column_names:
            if name in (Column.SOURCE, Column.PATH, FAILURE) or name.startswith(UNIT):
                schema = schema.append(rows.schema.field(name))
        made: dict[str, pa.Array] = {
            Column.LATENT_MEAN: tensor_column(mean),
            Column.LATENT_STD: tensor_column(std),
            FAILURE: pa.array([None if ok else self._not_finite() for ok in finite], pa.string()),
        }
        for column, tensors in texts.items():
            values = tensor_column(tensors, tensors.dtype.type)
            made[column] = in_lists(good.num_rows, places, values, schema.field(column).type)
        arrays = [
            made[field.name] if field.name in made else good.column(field.name).cast(field.type) for field in schema
        ]
        table = pa.Table.from_arrays(arrays, schema=schema)
        if failed.num_rows:
            table = pa.concat_tables([table, _without_tensors(failed, schema)])
        for name, count in self.counts.items():  # of all rows together, so the first has it
            table = table.append_column(f"{UNIT_COUNT}{name}", pa.array([count] + [0] * (table.num_rows - 1)))
        return table

    def _not_finite(self) -> str:
        reason = f"not finite in {self.config.dtype}"
        if self.config.dtype == "float16":
            reason += "; set encode.dtype to bfloat16 or float32"
        return reason

    def _encode_images(self, pixels: pa.ChunkedArray, bucket: Size) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and std, each float16 [N, 4, h, w]."""
        height, width = bucket
        down = self.vae.config.downsample
        empty = np.empty((0, self.vae.config.latent_channels, height // down, width // down), np.float16)
        means, stds = [empty], [empty]
        for batch in _batches(pixels.to_pylist(), self.config.batch):
            uint8 = np.frombuffer(b"".join(batch), np.uint8).reshape(len(batch), height, width, 3)
            posterior = encode_image(self.vae, torch.from_numpy(uint8.copy()).to(self.device), self.config.tile)
            self.counts += {SLOTS: self.config.batch, SLOTS_FILLED: len(batch)}
            means.append(posterior.mean.to(torch.float16).cpu().numpy())
            stds.append(posterior.std.to(torch.float16).cpu().numpy())
        return np.concatenate(means), np.concatenate(stds)

    def _encode_captions(self, captions: list[str]) -> dict[Column, np.ndarray]:
        """Context [M, 77, channels] and pooled [M, channels], float16; what is known already is not encoded again."""
        new = sorted(set(captions) - self.known.keys())
        for batch in _batches(new, self.config.text_batch):
            features = self.text(tokenize(batch, self.text_config).to(self.device))
            contexts, pools = features.context.to(torch.float16).cpu(), features.pooled.to(torch.float16).cpu()
            for caption, context, pooled in zip(batch, contexts.numpy(), pools.numpy(), strict=True):
                self.known[caption] = context.copy(), pooled.copy()  # a view would keep all of its batch
        self.counts += {CAPTIONS: len(captions), CAPTIONS_ENCODED: len(new)}
        all_contexts = np.empty((len(captions), CONTEXT_LENGTH, self.text_config.context_dim), np.float16)
        all_pooled = np.empty((len(captions), self.text_config.pooled_dim), np.float16)
        for place, caption in enumerate(captions):
            all_contexts[place], all_pooled[place] = self.known[caption]
            self.known.move_to_end(caption)
        while len(self.known) > self.config.kept_captions:
            self.known.popitem(last=False)
        return {Column.CONTEXT: all_contexts, Column.POOLED: all_pooled}

    def _tokens(self, captions: list[str]) -> dict[Column, np.ndarray]:
        """Ids of the tokens of each tower, uint16 [M, 2, 77]; no network is run."""
        self.counts += {CAPTIONS: len(captions)}
        tokens = tokenize(captions, self.text_config)
        return {Column.TOKENS: torch.stack([tokens.clip_l, tokens.bigg], dim=1).numpy().astype(np.uint16)}


def checked(blocks: Iterable[pa.Table], text: TextConfig) -> Iterator[pa.Table]:
    """The same blocks. Raises ValueError at one with captions whose text does not fit one page, in which loaders look
    for it."""
    of_caption = 2 * CONTEXT_LENGTH * text.context_dim
    for block in blocks:
        count, rows = len(out_of_lists(block.column(Column.CAPTIONS))[0]), block.num_rows
        if count * of_caption > PAGE_BYTES:
            raise ValueError(
                f"encode.rows_per_file: {rows} images with {count} captions of {of_caption} bytes do not fit a file's "
                f"page of {PAGE_BYTES}; set it to {max(1, rows * PAGE_BYTES // (count * of_caption))} or less"
            )
        yield block


@torch.no_grad()
def encode_image(vae: VAE, pixels: torch.Tensor, tile: int | None = None) -> Posterior:
    """uint8 [B, H, W, 3] -> the VAE's posterior; NaN for the images that overflow in float16, which fails their row.

    Images of a larger area than `tile` x `tile` are encoded in tiles of that side; None encodes all whole.
    """
    image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W]
    try:
        return encode_tiled(vae, image, tile, tile // OVERLAPS_PER_TILE) if tile else vae.encode(image)
    except NotFiniteError as error:
        fits = torch.ones(len(image), dtype=torch.bool)
        fits[list(error.samples)] = False
    mean = image.new_full(
        (len(image), vae.config.latent_channels, *(side // vae.config.downsample for side in image.shape[2:])),
        float("nan"),
    )
    std = mean.clone()
    if fits.any():
        rest = encode_image(vae, pixels[fits.to(pixels.device)], tile)
        mean[fits.to(mean.device)], std[fits.to(std.device)] = rest.mean, rest.std
    return Posterior(mean=mean, std=std)


def _finite(tensors: np.ndarray) -> np.ndarray:
    """Which of tensors [N, ...] have finite values only."""
    return np.isfinite(tensors).all(tuple(range(1, tensors.ndim)))


def _batches(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _without_tensors(failed: pa.Table, schema: pa.Schema) -> pa.Table:
    """Failed rows in the schema of finished ones; they are reported and never stored, so any value will do."""
    arrays = []
    for field in schema:
        if pa.types.is_fixed_size_binary(field.type):
            arrays.append(pa.array([bytes(field.type.byte_width)] * failed.num_rows, field.type))
        elif field.name in OF_CAPTIONS:
            arrays.append(pa.array([[]] * failed.num_rows, field.type))
        elif field.name in failed.column_names:
            arrays.append(failed.column(field.name).cast(field.type))
        else:
            arrays.append(pa.nulls(failed.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=schema.remove_metadata())
