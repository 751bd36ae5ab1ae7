"""Image files to pixels: headers, decoding to upright sRGB, and the crop that brings an image to its bucket."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

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
SCALES = (8, 4, 2)  # by which a JPEG decoder can reduce an image on its way
STRIP = 64  # rows that are copied at a time: a strip stays in the processor's cache
SPARE = 3  # times the wanted size that a reduced image has at least; docs/decisions/0023 says how much that loses
UPRIGHT_BY = {  # what brings an image of each EXIF orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)  # those that swap height and width
ORIENTATION_TAG = 0x0112
BITS_TAG, PHOTOMETRIC_TAG, SAMPLE_FORMAT_TAG = 258, 262, 339  # of TIFF
SIGNED = 2  # sample format
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L")
STEPS = {"L;2": 85, "L;4": 17}  # of 255 between two shades of a PNG with few; its transparent one is told by number
UNREADABLE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError)
"""A file that is not to be had. Any other error of a read is the storage's, and says nothing of the image."""


warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata: thousands of lines, none of them on pixels
Image.MAX_IMAGE_PIXELS = None  # the limit is filters.max_pixels, looked at before any pixel is decoded
PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # pictures carry their making along; MAX_TEXT_MEMORY, 64 MiB, is of all
TiffImagePlugin.READ_LIBTIFF = True  # Pillow's own way makes noise of 16 bits in planes, and ends at tiles of an edge


def content_id(data: bytes) -> str:
    """The id of an image file: the first 32 hex digits of its bytes' sha256."""
    return hashlib.sha256(data).hexdigest()[:32]


def open_image(data: bytes) -> Image.Image:
    """The image, its header read and its pixels not."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its own words have an address in memory, which differs at each run
        raise UnidentifiedImageError(_why_not(data)) from None


def _why_not(data: bytes) -> str:
    """What the decoder that knows the file by its first bytes has against it: Pillow keeps that for itself."""
    for name in FORMATS:
        decoder, knows = Image.OPEN[name]
        if knows is not None and knows(data[:16]):
            try:
                decoder(io.BytesIO(data), "")
            except (*DECODE_ERRORS, IndexError, TypeError) as error:
                return f"the {name} has a header that is damaged or of a kind that is not read: {error}"
    return f"cannot identify the file as any of {', '.join(FORMATS)}"


def header_size(data: bytes) -> Size:
    """(height, width) in pixels of the upright image, from its header alone."""
    with open_image(data) as image:
        width, height = image.size
        if image.format == "TIFF":  # Pillow turns its size at opening
            return height, width
        # the base class's, because PNG's own decodes all pixels to look for a chunk behind them
        transposed = _orientation(image, Image.Image.getexif) in TRANSPOSED_ORIENTATIONS
    return (width, height) if transposed else (height, width)


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The upright image in sRGB, transparency over white; the first frame of an animation.

    Raises one of DECODE_ERRORS where the file is damaged, truncated or not an image.
    """
    return decode_reduced(data, max_pixels, None)[0]


def decode_reduced(data: bytes, max_pixels: int, wanted: Size | None) -> tuple[Image.Image, int]:
    """As decode, for someone who makes (height, width) `wanted` pixels of it; and by what its sides are divided.

    Only a JPEG is reduced, and only while both sides divide evenly and have SPARE times the wanted pixels.
    """
    with open_image(data) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"the header claims {image.height} x {image.width} pixels")
        scale = _scale(image, wanted) if wanted is not None and image.format == "JPEG" else 1
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        shades = _shades(image)
        image.load()
        stored = _to_eight_bits(image, shades)
        turn = UPRIGHT_BY.get(_orientation(image))
        upright = stored if turn is None else stored.transpose(turn)
        profile = image.info.get("icc_profile")
    return _to_rgb(upright, profile), scale


def _decode_to_pixels(data: bytes, max_pixels: int, wanted: Size) -> tuple[np.ndarray, int]:
    """As decode_reduced, as uint8 [height, width, 3].

    A plain JPEG that needs no reduction goes from its decoder straight into the array. Pillow's pixels are the same,
    but have four bytes each and have to be copied out. What the decoder complains of is for Pillow to judge.
    """
    with open_image(data) as image:
        if _is_plain(image) and image.width * image.height <= max_pixels and _scale(image, wanted) == 1:
            try:
                return simplejpeg.decode_jpeg(data, "RGB", strict=True), 1
            except ValueError:
                pass
    whole, scale = decode_reduced(data, max_pixels, wanted)
    return _pixels(whole), scale


def _is_plain(image: Image.Image) -> bool:
    """Whether the decoder's pixels are the image: a JPEG of three colours, upright, in sRGB."""
    if image.format != "JPEG" or image.mode != "RGB" or "icc_profile" in image.info:
        return False
    return _orientation(image) == 1


def _orientation(image: Image.Image, exif: Callable[[Image.Image], Image.Exif] = lambda image: image.getexif()) -> int:
    """How the image is stored, as EXIF counts it; 1, upright, where what it has of EXIF cannot be read.

    That is common, and no fault of pixels.
    """
    try:
        return exif(image).get(ORIENTATION_TAG, 1)
    except (ValueError, SyntaxError, struct.error):
        return 1


