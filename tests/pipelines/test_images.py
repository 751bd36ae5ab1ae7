import io
import struct
import zlib
from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from pipelines.config import CropConfig
from pipelines.images import (
    DECODE_ERRORS,
    content_id,
    crop_pixels,
    decode,
    decode_reduced,
    draw_crop,
    fit,
    header_size,
    read_crop,
    resize,
)

MAX_PIXELS = 10_000_000
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
STORED_AS = {  # how a camera stores an upright picture under each EXIF orientation
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


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


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 8, data: bytes = b"", colours: int = 2, before: bytes = b"") -> bytes:
    """A PNG whose header claims these sides and bits of each of red, green and blue, and whose pixels are `data`."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + rows + chunk(b"IEND", b"")


def scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Shapes with edges, fine lines and noise, as a photograph has them."""
    coarse = Image.fromarray(noise(9, 12, seed=seed)).resize((width, height), Image.Resampling.BICUBIC)
    lines = 40 * (np.add.outer(np.arange(height), np.arange(width)) // 7 % 2)[..., None]
    grain = noise(height, width, seed=seed) // 16
    return Image.fromarray(np.clip(np.asarray(coarse) * 0.75 + lines + grain, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_orientation_is_brought_upright(kind, orientation):
    upright = noise(12, 20)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(upright)
    if (method := STORED_AS[orientation]) is not None:
        stored = stored.transpose(method)
    data = encoded(stored, kind, exif=exif, **LOSSLESS[kind])
    assert np.array_equal(pixels(data), upright)
    assert header_size(data) == (12, 20)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_header_gives_height_and_width(kind):
    data = encoded(Image.fromarray(noise(12, 20)), kind)
    assert header_size(data) == (12, 20)
    assert pixels(data).shape == (12, 20, 3)


def test_transparency_lies_over_white():
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [255, 0, 0, 128]]], np.uint8), "RGBA")
    assert pixels(encoded(image)).tolist() == [[[255, 255, 255], [0, 0, 0], [255, 127, 127]]]


def test_gray_with_alpha_lies_over_white():
    image = Image.fromarray(np.array([[[0, 0], [0, 255], [100, 255]]], np.uint8), "LA")
    assert pixels(encoded(image)).tolist() == [[[255] * 3, [0] * 3, [100] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_lies_over_white(kind):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    assert pixels(encoded(image, kind, transparency=1)).tolist() == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_become_eight_by_their_upper_byte(kind):
    image = Image.fromarray(np.array([[0, 255, 256, 32_768, 65_535]], np.uint16))
    assert image.mode == "I;16"
    assert pixels(encoded(image, kind))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_sixteen_bits_become_eight_in_either_order_of_bytes():
    values = np.array([[0, 255, 256, 32_768, 65_535]], ">u2")
    image = Image.fromarray(values)
    assert image.mode == "I;16B"
    assert pixels(encoded(image, "TIFF"))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("transparent", "expected"), [(3, [255, 3, 2]), (770, [0, 255, 2]), (513, [0, 3, 255])])
def test_of_sixteen_bits_only_the_very_value_is_transparent(transparent, expected):
    rows = b"\0" + struct.pack(">3H", 3, 770, 513)
    data = png(3, 1, 16, rows, colours=0, before=chunk(b"tRNS", struct.pack(">H", transparent)))
    assert pixels(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_one_bit_becomes_black_and_white(kind):
    image = Image.fromarray(np.array([[False, True]]))
    assert pixels(encoded(image, kind))[0, :, 1].tolist() == [0, 255]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(kind):
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind)
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 2


def test_sixteen_bits_of_each_colour_become_eight():
    row = struct.pack(">6H", 0, 256, 32_768, 65_535, 65_280, 255)
    assert pixels(png(2, 1, bits=16, data=b"\0" + row)).tolist() == [[[0, 1, 128], [255, 255, 0]]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "AVIF", "MPO"])
def test_of_several_frames_or_pages_the_first_counts(kind):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "AVIF"])
def test_transparency_lies_over_white_in_each_format_that_has_it(kind):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 8))
    found = pixels(encoded(image, kind)).astype(int)
    assert np.abs(found[:6] - [0, 0, 255]).max() <= 8
    assert np.abs(found[10:] - 255).max() <= 8


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_a_palette_becomes_its_colours(kind):
    image = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    assert pixels(encoded(image, kind)).tolist() == [[[10, 20, 30], [200, 100, 0]], [[200, 100, 0], [0, 0, 255]]]


