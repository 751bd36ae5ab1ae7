"""Images that tests make, and their pixels."""

import io

import numpy as np
from PIL import Image

from pipelines.images import decode

MAX_PIXELS = 10_000_000


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data, MAX_PIXELS)
    assert image.mode == "RGB"
    return np.asarray(image)


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shapes with edges, fine lines and noise, as a photograph has them."""
    coarse = Image.fromarray(noise(9, 12, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)
    lines = 40 * (np.add.outer(np.arange(height), np.arange(width)) // 7 % 2)[..., None]
    grain = noise(height, width, seed=seed) // 16
    return Image.fromarray(np.clip(np.asarray(coarse) * 0.75 + lines + grain, 0, 255).astype(np.uint8))
