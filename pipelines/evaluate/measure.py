"""Figures of many pictures through Ray Data: FID, CLIP score, and how near a VAE's reconstructions are."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from model.metrics import Moments, psnr, ssim
from pipelines import networks
from pipelines.config import CropConfig, StageResources
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.features import CLIPScore, Inception
from pipelines.images import content_id, read_crop
from pipelines.originals import Originals
from pipelines.pictures import to_pixels
from pipelines.progress import progress
from pipelines.schema import PLACE
from pipelines.stages import actors, dataset_of
from pipelines.storage import StorageOptions

NUMBER, PICTURE = "number", "picture"
SCHEMA = pa.schema(
    {
        NUMBER: pa.int64(),
        "source": pa.string(),  # the image's source
        "path": pa.string(),  # its name there
        **{field.name: field.type for field in PLACE},
        "file_size": pa.int64(),
        "id": pa.string(),  # its content's id; null for a picture that was made
        "size": pa.list_(pa.int64()),  # (height, width) that its middle is cut to, pixels
        "caption": pa.string(),
    }
)
FEATURES = "features"  # beginning of the columns that go into moments; all other columns are averaged
MIDDLE = CropConfig(placement="center")


@dataclass
class Measured:
    """What is known of many pictures."""

    count: int = 0
    """Pictures."""
    means: dict[str, float] = field(default_factory=dict)
    """Means over the pictures, by figure."""
    moments: dict[str, Moments] = field(default_factory=dict)
    """Of Inception's features, by column."""
    shown: list[bytes] = field(default_factory=list)
    """The first pictures as PNG, where the stage gives them."""


def measured(
    stage: Any, arguments: tuple[Any, ...], rows: Sequence[Mapping[str, Any]], config: EvaluateConfig
) -> Measured:
    """What the actors of class `stage` say of all rows. Raises RuntimeError where they have lost one."""
    table = pa.Table.from_pylist([{NUMBER: number, **row} for number, row in enumerate(rows)], SCHEMA)
    parts = [table.slice(start, config.batch) for start in range(0, len(rows), config.batch)]
    results = dataset_of(parts).map_batches(stage, fn_constructor_args=(config, *arguments), **actors(config.resources))
    found, sums = Measured(), defaultdict[str, float](float)
    shown: dict[int, bytes] = {}
    with progress("evaluate", len(rows)) as bar:
        for part in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            assert isinstance(part, pa.Table)
            for name in part.column_names:
                column = part.column(name)
                if name == PICTURE:
                    pairs = zip(part.column(NUMBER).to_pylist(), column.to_pylist(), strict=True)
                    shown.update({number: png for number, png in pairs if png is not None})
                elif name.startswith(FEATURES):
                    features = torch.tensor(np.frombuffer(b"".join(column.to_pylist()), np.float32))
                    features = features.view(part.num_rows, -1)  # [N,D]
                    found.moments.setdefault(name, Moments(features.shape[1])).add(features)
                elif name != NUMBER:
                    sums[name] += float(np.sum(column.to_numpy(), dtype=np.float64))
            found.count += part.num_rows
            bar.update(part.num_rows)
    if found.count != len(rows):
        raise RuntimeError(f"{found.count} of {len(rows)} pictures came back")
    found.means = {name: total / found.count for name, total in sums.items()}
    found.shown = [shown[number] for number in sorted(shown)]
    return found


class MeasurePictures:
    """One actor: Inception's features, and the CLIP score with the caption."""

    def __init__(self, config: EvaluateConfig, options: StorageOptions, pictures: Originals, max_pixels: int) -> None:
        """`pictures` is where rows' files are."""
        device = _device(config.resources)
        self._pictures, self._max_pixels = pictures, max_pixels
        self._inception = Inception(config.inception, options, device) if config.inception else None
        self._clip = CLIPScore(config.clip, options, device) if config.clip else None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The figures of each row."""
        pixels = [_read(self._pictures, row, self._max_pixels) for row in rows.to_pylist()]
        columns: dict[str, Any] = {NUMBER: rows.column(NUMBER)}
        if self._inception is not None:
            columns[FEATURES] = _packed(self._inception(pixels))
        if self._clip is not None:
            columns["clip_score"] = self._clip(pixels, rows.column("caption").to_pylist()).numpy()
        return pa.table(columns)


class MeasureReconstructions:
    """One actor: a VAE, and how its reconstructions differ from the images. Both are measured as 8-bit pictures."""

    def __init__(
        self, config: EvaluateConfig, options: StorageOptions, images: Originals, max_pixels: int, path: str
    ) -> None:
        """`images` is where rows' files are; `path` is that of the VAE's weights."""
        assert config.reconstruct is not None
        self._config, self._images, self._max_pixels = config, images, max_pixels
        self._device = _device(config.resources)
        self._vae = networks.vae(replace(config.reconstruct.vae, path=path), options, device=self._device).eval()
        self._inception = Inception(config.inception, options, self._device) if config.inception else None
        self._lpips = networks.lpips(config.lpips, options).to(self._device) if config.lpips else None

    @torch.no_grad()
    def __call__(self, rows: pa.Table) -> pa.Table:
        """The figures of each row, and both pictures of the first ones, side by side."""
        pixels = np.stack([_read(self._images, row, self._max_pixels) for row in rows.to_pylist()])
        image = torch.from_numpy(pixels).to(self._device).permute(0, 3, 1, 2).float() / 127.5 - 1  # [B,3,H,W]
        # The posterior's mean: no noise enters.
        made = to_pixels(self._vae.decode(self._vae.encode(image).mean))  # [B,H,W,3]
        reconstruction = torch.from_numpy(made).to(image).permute(0, 3, 1, 2) / 127.5 - 1  # [B,3,H,W]
        columns: dict[str, Any] = {
            NUMBER: rows.column(NUMBER),
            "psnr": psnr(image, reconstruction).cpu().numpy(),
            "ssim": ssim(image, reconstruction).cpu().numpy(),
        }
        if self._lpips is not None:
            columns["lpips"] = self._lpips(image, reconstruction).cpu().numpy()
        if self._inception is not None:
            columns[f"{FEATURES}_real"] = _packed(self._inception(list(pixels)))
            columns[f"{FEATURES}_made"] = _packed(self._inception(list(made)))
        both = [np.concatenate(pair) for pair in zip(pixels, made, strict=True)]
        numbers = rows.column(NUMBER).to_pylist()
        columns[PICTURE] = pa.array(
            [png(pair) if number < self._config.shown else None for number, pair in zip(numbers, both, strict=True)],
            pa.binary(),
        )
        return pa.table(columns)


def png(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def _read(pictures: Originals, row: Mapping[str, Any], max_pixels: int) -> np.ndarray:
    """The middle of a row's picture, uint8 [H, W, 3] of its size."""
    try:
        data = pictures.read(row)
        if row["id"] is not None and content_id(data) != row["id"]:
            raise ValueError("its bytes have changed since it was indexed")
        height, width = row["size"]
        return np.ascontiguousarray(read_crop(data, (height, width), MIDDLE, "", max_pixels)[0])
    except Exception as error:
        raise RuntimeError(f"{row['source']}:{row['path']} cannot be measured: {error}") from error


def _packed(features: torch.Tensor) -> pa.Array:
    """Features [N,D] in fp32 as a column of bytes."""
    return pa.array([row.tobytes() for row in features.numpy()], pa.binary())


def _device(resources: StageResources) -> torch.device:
    if not resources.gpus:
        torch.set_num_threads(max(1, int(resources.cpus)))
    return torch.device("cuda" if resources.gpus else "cpu")
