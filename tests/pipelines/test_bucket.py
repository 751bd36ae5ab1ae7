import math
import random

import numpy as np
import pyarrow as pa
import pytest

from pipelines import runs
from pipelines.config import DriverConfig
from pipelines.preprocess.bucket import assign_buckets, blocks_by_bucket, bucket_table, nearest
from pipelines.preprocess.config import BucketConfig
from pipelines.runs import Work
from pipelines.schema import INDEX_SCHEMA, pair_column

WIDE = (  # SDXL Appendix I, height x width, the sizes that are wider than high
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024"
)
TALL = (
    "1024x960 1088x960 1088x896 1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 "
    "1664x576 1728x576 1792x576 1856x512 1920x512 1984x512 2048x512"
)


def parsed(text: str) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in (size.split("x") for size in text.split())]


PAPER = [*parsed(WIDE), (1024, 1024), *parsed(TALL)]
SDXL = bucket_table(BucketConfig())


def test_the_table_is_the_papers_forty_from_wide_to_tall():
    assert len(PAPER) == 40
    assert list(SDXL) == PAPER


def test_the_table_has_one_size_without_its_mirror():
    assert [size for size in SDXL if size[::-1] not in SDXL] == [(704, 1344)]


def test_every_size_is_near_the_squares_area():
    assert all(0.9 * 1024**2 <= height * width <= 1024**2 for height, width in SDXL)
    assert all(side % 64 == 0 for size in SDXL for side in size)


@pytest.mark.parametrize("resolution", [16, 256, 512, 2048])
def test_another_resolution_scales_every_side(resolution):
    scaled = bucket_table(BucketConfig(resolution=resolution))
    assert list(scaled) == [(h * resolution // 1024, w * resolution // 1024) for h, w in PAPER]
    assert (resolution, resolution) in scaled


def test_a_resolution_that_does_not_scale_to_whole_pixels_is_refused():
    with pytest.raises(ValueError, match="1000"):
        bucket_table(BucketConfig(resolution=1000))


def test_a_square_table_is_one_square():
    assert bucket_table(BucketConfig(table="square", resolution=24)) == ((24, 24),)


def test_an_explicit_table_is_sorted_from_wide_to_tall():
    table = ((48, 16), (32, 32), (16, 48))
    assert bucket_table(BucketConfig(table=table, resolution=7)) == ((16, 48), (32, 32), (48, 16))


@pytest.mark.parametrize("size", SDXL)
def test_a_size_of_the_table_is_its_own_bucket_at_any_scale(size):
    assert nearest(size, SDXL) == size
    assert nearest((3 * size[0], 3 * size[1]), SDXL) == size


def test_nearest_is_by_the_ratio_of_aspects():
    draws = random.Random(0)
    for _ in range(200):
        height, width = draws.randint(1, 3000), draws.randint(1, 3000)

        def apart(bucket, height=height, width=width):
            ratio = (bucket[0] * width) / (bucket[1] * height)
            return max(ratio, 1 / ratio)

        found = nearest((height, width), SDXL)
        assert apart(found) <= min(map(apart, SDXL)) * (1 + 1e-12)
    assert nearest((100, 150), ((1, 1), (1, 2))) == (1, 2)  # 1.5 is nearer to 2 in ratio, half-way in difference
    assert nearest((1, 100), SDXL) == (512, 2048)
    assert nearest((100, 1), SDXL) == (2048, 512)


def test_of_equally_near_buckets_the_larger_is_taken_then_the_first():
    assert nearest((8, 8), ((8, 16), (32, 16))) == (32, 16)
    assert nearest((8, 8), ((16, 32), (16, 8))) == (16, 32)
    assert nearest((8, 8), ((8, 16), (16, 8))) == (8, 16)
    assert nearest((8, 8), ((16, 8), (8, 16))) == (16, 8)


def test_index_rows_get_the_bucket_of_their_size_and_nothing_else_changes():
    sizes = [[10, 10], None, [10, 40], [40, 10]]
    columns = {name: [None] * 4 for name in INDEX_SCHEMA.names}
    columns |= {"key": list("abcd"), "path": list("abcd"), "file_size": [1] * 4, "original_size": pair_column(sizes)}
    columns["reject_reason"] = [None, "unreadable", "too_small", None]
    index = INDEX_SCHEMA.empty_table().from_pydict(columns, INDEX_SCHEMA)
    assigned = assign_buckets(index, ((16, 64), (32, 32), (64, 16)))
    assert assigned.column("bucket").to_pylist() == [[32, 32], None, [16, 64], [64, 16]]
    assert assigned.schema == INDEX_SCHEMA
    assert assigned.drop_columns(["bucket"]).equals(index.drop_columns(["bucket"]))


def test_aspects_of_the_table_increase():
    aspects = [math.log(height / width) for height, width in SDXL]
    assert aspects == sorted(aspects)


def test_blocks_have_one_bucket_and_are_full_whatever_sources_their_rows_are_of(monkeypatch):
    draws, count = np.random.default_rng(0), 500
    sources = draws.choice(["b", "a", "c"], count, p=[0.7, 0.2, 0.1]).tolist()
    buckets = [[64, 64] if wide else [64, 128] for wide in draws.random(count) < 0.3]
    keys = [f"{n:03}" for n in range(count)]
    table = pa.table({"key": keys, "order": keys, "crop": [0] * count, "source": sources})
    table = table.append_column("bucket", pair_column(buckets)).take(draws.permutation(count))
    order = {"buckets": [(64, 128), (32, 32), (64, 64)], "sources": "dabc"}
    tables = [table.slice(start, 70) for start in range(0, count, 70)]
    blocks = list(blocks_by_bucket(tables, 16, **order, work=Work(DriverConfig())))
    with monkeypatch.context() as patch:  # every few rows are a run of their own, and a part
        patch.setattr(runs, "SHARES", 2**16)
        patch.setattr(runs, "SAMPLED", 2)
        assert list(blocks_by_bucket(tables, 16, **order, work=Work(DriverConfig()))) == blocks
    seen = []
    for block in blocks:
        rows = block.to_pylist()
        (bucket,) = {tuple(row["bucket"]) for row in rows}
        for unit in {row["unit"] for row in rows}:
            members = [row for row in rows if row["unit"] == unit]
            assert unit.startswith(f"{bucket[0]}x{bucket[1]}/")
            assert len({row["source"] for row in members}) == 1
            assert {row["unit_rows"] for row in members} == {len(members)}
        seen += [(bucket, row["source"], row["key"]) for row in rows]
    assert seen == sorted(zip(map(tuple, buckets), sources, keys, strict=True))
    assert len(blocks) == sum(math.ceil(buckets.count(bucket) / 16) for bucket in ([64, 64], [64, 128]))
    assert len({row["unit"] for block in blocks for row in block.to_pylist()}) <= len(blocks) + 2 * 2
