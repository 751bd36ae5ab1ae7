"""What preprocessing costs a core, for pipelines/capacity.py: CPU seconds per image and per megapixel of its file.

Two sizes of JPEG give the line through both. CPU time and not wall time, since it does not depend on what else runs.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.config import CropConfig
from pipelines.images import content_id, crop_pixels, decode, draw_crop, header_size
from pipelines.preprocess.measure import looks
from pipelines.preprocess.pipeline import INDEX_COMPRESSION
from pipelines.preprocess.write import write_rows
from pipelines.schema import INDEX_SCHEMA, Column
from pipelines.storage import Storage

ROUNDS, IMAGES, QUALITY, INDEX_ROWS = 5, 2, 90, 1024
SIZES = ((1024, 1024), (3000, 4000))  # (height, width) in pixels
BUCKET, MAX_PIXELS = (1024, 1024), 200_000_000


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG with the spectrum of photographs, about 1/f."""
    height, width = size
    draws = np.random.Generator(np.random.PCG64(seed)).standard_normal((height, width, 3)).astype(np.float32)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = np.fft.rfft2(draws, axes=(0, 1)) / np.maximum(frequency, 1 / width)[..., None]
    pixels = np.fft.irfft2(spectrum, (height, width), axes=(0, 1))
    pixels = (pixels - pixels.mean()) / pixels.std() * 50 + 128
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def index(data: bytes) -> None:
    content_id(data)
    header_size(data)
    looks(decode(data, MAX_PIXELS))


def crop(data: bytes) -> None:
    name = content_id(data)
    image = decode(data, MAX_PIXELS)
    top_left, flip = draw_crop((image.height, image.width), BUCKET, CropConfig(), name)
    crop_pixels(image, BUCKET, top_left, flip)


def seconds(work: Callable[[bytes], None], files: list[bytes]) -> list[float]:
    rounds = []
    for _ in range(ROUNDS + 1):
        begun = time.process_time()
        for data in files:
            work(data)
        rounds.append((time.process_time() - begun) / len(files))
    return rounds[1:]


def test_a_core(tmp_path: Path) -> None:
    files = {size: [photograph(size, seed) for seed in range(IMAGES)] for size in SIZES}
    print()
    for work in (index, crop):
        medians = []
        for size in SIZES:
            found = seconds(work, files[size])
            medians.append(statistics.median(found))
            kilobytes = statistics.mean(len(data) for data in files[size]) / 1000
            print(
                f"{work.__name__} {size[0]} x {size[1]}, {kilobytes:.0f} kB: {1000 * medians[-1]:.1f} ms "
                f"({1000 * min(found):.1f} to {1000 * max(found):.1f})"
            )
        small, large = (height * width / 1e6 for height, width in SIZES)
        slope = (medians[1] - medians[0]) / (large - small)
        print(f"{work.__name__}: {medians[0] - slope * small:.5f} s per image + {slope:.5f} s per megapixel")


def test_a_row_of_the_index(tmp_path: Path) -> None:
    values = {
        Column.KEY: "0" * 32,
        Column.ID: "0" * 32,
        Column.PATH: "folder/0000000000.jpg",
        Column.CAPTIONS: [
            "a caption of about a hundred characters, as they are found beside pictures on the web today"
        ],
        Column.ORIGINAL_SIZE: [1024, 1024],
        Column.BUCKET: [1024, 1024],
        Column.FILE_SIZE: 300_000,
    }
    draws = np.random.Generator(np.random.PCG64(0))
    rows = []
    for _ in range(INDEX_ROWS):
        caption = "".join(chr(97 + k) for k in draws.integers(0, 26, 100))
        told = {Column.KEY: draws.bytes(16).hex(), Column.ID: draws.bytes(16).hex(), Column.CAPTIONS: [caption]}
        row = dict.fromkeys(INDEX_SCHEMA.names) | values | told
        empty = {
            field.name: "images" if pa.types.is_string(field.type) else 0
            for field in INDEX_SCHEMA
            if not field.nullable and row[field.name] is None
        }
        rows.append(row | empty)
    write_rows(pa.Table.from_pylist(rows, INDEX_SCHEMA), Storage(str(tmp_path)), "rows.parquet", INDEX_COMPRESSION)
    print(f"\nindex: {(tmp_path / 'rows.parquet').stat().st_size / INDEX_ROWS:.0f} bytes per row")
