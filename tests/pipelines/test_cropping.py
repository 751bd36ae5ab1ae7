"""Pixels to crops: fit, place, flip, resize, and JPEGs that are reduced, or decoded straight, on their way."""

from collections import Counter

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms

from pipelines.config import CropConfig
from pipelines.images import (
    DECODE_ERRORS,
    crop_pixels,
    decode,
    decode_reduced,
    draw_crop,
    fit,
    read_crop,
    resize,
)
from tests.pictures import MAX_PIXELS, encoded, noise, scene


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