def _scale(image: Image.Image, wanted: Size) -> int:
    if _orientation(image) in TRANSPOSED_ORIENTATIONS:
        wanted = (wanted[1], wanted[0])
    sides = ((image.height, wanted[0]), (image.width, wanted[1]))
    fitting = (s for s in SCALES if all(side % s == 0 and side // s >= SPARE * needed for side, needed in sides))
    return next(fitting, 1)


def _to_rgb(upright: Image.Image, profile: bytes | None) -> Image.Image:
    if upright.has_transparency_data:
        layer = (upright.convert("LA") if upright.mode == "La" else upright).convert("RGBA")
        colours = layer.convert("L" if upright.mode in ("L", "LA", "La") else "RGB")
        seen = _to_srgb(colours, profile)
        return Image.composite(seen, Image.new("RGB", seen.size, "white"), layer.getchannel("A"))
    return _to_srgb(upright.convert("RGB") if upright.mode == "P" else upright, profile)


def _shades(image: Image.Image) -> str | None:
    """How a PNG that is not loaded yet stores a pixel, in Pillow's words: its mode does not tell the number of bits."""
    tiles = image.tile if image.format == "PNG" else ()  # type: ignore[attr-defined]
    return tiles[0].args if tiles else None


def _to_eight_bits(image: Image.Image, shades: str | None) -> Image.Image:
    """The loaded image in a mode of eight bits, its transparent colour in the same."""
    tags = image.tag_v2 if image.format == "TIFF" else {}  # type: ignore[attr-defined]
    if image.mode in ("I", "F") or SIGNED in tags.get(SAMPLE_FORMAT_TAG, ()):
        raise ValueError("signed, 32-bit or floating-point pixels, and nothing says which value is white")
    if image.mode in SIXTEEN_BITS:
        return _upper_bits(image)
    transparent = image.info.get("transparency")
    if shades in STEPS and isinstance(transparent, int):
        image.info["transparency"] = transparent * STEPS[shades]
    if shades == "RGB;16B" and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image


def _upper_bits(image: Image.Image) -> Image.Image:
    """12 or 16 bits of gray as their upper eight, and what they call transparent as white."""
    gray, bits, white_is_zero = np.asarray(image), 16, False
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        bits, white_is_zero = tags[BITS_TAG][0], tags.get(PHOTOMETRIC_TAG, 0) == 0  # as Pillow reads eight bits
    upper = (gray >> (bits - 8)).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        upper[gray == transparent] = 255
    return Image.fromarray(255 - upper if white_is_zero else upper)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile or image.mode not in ("RGB", "CMYK", "L"):
        return image if image.mode == "RGB" else image.convert("RGB")
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


def read_crops(
    data: bytes, bucket: Size, crop: CropConfig, draw_ids: Sequence[str], max_pixels: int
) -> list[tuple[np.ndarray, tuple[int, int], bool]]:
    """An image file's crops to its bucket, one for each draw: uint8 [height, width, 3], (top, left), and whether it is
    mirrored. The image is decoded and resized once.

    Raises one of DECODE_ERRORS where the file is damaged, truncated or not an image.
    """
    pixels, scale = _decode_to_pixels(data, max_pixels, fit(header_size(data), bucket))
    size = (pixels.shape[0] * scale, pixels.shape[1] * scale)
    resized = resize(pixels, fit(size, bucket))
    drawn = [draw_crop(size, bucket, crop, draw_id) for draw_id in draw_ids]
    return [(cut_out(resized, bucket, top_left, flip), top_left, flip) for top_left, flip in drawn]


def read_crop(
    data: bytes, bucket: Size, crop: CropConfig, draw_id: str, max_pixels: int
) -> tuple[np.ndarray, tuple[int, int], bool]:
    """As read_crops, for one draw."""
    return read_crops(data, bucket, crop, [draw_id], max_pixels)[0]


def crop_pixels(
    image: Image.Image, bucket: Size, top_left: tuple[int, int], flip: bool, size: Size | None = None
) -> np.ndarray:
    """uint8 [height, width, 3]: the image resized by the shorter fit, mirrored if asked, cropped to the bucket.

    `size` is the original's (height, width) where the image is a reduced one.
    """
    resized = resize(_pixels(image), fit(size or (image.height, image.width), bucket))
    return cut_out(resized, bucket, top_left, flip)


def cut_out(resized: np.ndarray, bucket: Size, top_left: tuple[int, int], flip: bool) -> np.ndarray:
    """The bucket's pixels from (top, left) of the resized image, or of its mirror image: what lies left of them is what
    the network is told, and does not see."""
    top, left = top_left
    seen = resized[:, ::-1] if flip else resized
    return seen[top : top + bucket[0], left : left + bucket[1]]


def resize(pixels: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [height, width, 3] by Lanczos: Pillow's result within a step or two of 255, much sooner."""
    if pixels.shape[:2] == tuple(size):
        return pixels
    import torch  # here, because whoever measures images needs none of it

    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # a view: torch has its fast way for this order
    resized = torch.nn.functional.interpolate(planes, size, mode="lanczos", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _pixels(image: Image.Image) -> np.ndarray:
    """uint8 [height, width, 3] of an RGB image, strip by strip: np.array copies it twice, in a third of the speed."""
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for top in range(0, image.height, STRIP):
        bottom = min(top + STRIP, image.height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels
