"""Image files to pixels: formats, orientation, transparency, profiles, damage, and what they claim."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, UnidentifiedImageError

from pipelines.config import CropConfig
from pipelines.images import (
    DECODE_ERRORS,
    content_id,
    decode,
    header_size,
    read_crop,
)
from tests.pictures import MAX_PIXELS, encoded, noise, pixels

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


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 8, data: bytes = b"", colours: int = 2, before: bytes = b"") -> bytes:
    """A PNG whose header claims these sides and bits of each of red, green and blue, and whose pixels are `data`."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + rows + chunk(b"IEND", b"")


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


@pytest.mark.parametrize(("bits", "row"), [(2, b"\x1b"), (4, b"\x05\xaf")])
def test_of_few_shades_the_transparent_one_is_told_by_its_number(bits, row):
    shades, step = ([0, 1, 2, 3], 85) if bits == 2 else ([0, 5, 10, 15], 17)
    for place, transparent in enumerate(shades):
        data = png(4, 1, bits, b"\0" + row, colours=0, before=chunk(b"tRNS", struct.pack(">H", transparent)))
        expected = [shade * step for shade in shades]
        expected[place] = 255
        assert pixels(data)[0, :, 0].tolist() == expected


def test_of_sixteen_bits_of_each_colour_the_transparent_one_is_told_by_upper_bytes():
    row = struct.pack(">6H", 258, 515, 772, 1258, 515, 772)
    data = png(2, 1, 16, b"\0" + row, before=chunk(b"tRNS", struct.pack(">3H", 258, 515, 772)))
    assert pixels(data).tolist() == [[[255, 255, 255], [4, 2, 3]]]


def tiff(*planes: bytes, bits: int, photometric: int = 1, sample_format: int = 1, alpha: int | None = None) -> bytes:
    """A TIFF of one row of four pixels, a plane for each channel; in one plane with `alpha`, of gray and that."""
    channels = len(planes) if alpha is None else 2
    fields = {256: [4], 257: [1], 258: [bits] * channels, 259: [1], 262: [photometric], 277: [channels], 278: [1]}
    fields |= {273: [0] * len(planes), 279: [len(plane) for plane in planes], 284: [min(len(planes), 2)]}
    fields |= {339: [sample_format] * channels} | ({} if alpha is None else {338: [alpha]})
    places = [8 + 2 + 12 * len(fields) + 4]
    for plane in planes:
        places.append(places[-1] + len(plane))
    fields[273], entries, values = places[:-1], b"", b""
    for tag, numbers in sorted(fields.items()):
        here = numbers[0] if len(numbers) == 1 else places[-1] + len(values)
        entries += struct.pack("<HHII", tag, 4, len(numbers), here)
        values += struct.pack(f"<{len(numbers)}I", *numbers) if len(numbers) > 1 else b""
    return b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + b"".join(planes) + values


def test_a_tiff_of_sixteen_bits_whose_white_is_zero_is_turned_over():
    row = struct.pack("<4H", 0, 255, 32_768, 65_535)
    assert pixels(tiff(row, bits=16))[0, :, 0].tolist() == [0, 0, 128, 255]
    assert pixels(tiff(row, bits=16, photometric=0))[0, :, 0].tolist() == [255, 255, 127, 0]


def test_a_tiff_of_twelve_bits_reaches_white():
    row = bytes.fromhex("000 010 800 fff".replace(" ", ""))
    assert pixels(tiff(row, bits=12))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_tiff_may_have_sixteen_bits_in_planes():
    planes = [struct.pack("<4H", *(value << 8 for value in row)) for row in ((0, 1, 2, 3), (10, 20, 30, 40), (5,) * 4)]
    seen = pixels(tiff(*planes, bits=16, photometric=2))[0]
    assert seen.tolist() == [[0, 10, 5], [1, 20, 5], [2, 30, 5], [3, 40, 5]]


@pytest.mark.parametrize(("alpha", "expected"), [(1, [155, 255, 255, 100]), (2, [134, 255, 255, 100])])
def test_gray_of_a_tiff_may_be_multiplied_by_its_alpha(alpha, expected):
    row = bytes([50, 150, 0, 0, 255, 255, 100, 255])
    assert pixels(tiff(row, bits=8, alpha=alpha))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("bits", "sample_format"), [(8, 2), (16, 2), (32, 1), (32, 2), (32, 3)])
def test_signed_and_wide_pixels_are_refused_because_nothing_says_what_white_is(bits, sample_format):
    data = tiff(bytes(4 * bits // 8), bits=bits, sample_format=sample_format)
    with pytest.raises(ValueError, match="nothing says which value is white"):
        decode(data, MAX_PIXELS)


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


def test_what_the_decoder_has_against_a_file_is_told():
    with pytest.raises(UnidentifiedImageError, match=r"the TIFF has a header that .*: unknown pixel mode"):
        decode(tiff(bytes(6), bits=14), MAX_PIXELS)
    with pytest.raises(UnidentifiedImageError, match="cannot identify the file as any of JPEG, PNG, WEBP"):
        decode(b"words", MAX_PIXELS)


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