def test_floats_are_refused_because_nothing_says_what_white_is():
    with pytest.raises(DECODE_ERRORS):
        decode(encoded(Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)), "TIFF"), MAX_PIXELS)


def test_a_profile_is_converted_to_srgb():
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = same.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")  # its red is blue
    red = Image.new("RGB", (16, 16), (200, 0, 0))
    for kind, error in (("PNG", 1), ("JPEG", 3), ("WEBP", 3), ("TIFF", 1), ("AVIF", 3)):
        for profile, expected in ((same, [200, 0, 0]), (swapped, [0, 0, 200])):
            found = pixels(encoded(red, kind, icc_profile=profile)).astype(int)
            assert np.abs(found - expected).max() <= error, kind


@pytest.mark.parametrize("mode", ["RGBA", "P", "P with transparency"])
def test_a_profile_counts_under_transparency_and_in_palettes_too(mode):
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = same.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")  # its red is blue
    if mode == "RGBA":
        image, options = Image.fromarray(np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], np.uint8)), {}
    else:
        image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        image.putpalette([200, 0, 0, 255, 255, 255])
        options = {"transparency": 1} if "with" in mode else {}
    found = pixels(encoded(image, "PNG", icc_profile=swapped, **options)).astype(int)
    assert np.abs(found - [[[0, 0, 200], [255, 255, 255]]]).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "PNG behind", "PNG as text", "WEBP", "JPEG"])
def test_exif_that_cannot_be_read_is_none_and_the_image_kept(kind):
    upright, broken = noise(12, 20), b"garbage, and no TIFF header"
    data = encoded(Image.fromarray(upright), kind.split()[0], **LOSSLESS.get(kind, {}))
    if kind == "PNG as text":
        words = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n  20\nno hex\n"))
        data = data[:33] + words + data[33:]
    elif kind.startswith("PNG"):
        place = 33 if kind == "PNG" else len(data) - 12
        data = data[:place] + chunk(b"eXIf", broken) + data[place:]
    elif kind == "WEBP":
        data = encoded(Image.fromarray(upright), kind, exif=broken, lossless=True)
    else:
        data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(broken) + 8) + b"Exif\0\0" + broken + data[2:]
    assert header_size(data) == (12, 20)
    found = decode(data, MAX_PIXELS)
    assert found.size == (20, 12)
    assert kind == "JPEG" or np.array_equal(np.asarray(found), upright)
    assert read_crop(data, (12, 20), CropConfig(), "x", MAX_PIXELS)[0].shape == (12, 20, 3)


@pytest.mark.parametrize(("megabytes", "kept"), [(5, True), (17, False)])
def test_a_long_text_costs_no_image_and_one_that_swells_is_an_error(megabytes, kept):
    words = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(megabytes * 2**20)))
    for place in (33, -12):  # before the pixels and behind them
        plain = encoded(Image.fromarray(noise(12, 20)))
        data = plain[:place] + words + plain[place:]
        if kept:
            assert np.array_equal(pixels(data), pixels(plain))
        else:
            with pytest.raises(DECODE_ERRORS, match="too large"):
                decode(data, MAX_PIXELS)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("profile", ["of another colour space", "damaged"])
