"""Files to pixels beside a plain Pillow loop, and looking at headers first beside decoding first.

Sides take turns in one process. Each line gives the median of the rounds, and their minimum and maximum; the ratio is
that of the medians. One image after another is measured in CPU time, which other programs disturb least; several at a
time by the clock. The pictures are drawn, with edges, lines and grain: JPEG at quality 90.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines.config import CropConfig, Size
from pipelines.images import decode, decode_reduced, draw_crop, fit, header_size, read_crop
from pipelines.preprocess.measure import looks

ROUNDS, LIMIT = 5, 10**9
IMAGES, SHRINK = 24, 1  # most of them at a time, and what their sides are divided by
CROP = CropConfig()
pytestmark = pytest.mark.usefixtures("one_thread")  # as in the tasks of a stage, which have a core each


def shrunk(size: Size) -> Size:
    return size[0] // SHRINK, size[1] // SHRINK


def photographs(size: Size, count: int) -> list[bytes]:
    return [photograph(*shrunk(size), seed) for seed in range(min(count, IMAGES))]


def photograph(height: int, width: int, seed: int = 0) -> bytes:
    draws = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(draws.integers(0, 256, (height // 100, width // 100, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32) * 0.75
    pixels += 40 * (np.add.outer(np.arange(height), np.arange(width)) // 9 % 2)[..., None]
    pixels += draws.normal(0, 6, (height, width, 1)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def pillow(data: bytes, bucket: Size, draw_id: str = "") -> np.ndarray:
    """What a plain loop does: decode, convert, resize with Lanczos, crop."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = fit((image.height, image.width), bucket)
    (top, left), _ = draw_crop((image.height, image.width), bucket, CROP, draw_id)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)[top : top + bucket[0], left : left + bucket[1]]


def ours(data: bytes, bucket: Size, draw_id: str = "") -> np.ndarray:
    return read_crop(data, bucket, CROP, draw_id, LIMIT)[0]


def turns(
    sides: dict[str, Callable[[], object]], clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each round; the first warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, run in sides.items():
            begun = clock()
            run()
            found[name].append(clock() - begun)
    return {name: values[1:] for name, values in found.items()}


def show(title: str, found: dict[str, list[float]], images: int) -> None:
    print(f"\n{title}")
    base = statistics.median(next(iter(found.values())))
    for name, values in found.items():
        milliseconds = [1e3 * value / images for value in (statistics.median(values), min(values), max(values))]
        middle, least, most = milliseconds
        ratio = base / statistics.median(values)
        print(f"  {name:<44} {middle:8.1f} ms an image  ({least:.1f} to {most:.1f})  {ratio:5.2f}")


@pytest.mark.parametrize(
    ("title", "size", "bucket", "count", "most"),
    [
        ("C1: 12 MP to 896 x 1152", (3000, 4000), (896, 1152), 12, 1),
        ("C2: 1 MP to 512 x 512", (896, 1152), (512, 512), 24, 1),
        ("12 MP to 256 x 256, reduced while it is decoded", (3000, 4000), (256, 256), 12, None),
    ],
)
def test_decode_and_resize(title: str, size: Size, bucket: Size, count: int, most: int | None) -> None:
    distinct, bucket, count = photographs(size, min(count, 6)), shrunk(bucket), min(count, IMAGES)
    files = [distinct[number % len(distinct)] for number in range(count)]
    errors = [np.abs(ours(data, bucket).astype(int) - pillow(data, bucket)) for data in distinct]
    assert most is None or max(int(error.max()) for error in errors) <= most
    deviation = max(float(np.sqrt(np.square(error).mean())) for error in errors)
    assert deviation < 1
    sides = {"Pillow": pillow, "ours": ours}

    def one_by_one(side: Callable[..., object]) -> list[object]:
        return [side(data, bucket) for data in files]

    alone = turns({f"{name}, CPU time": partial(one_by_one, side) for name, side in sides.items()})
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:

        def together(side: Callable[..., object]) -> list[object]:
            return list(pool.map(side, files, [bucket] * count))

        pooled = turns(
            {
                "Pillow, one after another, clock": partial(one_by_one, pillow),
                f"ours, {cores} threads on {cores} cores, clock": partial(together, ours),
            },
            time.perf_counter,
        )
    kilobytes = sum(map(len, files)) / len(files) / 1e3
    differing = statistics.mean(float((error > 0).mean()) for error in errors)
    apart = f"{100 * differing:.2f}% of values differ, by {max(int(e.max()) for e in errors)} at most"
    show(f"{title}; {kilobytes:.0f} kB each; {apart}, {deviation:.2f} in root mean square", alone, count)
    show(f"{title}, by the clock", pooled, count)


def test_measuring() -> None:
    """What the index asks of pixels: whole images beside ones that are reduced while they are decoded."""
    files = photographs((3000, 4000), 4)

    def whole() -> list[object]:
        return [looks(decode(data, LIMIT)) for data in files]

    def reduced() -> list[object]:
        return [looks(decode_reduced(data, LIMIT, (96, 96))[0]) for data in files]

    apart = [
        (one["perceptual_hash"] ^ other["perceptual_hash"]).bit_count()
        for one, other in zip(whole(), reduced(), strict=True)
    ]
    found = turns({"decoded whole": whole, "ours": reduced})
    show(f"measure 12 MP; hashes at most {max(apart)} bits apart", found, len(files))


def test_headers_first() -> None:
    """C4: half of the images are larger than the limit."""
    small, large = photographs((896, 1152), 6), photographs((900, 1160), 6)
    files = [data for pair in zip(large, small, strict=True) for data in pair]
    size = shrunk((896, 1152))
    limit = size[0] * size[1]

    def decode_first() -> Sequence[Size]:
        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
        return [(image.height, image.width) for image in images if image.height * image.width <= limit]

    def header_first() -> Sequence[Size]:
        sizes = [(data, header_size(data)) for data in files]
        images = [decode(data, limit) for data, (height, width) in sizes if height * width <= limit]
        return [(image.height, image.width) for image in images]

    assert decode_first() == header_first() == [size] * len(small)
    found = turns({"decode, then look at the size": decode_first, "ours: header first": header_first})
    show("C4: half of 1 MP images rejected by size", found, len(files))


@pytest.mark.parametrize(
    ("title", "size", "progressive", "count"),
    [
        ("C3: 12 MP to 512 x 512 and JPEG", (3000, 4000), False, 4),
        ("C3: 7 MP, progressive", (2300, 3000), True, 4),
        ("C3: 1 MP", (896, 1152), False, 16),
    ],
)
def test_decode_resize_and_encode(title: str, size: Size, progressive: bool, count: int) -> None:
    """Beside img2dataset's Resizer, which reduces by areas where ours takes Lanczos; both crop the middle."""
    side, quality = 512 // SHRINK, 95
    try:
        from img2dataset.resizer import Resizer
    except ImportError as error:
        pytest.skip(f"img2dataset is not installed: {error}")
    resizer = Resizer(side, "center_crop", False, encode_quality=quality)
    files = []
    for data in photographs(size, count):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(data)).save(buffer, "JPEG", quality=90, progressive=progressive)
        files.append(buffer.getvalue())

    def theirs(data: bytes) -> bytes:
        encoded, *_, error = resizer(io.BytesIO(data))
        assert error is None
        return encoded

    def encoded(data: bytes) -> bytes:
        pixels = read_crop(data, (side, side), CropConfig(placement="center"), "", LIMIT)[0]
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420")

    both = [
        np.asarray(Image.open(io.BytesIO(make(files[0]))).convert("RGB")).astype(float) for make in (theirs, encoded)
    ]
    assert both[0].shape == both[1].shape == (side, side, 3)
    signal = 10 * np.log10(255**2 / np.square(both[0] - both[1]).mean())
    found = turns(
        {
            "img2dataset, CPU time": lambda: [theirs(data) for data in files],
            "ours, CPU time": lambda: [encoded(data) for data in files],
        }
    )
    show(f"{title}; {signal:.1f} dB apart", found, count)
