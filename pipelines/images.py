"""Image files to pixels: headers, decoding to upright sRGB, and the crop that brings an image to its bucket."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pipelines.config import CropConfig, Size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # the other decoders stay unreached; MPO opens as JPEG
DECODE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    NotImplementedError,
    MemoryError,
    RuntimeError,  # the AVIF decoder
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    ImageCms.PyCMSError,
)
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ORIENTATION_TAG = 0x0112
UNREADABLE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)
"""A file that is not to be had. Any other error of a read is the storage's, and says nothing of the image."""


Image.MAX_IMAGE_PIXELS = None  # the limit is filters.max_pixels, looked at before any pixel is decoded


def content_id(data: bytes) -> str:
    """The id of an image file: the first 32 hex digits of its bytes' sha256."""
    return hashlib.sha256(data).hexdigest()[:32]


def open_image(data: bytes) -> Image.Image:
    """The image, its header read and its pixels not."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own words have an address in memory, which differs at each run
        raise UnidentifiedImageError(f"cannot identify the file as any of {', '.join(FORMATS)}") from None


def header_size(data: bytes) -> Size:
    """(height, width) in pixels of the upright image, from its header alone."""
    with open_image(data) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow turns its size at opening
            return height, width
        # the base class's, because PNG's own decodes all pixels to look for a chunk behind them
        transposed = Image.Image.getexif(image).get(ORIENTATION_TAG) in TRANSPOSED_ORIENTATIONS
    return (width, height) if transposed else (height, width)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The upright image in sRGB, transparency over white; the first frame of an animation.

    Raises one of DECODE_ERRORS where the file is damaged, truncated or not an image.
    """
    with open_image(data) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"the header claims {image.height} x {image.width} pixels")
        image.load()
        upright = ImageOps.exif_transpose(image)
        profile = image.info.get("icc_profile")
    if upright.mode in ("I;16", "I;16B", "I;16L", "I"):
        upright = upright.point(lambda value: value / 256).convert("L")  # 16 bits to 8; Pillow itself would clip
    if upright.mode == "F":
        raise ValueError("floating-point pixels, and nothing says which value is white")
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    if profile and upright.mode in ("RGB", "CMYK", "L"):
        return _to_srgb(upright, profile)
    return upright.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return image.convert("RGB")  # a damaged profile, or one of another colour space: common, and no fault of pixels
    assert converted is not None  # None only for inPlace=True
    return converted


def fit(size: Size, bucket: Size) -> Size:
    """(height, width) of the smallest image of this aspect that covers the bucket."""
    height, width = size
    scale = max(bucket[0] / height, bucket[1] / width)
    return max(bucket[0], round(height * scale)), max(bucket[1], round(width * scale))


def draw_crop(size: Size, bucket: Size, crop: CropConfig, image_id: str) -> tuple[tuple[int, int], bool]:
    """((top, left) in pixels of the resized image, flip), drawn from the seed and the image (SDXL Algorithm 1)."""
    height, width = fit(size, bucket)
    seed = hashlib.sha256(f"{crop.seed}:{image_id}".encode()).digest()
    draws = np.random.Generator(np.random.PCG64(int.from_bytes(seed)))
    flip = bool(draws.random() < crop.flip_chance)
    if crop.placement == "center":
        return ((height - bucket[0]) // 2, (width - bucket[1]) // 2), flip
    return (int(draws.integers(height - bucket[0] + 1)), int(draws.integers(width - bucket[1] + 1))), flip


def crop_pixels(image: Image.Image, bucket: Size, top_left: tuple[int, int], flip: bool) -> np.ndarray:
    """uint8 [height, width, 3]: the image resized by the shorter fit, cropped to the bucket, mirrored if asked."""
    height, width = fit((image.height, image.width), bucket)
    resized = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = top_left
    pixels = np.asarray(resized)[top : top + bucket[0], left : left + bucket[1]]
    return pixels[:, ::-1] if flip else pixels