def test_a_profile_that_does_not_fit_is_left_out_and_the_image_kept(mode, profile):
    image = Image.new(mode, (8, 8), 0)
    space = "sRGB" if mode != "RGB" else "LAB"
    fits_not = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    data = encoded(image, "JPEG", icc_profile=fits_not if profile != "damaged" else b"nonsense" * 20)
    expected = pixels(encoded(image, "JPEG"))
    assert np.abs(pixels(data).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file_is_an_error(kind, share):
    data = encoded(Image.fromarray(noise(24, 40)), kind)
    with pytest.raises(DECODE_ERRORS):
        decode(data[: int(share * len(data))], MAX_PIXELS)


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"not an image at all", b"\xff\xd8\xff\xe0", b"RIFF0000WEBPVP8 ", b"II*\0"]
)
def test_what_is_no_image_is_an_error(data):
    with pytest.raises(DECODE_ERRORS):
        decode(data, MAX_PIXELS)
    with pytest.raises(DECODE_ERRORS):
        header_size(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_decoded_or_an_error_and_nothing_else(kind):
    data = encoded(Image.fromarray(noise(24, 40)), kind)
    draws = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in draws.integers(len(data), size=3):
            damaged[place] = draws.integers(256)
        try:
            header_size(bytes(damaged))
            decode(bytes(damaged), MAX_PIXELS)
        except DECODE_ERRORS:
            pass


def test_a_format_that_is_not_supported_is_not_opened():
    with pytest.raises(DECODE_ERRORS):
        decode(encoded(Image.fromarray(noise(4, 4)), "PPM"), MAX_PIXELS)


def patched(kind: str, width: int, height: int) -> bytes:
    """A small file of a format whose header claims these sides."""
    data = bytearray(encoded(Image.fromarray(noise(8, 8)), kind, **({"lossless": True} if kind == "WEBP" else {})))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "WEBP":  # of 14 bits each, less one
        data[21:25] = struct.pack("<I", struct.unpack("<I", data[21:25])[0] >> 28 << 28 | height - 1 << 14 | width - 1)
    else:
        for tag, side in ((256, width), (257, height)):
            place = data.index(struct.pack("<HHII", tag, 4, 1, 8)) + 8
            data[place : place + 4] = struct.pack("<I", side)
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_huge_claim_is_refused_before_anything_is_allocated(kind, monkeypatch):
    data = png(15_000, 13_000) if kind == "PNG" else patched(kind, 15_000, 13_000)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("pixels were asked for"))
    assert header_size(data) == (13_000, 15_000)
    with pytest.raises(ValueError, match="13000 x 15000"):
        decode(data, 15_000 * 13_000 - 1)


def test_the_pixel_limit_is_ours_and_not_the_librarys():
    assert header_size(png(20_000, 19_000)) == (19_000, 20_000)


def test_the_limit_itself_is_allowed():
    assert decode(encoded(Image.fromarray(noise(4, 5))), 20).size == (5, 4)


def test_an_id_is_the_content():
    assert content_id(b"abc") == "ba7816bf8f01cfea414140de5dae2223"
    assert content_id(b"abd") != content_id(b"abc")


def test_the_fit_covers_the_bucket_and_is_tight_on_one_side():
    draws = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(draws.integers(1, 400, 2).tolist())
        bucket = tuple((8 * draws.integers(1, 40, 2)).tolist())
        height, width = fit(size, bucket)
        assert height >= bucket[0]
        assert width >= bucket[1]
        assert height == bucket[0] or width == bucket[1]
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        assert abs(height - size[0] * scale) <= 0.5 + 1e-6
        assert abs(width - size[1] * scale) <= 0.5 + 1e-6


@pytest.mark.parametrize("bucket", [(8, 16), (16, 8), (8, 8)])
def test_an_image_of_the_buckets_size_is_not_resized(bucket):
    assert fit(bucket, bucket) == bucket
    image = Image.fromarray(noise(*bucket))
    assert np.array_equal(crop_pixels(image, bucket, (0, 0), False), np.asarray(image))


def test_a_crop_lies_inside_and_follows_from_seed_and_image():
    draws = np.random.default_rng(0)
    bucket = (16, 24)
    for number in range(300):
        size = tuple(draws.integers(1, 200, 2).tolist())
        crop = CropConfig(flip_chance=0.5, seed=number % 3)
        (top, left), flip = draw_crop(size, bucket, crop, f"id{number}")
        height, width = fit(size, bucket)
        assert 0 <= top <= height - bucket[0]
        assert 0 <= left <= width - bucket[1]
        assert draw_crop(size, bucket, crop, f"id{number}") == ((top, left), flip)


def test_another_seed_or_another_image_draws_another_crop():
    def crops(seed: int, prefix: str) -> list:
        config = CropConfig(flip_chance=0.5, seed=seed)
        return [draw_crop((10, 100), (8, 8), config, f"{prefix}{n}") for n in range(20)]

    assert len({str(crops(0, "a")), str(crops(1, "a")), str(crops(0, "b"))}) == 3


