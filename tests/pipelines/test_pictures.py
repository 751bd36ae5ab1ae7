import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.evaluate.retrieval import retrieval
from pipelines.pictures import contact_sheet, grid, to_pixels


def noise(count: int, seed: int = 0, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    draws = np.random.default_rng(seed)
    return [Image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


def test_pixels_are_rounded_and_clipped():
    values = torch.tensor([-3.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.0, 1.0, 7.0])
    image = values.expand(2, 3, 1, 7)
    pixels = to_pixels(image)
    assert (pixels.dtype, pixels.shape) == (np.uint8, (2, 1, 7, 3))
    assert pixels[0, 0, :, 0].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_every_pixel_value_there_and_back():
    pixels = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert np.array_equal(to_pixels(pixels / 127.5 - 1), pixels.permute(0, 2, 3, 1).numpy())


def test_pixels_can_be_taken_in_training():
    image = torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    assert to_pixels(image).shape == (1, 2, 2, 3)


@pytest.mark.parametrize(("least", "scale"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_grid_magnifies_small_pictures_by_whole_numbers(least, scale):
    rows = [np.full((3, 4, 6, 3), value, np.uint8) for value in (10, 20)]
    sheet = grid(rows, least_side=least)
    assert sheet.shape == (2 * 5 * scale, 3 * 7 * scale, 3)
    assert (sheet[0, 0] == 10).all()
    assert (sheet[5 * scale, 0] == 20).all()
    assert (sheet[4 * scale, 0] == 255).all()  # a white line between pictures


def colours(sheet: Image.Image) -> set:
    return {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}


@pytest.mark.parametrize(("cells", "columns", "rows"), [(1, 3, 1), (3, 3, 1), (4, 3, 2), (7, 3, 3)])
def test_a_contact_sheet_grows_by_whole_rows(cells, columns, rows):
    def height(count: int) -> int:
        return contact_sheet([("label", noise(1))] * count, columns, side=20).height

    one, two = height(columns), height(columns + 1)
    assert height(cells) == one + (rows - 1) * (two - one)


def test_a_contact_sheet_shows_every_picture_whole_and_fitted():
    pictures = [
        Image.new("RGB", size, colour) for size, colour in (((200, 10), "red"), ((3, 90), "blue"), ((1, 1), "lime"))
    ]
    sheet = contact_sheet(
        [("wide", pictures[:2]), ("a label that is far too long for its cell " * 5, pictures[2:])], 2, 40
    )
    array = np.asarray(sheet)
    found = {}
    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("lime", (0, 255, 0))):
        ys, xs = np.nonzero((array == colour).all(2))
        found[name] = (int(np.ptp(ys)) + 1, int(np.ptp(xs)) + 1)
        assert len(ys) == found[name][0] * found[name][1]
    assert found == {"red": (2, 40), "blue": (40, 1), "lime": (40, 40)}


def test_a_title_takes_room_above():
    cells = [("label", noise(1))]
    assert contact_sheet(cells, 1, 20, "title").height > contact_sheet(cells, 1, 20).height


def test_pictures_that_are_their_images_are_found_with_certainty():
    images = noise(12)
    found = retrieval(images, images, ["g"] * 12)
    assert (found.pictures, found.mean_rank, found.first) == (12, 0.0, 1.0)
    assert found.first_by_chance == pytest.approx(1 / 12)
    assert found.p_value == pytest.approx(1 / 10_000)


def test_pictures_near_their_images_are_found():
    images = noise(12)
    blended = [Image.blend(image, other, 0.7) for image, other in zip(images, noise(12, seed=1), strict=True)]
    found = retrieval(blended, images, ["g"] * 12)
    assert found.mean_rank < 0.2
    assert found.p_value < 0.001


def test_pictures_of_anything_score_chance():
    found = retrieval(noise(40, seed=1), noise(40, seed=2), ["g"] * 40)
    assert abs(found.mean_rank - 0.5) < 0.15
    assert found.p_value > 0.05


def test_pictures_of_other_images_are_no_better_than_chance():
    images = noise(10)
    found = retrieval(images[1:] + images[:1], images, ["g"] * 10)
    assert found.first == 0
    assert found.mean_rank > 0.4
    assert found.p_value > 0.2


def test_groups_of_one_are_left_out():
    images = noise(6)
    found = retrieval(images, images, ["a", "a", "b", "b", "b", "alone"])
    assert found.pictures == 5
    assert found.first_by_chance == pytest.approx(2 / 5)
    with pytest.raises(ValueError, match="no group"):
        retrieval(images, images, range(6))


def test_shape_alone_scores_chance():
    """Pictures that tell their group and nothing more: light ones for light images, dark ones for dark images."""
    light, dark = [[Image.eval(i, lambda v, o=o: v // 2 + o) for i in noise(8, seed=o)] for o in (0, 127)]
    made = [Image.new("RGB", (8, 8), "white")] * 8 + [Image.new("RGB", (8, 8), "black")] * 8
    found = retrieval(made, dark + light, ["a"] * 8 + ["b"] * 8)
    assert found.mean_rank == pytest.approx(0.5)
    assert found.p_value == 1


def test_what_is_compared_does_not_depend_on_size():
    images = noise(6, size=(32, 32))
    large = [image.resize((64, 96), Image.Resampling.NEAREST) for image in images]
    assert retrieval(large, images, ["g"] * 6).first == 1.0


def test_the_same_pictures_give_the_same_result():
    made, real = noise(9, seed=1), noise(9, seed=2)
    assert retrieval(made, real, ["g"] * 9) == retrieval(made, real, ["g"] * 9)


def test_equal_images_share_their_rank():
    image = noise(1)[0]
    found = retrieval([image] * 4, [image] * 4, ["g"] * 4)
    assert found.mean_rank == 0.5
    assert found.p_value == 1