@pytest.mark.parametrize("size", [(8, 11), (11, 8)])
def test_offsets_are_uniform_from_edge_to_edge(size):
    axis = size.index(11)
    offsets = [draw_crop(size, (8, 8), CropConfig(), str(number))[0] for number in range(2000)]
    assert {offset[1 - axis] for offset in offsets} == {0}
    counts = np.bincount([offset[axis] for offset in offsets])
    assert len(counts) == 4
    assert np.abs(counts - 500).max() < 80  # four deviations of a fair draw


def test_the_centre_is_the_centre_whatever_the_image():
    crop = CropConfig(placement="center")
    assert {draw_crop((8, 12), (8, 8), crop, str(number)) for number in range(10)} == {((0, 2), False)}
    assert draw_crop((13, 8), (8, 8), crop, "x") == ((2, 0), False)


def test_flips_come_as_often_as_asked_and_do_not_move_the_crop():
    def drawn(chance: float) -> list:
        return [draw_crop((8, 32), (8, 8), CropConfig(flip_chance=chance), str(n)) for n in range(1000)]

    never, some, always = drawn(0.0), drawn(0.3), drawn(1.0)
    assert {flip for _, flip in never} == {False}
    assert {flip for _, flip in always} == {True}
    assert abs(sum(flip for _, flip in some) - 300) < 60
    assert [place for place, _ in never] == [place for place, _ in some] == [place for place, _ in always]


def test_cropped_pixels_are_those_of_a_plain_resize_and_crop():
    image = Image.fromarray(noise(30, 50))
    bucket, (top, left) = (16, 24), (0, 2)
    assert fit((30, 50), bucket) == (16, 27)
    whole = resize(np.array(image), (16, 27))
    assert np.array_equal(crop_pixels(image, bucket, (top, left), False), whole[top : top + 16, left : left + 24])


@pytest.mark.parametrize(
    "image", [scene(300, 400), Image.fromarray(noise(97, 131) // 128 * 255)], ids=["scene", "bits"]
)
@pytest.mark.parametrize("size", [(60, 81), (96, 131), (97, 100), (400, 512)])
def test_resizing_is_pillows_lanczos(image, size):
    """Within one step of 255, or two here and there where it enlarges."""
    expected = np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS)).astype(int)
    apart = np.abs(resize(np.array(image), size) - expected)
    assert apart.max() <= (1 if size[0] <= image.height else 2)
    assert (apart > 1).mean() < 1e-3
    assert (apart > 0).mean() < 0.03


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("kind", "stored", "wanted", "scale"),
    [
        ("JPEG", (480, 640), (20, 26), 8),
        ("JPEG", (480, 640), (21, 20), 4),  # 60 rows are less than three times 21
        ("JPEG", (480, 640), (60, 80), 2),
        ("JPEG", (480, 640), (81, 80), 1),
        ("JPEG", (482, 640), (20, 26), 2),  # an eighth of 482 is no whole number
        ("JPEG", (481, 640), (20, 26), 1),
        ("PNG", (480, 640), (20, 26), 1),
    ],
)
def test_a_jpeg_is_reduced_while_three_times_the_wanted_pixels_are_left(kind, stored, wanted, scale, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = wanted if orientation == 1 else wanted[::-1]
    image, found = decode_reduced(encoded(scene(*stored), kind, exif=exif), MAX_PIXELS, turned)
    size = (image.height * found, image.width * found)
    assert (found, size) == (scale, stored if orientation == 1 else stored[::-1])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_crop_of_a_reduced_image_is_that_of_the_whole_one(mode, progressive):
    """Its error is below one step of 255 in root mean square, here as with the photographs of docs/decisions/0023."""
    data = encoded(scene(480, 640, seed=3).convert(mode), "JPEG", quality=90, progressive=progressive)
    bucket, crop = (64, 72), CropConfig(flip_chance=0.5)
    assert decode_reduced(data, MAX_PIXELS, fit((480, 640), bucket))[1] == 2
    found, top_left, flip = read_crop(data, bucket, crop, "id", MAX_PIXELS)
    assert (top_left, flip) == draw_crop((480, 640), bucket, crop, "id")
    whole = crop_pixels(decode(data, MAX_PIXELS), bucket, top_left, flip)
    assert np.sqrt(np.square(found.astype(float) - whole).mean()) < 1


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_a_truncated_file_is_an_error_though_it_is_reduced(share):
    data = encoded(scene(480, 640), "JPEG")
    with pytest.raises(DECODE_ERRORS):
        decode_reduced(data[: int(share * len(data))], MAX_PIXELS, (20, 20))


TURNED = Image.Exif()
TURNED[0x0112] = 6
JPEGS = {  # how it is stored, and whether its decoder's pixels are the image
    "as cameras do": ({"quality": 90}, True),
    "colours whole": ({"quality": 95, "subsampling": 0}, True),
    "colours halved across": ({"subsampling": 1}, True),
    "progressive": ({"progressive": True}, True),
    "restart marks": ({"restart_marker_rows": 1}, True),
    "red, green and blue": ({"keep_rgb": True}, True),
    "upright by its tag": ({"exif": Image.Exif()}, True),
    "turned by its tag": ({"exif": TURNED}, False),
    "with a profile": ({"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()}, False),
    "grey": ({"mode": "L"}, False),
    "four inks": ({"mode": "CMYK"}, False),
}


def straight(monkeypatch) -> list[int]:
    """Lengths of the files whose pixels come from the JPEG decoder without Pillow."""
    found, decoder = [], simplejpeg.decode_jpeg

    def spied(data, *given, **named):
        pixels = decoder(data, *given, **named)
        found.append(len(data))
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spied)
    return found


@pytest.mark.parametrize(("options", "plain"), JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("sides", [(61, 83), (8, 8), (1, 3)])
def test_a_jpegs_crop_is_of_pillows_pixels_whichever_way_they_come(options, plain, sides, monkeypatch):
    taken, options = straight(monkeypatch), dict(options)
    data = encoded(scene(*sides).convert(options.pop("mode", "RGB")), "JPEG", **options)
    whole = decode(data, MAX_PIXELS)
    found, top_left, flip = read_crop(data, (whole.height, whole.width), CropConfig(), "id", MAX_PIXELS)
    assert (found == np.asarray(whole)).all()
    assert (top_left, flip) == ((0, 0), False)
    assert bool(taken) == plain


def test_a_damaged_jpeg_is_what_pillow_makes_of_it(monkeypatch):
    taken, outcomes = straight(monkeypatch), Counter()
    data, draws = encoded(scene(64, 64), "JPEG", quality=90), np.random.default_rng(0)
    for number in range(400):
        damaged = bytearray(data[: draws.integers(len(data))] if number % 4 == 0 else data)
        for place in draws.integers(len(damaged) or 1, size=number % 3):
            damaged[place % len(damaged)] = draws.integers(256)
        try:
            whole = decode(bytes(damaged), MAX_PIXELS)
        except DECODE_ERRORS:
            with pytest.raises(DECODE_ERRORS):
                read_crop(bytes(damaged), (64, 64), CropConfig(), "id", MAX_PIXELS)
            outcomes["refused"] += 1
            continue
        if (whole.height, whole.width) == (64, 64):
            found, *_ = read_crop(bytes(damaged), (64, 64), CropConfig(), "id", MAX_PIXELS)
            assert (found == np.asarray(whole)).all()
            outcomes["decoded"] += 1
    assert min(outcomes["refused"], outcomes["decoded"] - len(taken), len(taken)) > 20  # some by each way


def test_a_jpeg_that_claims_too_much_is_refused_whichever_way(monkeypatch):
    taken = straight(monkeypatch)
    with pytest.raises(ValueError, match="61 x 83"):
        read_crop(encoded(scene(61, 83), "JPEG"), (61, 83), CropConfig(), "id", 61 * 83 - 1)
    assert not taken


def test_a_flip_mirrors_the_image_and_the_crop_is_counted_from_the_mirrors_left():
    image = Image.fromarray(noise(30, 50))
    mirrored = Image.fromarray(np.ascontiguousarray(resize(np.array(image), (16, 27))[:, ::-1]))
    assert np.array_equal(crop_pixels(image, (16, 24), (0, 2), True), np.asarray(mirrored)[:, 2:26])
