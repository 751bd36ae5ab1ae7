import io
import itertools
import math
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from model.config import Conditioning
from pipelines.captions import in_lists
from pipelines.config import CropConfig, DriverConfig, SourceConfig
from pipelines.images import content_id, crop_pixels, draw_crop
from pipelines.latents import OF_CAPTIONS, TENSORS
from pipelines.originals import Originals
from pipelines.preprocess.write import write_rows
from pipelines.ranges import RangeReader
from pipelines.runs import Work
from pipelines.schema import (
    INDEX_SCHEMA,
    SCHEMA_VERSION,
    DataFile,
    latents_schema,
    require_manifest,
    tensor_column,
    write_manifest,
)
from pipelines.storage import Storage, StorageOptions
from pipelines.train import batches
from pipelines.train.batches import ImageReader, LatentReader, Slices, draw_caption
from pipelines.train.config import BatchConfig
from pipelines.train.listed import list_images
from pipelines.train.lost import LostImages
from pipelines.train.plan import Plan

CONTEXT, POOLED, SEED = (3, 5), (6,), 5
BUCKETS = {(16, 24): [4, 3], (24, 16): [5]}  # rows of each file


@pytest.fixture
def dataset(tmp_path):
    return Storage(str(tmp_path / "dataset"))


def values(number: int, bucket: tuple[int, int]) -> dict:
    """Row `number` of the dataset: every value of it tells the number, and those of text which of its captions."""
    height, width = bucket
    captions = range(1 + number % 3)
    latent = (4, height // 8, width // 8)
    return {
        "key": f"{number:04}",
        "id": f"id{number}",
        "captions": [f"caption {number} {k}" for k in captions],
        "caption_weights": [(k + 1) / sum(n + 1 for n in captions) for k in captions],
        "original_size": [100 + number, 200 + number],
        "crop": 0,
        "crop_top_left": [number, 0],
        "target_size": list(bucket),
        "flip": bool(number % 2),
        "aesthetic_score": None if number == 2 else number / 2,
        "latent_mean": np.full(latent, number + 0.25, np.float16),
        "latent_std": np.full(latent, number + 0.5, np.float16),
        "context": [np.arange(15, dtype=np.float16).reshape(CONTEXT) + number + 100 * k for k in captions],
        "pooled": [np.arange(6, dtype=np.float16) - number - 100 * k for k in captions],
    }


def latents(dataset: Storage):
    """A small latents dataset; gives its manifest and the number of the first row of each file."""
    listed, firsts, number = [], {}, 0
    for bucket, sizes in BUCKETS.items():
        for file, count in enumerate(sizes):
            name = f"data/x/{bucket[0]}x{bucket[1]}/{file}.parquet"
            rows = [values(number + k, bucket) for k in range(count)]
            schema = latents_schema(rows[0]["latent_mean"].shape, CONTEXT, POOLED)
            columns = []
            for field in schema:
                told = [row[field.name] for row in rows]
                if field.name in OF_CAPTIONS:
                    places = np.repeat(np.arange(count), [len(values) for values in told])
                    columns.append(in_lists(count, places, tensor_column(np.concatenate(told)), field.type))
                elif field.name in TENSORS:
                    columns.append(tensor_column(np.stack(told)))
                else:
                    columns.append(pa.array(told, field.type))
            write_rows(pa.Table.from_arrays(columns, schema=schema), dataset, name, "none")
            listed.append(DataFile(name=name, rows=count, bucket=bucket))
            firsts[name] = number
            number += count
    content = {"counts": {}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}}
    return write_manifest(dataset, listed, kind="latents", **content), firsts


@pytest.fixture
def reader(dataset):
    return LatentReader(dataset, latents(dataset)[0], SEED)


def numbers(batch) -> list[int]:
    return [int(mean) for mean in batch.mean[:, 0, 0, 0]]


def alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_a_batch_holds_exactly_the_rows_that_were_asked_for(dataset):
    manifest, firsts = latents(dataset)
    reader = LatentReader(dataset, manifest, SEED)
    wide = [n for n, file in enumerate(reader.files) if file.bucket == (16, 24)]
    rows = np.array([[wide[0], 1], [wide[0], 2], [wide[1], 0]])
    batch = reader.read(rows, (16, 24), first=40)
    assert reader.names(rows[::-1]) == [f"{firsts[reader.files[file].name] + row:04}" for file, row in rows[::-1]]
    expected = [values(firsts[reader.files[file].name] + row, (16, 24)) for file, row in rows.tolist()]
    for place, row in enumerate(expected):
        drawn = draw_caption(np.array(row["caption_weights"]), SEED, 40 + place)
        row |= {name: row[name][drawn] for name in ("context", "pooled")}
    assert (batch.first, batch.bucket) == (40, (16, 24))
    for name, tensor in (
        ("latent_mean", batch.mean),
        ("latent_std", batch.std),
        ("context", batch.context),
        ("pooled", batch.pooled),
        *((name.value, batch.conditions[name]) for name in Conditioning if name != Conditioning.AESTHETIC_SCORE),
    ):
        assert tensor.dtype == (torch.float32 if name in batch.conditions else torch.float16)
        assert np.array_equal(tensor.numpy(), np.stack([row[name] for row in expected]))


def test_scores_are_one_column_and_missing_ones_are_not_a_number(reader):
    (file,) = [n for n, file in enumerate(reader.files) if file.name.endswith("16x24/0.parquet")]
    scores = reader.read(np.array([[file, row] for row in range(4)]), (16, 24), 0).conditions["aesthetic_score"]
    assert scores.shape == (4, 1)
    assert scores[:, 0].tolist()[:2] == [0.0, 0.5]
    assert math.isnan(scores[2, 0])


def test_captions_are_drawn_by_their_weights_and_an_images_draw_depends_on_its_number_alone(dataset, reader):
    def drawn(batch) -> list[int]:
        return [
            int(value - number) // 100 for value, number in zip(batch.context[:, 0, 0], numbers(batch), strict=True)
        ]

    weights = np.array([0.125, 0.0, 0.5, 0.375])
    counts = np.bincount([draw_caption(weights, 1, number) for number in range(5_000)], minlength=4) / 5_000
    np.testing.assert_allclose(counts, weights, atol=0.021)  # three deviations
    plan = Plan(reader.files, BatchConfig(global_size=6, micro_size=6))
    seen: dict[int, set[int]] = {}
    for step in range(80):
        planned = plan.step(step)
        whole = reader.read(planned.rows, planned.bucket, step * 6)
        assert torch.equal(whole.context[:, 0, 0], -whole.pooled[:, 0])  # both are of the same caption
        halves = [reader.read(planned.rows[k : k + 3], planned.bucket, step * 6 + k) for k in (3, 0)]  # two workers
        assert drawn(whole) == drawn(halves[1]) + drawn(halves[0])
        for number, caption in zip(numbers(whole), drawn(whole), strict=True):
            seen.setdefault(number, set()).add(caption)
    assert seen == {number: set(range(1 + number % 3)) for number in range(12)}


def test_rows_in_the_order_of_the_plan_keep_it(dataset):
    manifest, firsts = latents(dataset)
    reader = LatentReader(dataset, manifest, SEED)
    plan = Plan(reader.files, BatchConfig(global_size=6, micro_size=6))
    for step in range(12):
        planned = plan.step(step)
        batch = reader.read(planned.rows, planned.bucket, step * 6)
        assert numbers(batch) == [firsts[reader.files[file].name] + row for file, row in planned.rows]


def test_files_that_were_closed_are_opened_again(dataset, monkeypatch):
    manifest, _ = latents(dataset)
    plenty, scarce = LatentReader(dataset, manifest, SEED), LatentReader(dataset, manifest, SEED)
    plan = Plan(plenty.files, BatchConfig(global_size=3, micro_size=3))
    expected = [numbers(plenty.read(plan.step(n).rows, plan.step(n).bucket, 0)) for n in range(12)]
    monkeypatch.setattr(batches, "OPEN_FILES", 1)
    assert [numbers(scarce.read(plan.step(n).rows, plan.step(n).bucket, 0)) for n in range(12)] == expected


def test_only_the_tensors_of_the_rows_that_are_asked_for_are_read(reader, monkeypatch):
    """So workers that share a file do not each read all of it."""
    sizes = []
    read_into = RangeReader.read_into
    monkeypatch.setattr(
        RangeReader, "read_into", lambda self, to, offset: (sizes.append(len(to)), read_into(self, to, offset))
    )
    reader.read(np.array([[0, 0]]), reader.files[0].bucket, 0)  # opens the file, and looks at its page headers
    sizes.clear()
    batch = reader.read(np.array([[0, 1], [0, 3]]), reader.files[0].bucket, 0)
    assert sorted(sizes) == sorted(
        tensor[0].nbytes for tensor in (batch.mean, batch.std, batch.context, batch.pooled) for _ in range(2)
    )


def test_latents_on_s3_are_the_same(reader, dataset, s3):
    options = StorageOptions(s3_endpoint=s3.endpoint)
    remote = Storage(f"s3://{s3.bucket}/loader", options)
    for file in dataset.list():
        remote.write(file.name, dataset.read(file.name))
    there = LatentReader(remote, require_manifest(remote, "latents"), SEED)
    plan = Plan(reader.files, BatchConfig(global_size=3, micro_size=3))
    for number in range(6):
        planned = plan.step(number)
        one, other = (each.read(planned.rows, planned.bucket, 0) for each in (reader, there))
        assert all(
            torch.equal(getattr(one, name), getattr(other, name)) for name in ("mean", "std", "context", "pooled")
        )


@pytest.mark.parametrize("change", ["compressed", "several pages", "several row groups", "cut short"])
def test_a_file_of_another_layout_is_refused_or_ends_in_an_error(dataset, reader, change):
    name = reader.files[0].name
    table = dataset.read_table(name)
    if change == "cut short":
        dataset.write(name, dataset.read(name)[:-4])
    else:
        settings = {
            "compressed": {"compression": "lz4"},
            "several pages": {"compression": "none", "data_page_size": 1, "write_batch_size": 1},
            "several row groups": {"compression": "none", "row_group_size": 2},
        }[change]
        buffer = io.BytesIO()
        pq.write_table(table, buffer, use_dictionary=False, write_statistics=False, **settings)
        dataset.write(name, buffer.getvalue())
    again = LatentReader(dataset, require_manifest(dataset, "latents"), SEED)
    with pytest.raises(ValueError, match="make the latents anew" if change != "cut short" else "Parquet"):
        again.read(np.array([[0, 0]]), reader.files[0].bucket, 0)


@pytest.mark.parametrize("world", [3, 6])
def test_workers_that_do_not_divide_a_step_read_it_all_the_same(reader, world):
    plan, found = Plan(reader.files, BatchConfig(global_size=8, micro_size=1)), []
    for rank in range(world):
        part = iter(Slices(reader, plan, rank, world, step=3))
        found += [number for batch, weight in next(part) if weight for number in numbers(batch)]
        part.close()
    assert found == numbers(reader.read(plan.step(3).rows, plan.step(3).bucket, 0))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_workers_read_the_whole_step_between_them_in_micro_batches(reader, world):
    plan = Plan(reader.files, BatchConfig(global_size=8, micro_size=2))
    whole = [numbers(reader.read(plan.step(n).rows, plan.step(n).bucket, 0)) for n in range(3, 6)]
    found: list[list[int]] = [[], [], []]
    for rank in range(world):
        part = iter(Slices(reader, plan, rank, world, step=3))
        for place in range(3):
            micro, weights = zip(*next(part), strict=True)
            assert set(weights) == {1.0}
            assert [len(batch.mean) for batch in micro] == [2] * (4 // world)
            begin = (3 + place) * 8 + rank * 8 // world
            assert [batch.first for batch in micro] == list(range(begin, begin + 8 // world, 2))
            assert {batch.bucket for batch in micro} == {plan.step(3 + place).bucket}
            found[place] += [number for batch in micro for number in numbers(batch)]
        part.close()
    assert found == whole


def test_the_readers_error_is_raised_where_the_batch_is_asked_for(dataset, reader):
    for file in reader.files[1:]:
        dataset.delete(file.name)
    part = iter(Slices(reader, Plan(reader.files, BatchConfig(global_size=4, micro_size=4)), 0, 1, step=0))
    with pytest.raises(FileNotFoundError):
        list(itertools.islice(part, 20))
    assert alive() == []


def test_reading_ahead_ends_with_the_iterator(reader):
    part = iter(Slices(reader, Plan(reader.files, BatchConfig(global_size=4, micro_size=4)), 0, 1, step=0))
    assert alive() == []
    next(part)
    assert len(alive()) == 1
    part.close()
    assert alive() == []


def test_steps_are_read_beside_one_another_and_come_in_their_order(reader, monkeypatch):
    plan, read, begun = Plan(reader.files, BatchConfig(global_size=4, micro_size=4)), reader.read, threading.Event()

    def slow_first(rows, bucket, first):
        if first == 0:
            assert begun.wait(30)  # until the second step's read has begun
        else:
            begun.set()
        return read(rows, bucket, first)

    monkeypatch.setattr(reader, "read", slow_first)
    part = iter(Slices(reader, plan, 0, 1, step=0))
    assert [batch.first for _ in range(4) for batch, _ in next(part)] == [0, 4, 8, 12]
    part.close()


def test_waiting_is_measured(reader):
    slices = Slices(reader, Plan(reader.files, BatchConfig(global_size=4, micro_size=4)), 0, 1, step=0)
    part = iter(slices)
    next(part)
    assert slices.waited_seconds > 0
    part.close()


@pytest.fixture
def images(tmp_path, dataset):
    """An index over five images of two buckets, one rejected; gives a reader of them, and the pictures."""
    source = Storage(str(tmp_path / "images"))
    pictures, rows = {}, []
    for number in range(5):
        bucket = (16, 32) if number < 3 else (32, 16)
        draws = np.random.default_rng(number)
        picture = Image.fromarray(draws.integers(0, 256, (bucket[0] + 9, bucket[1] + 5, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        source.write(f"{number}.png", buffer.getvalue())
        image_id = content_id(buffer.getvalue())
        pictures[image_id] = (picture, bucket)
        known = {"key": f"{number}", "id": image_id, "source": "source", "path": f"{number}.png"}
        known |= {"captions": ["c"], "caption_weights": [1.0], "caption_reasons": [None], "file_size": 1}
        sizes = {"original_size": [picture.height, picture.width], "bucket": list(bucket)}
        rejected = {"reject_reason": "too_small" if number == 1 else None}
        rows.append(dict.fromkeys(INDEX_SCHEMA.names) | known | sizes | rejected)
    write_rows(pa.Table.from_pylist(rows, INDEX_SCHEMA), dataset, "data/x/a.parquet", "zstd")
    fingerprint = {"schema": SCHEMA_VERSION, "buckets": [[16, 32], [32, 16]]}
    content = {"counts": {"kept": 4}, "fingerprint": fingerprint, "parents": {}}
    manifest = write_manifest(dataset, [DataFile(name="data/x/a.parquet", rows=5)], kind="index", **content)
    crop = CropConfig(flip_chance=0.5)
    originals = Originals([SourceConfig(path=source.uri)], source.options)
    output = Storage(str(tmp_path / "run"))
    list_images(output, dataset, manifest, originals, Work(DriverConfig()))
    return ImageReader(output, originals, crop, 10_000), pictures, crop, source


def test_kept_images_are_read_by_bucket(images):
    reader, *_ = images
    assert [(file.bucket, file.rows) for file in reader.files] == [((16, 32), 2), ((32, 16), 2)]
    for bucket, numbers in enumerate(((0, 2), (3, 4))):
        assert sorted(reader.names(np.array([[bucket, 0], [bucket, 1]]))) == [f"source:{n}.png" for n in numbers]


def test_images_are_cropped_anew_by_their_number_in_the_run(images):
    reader, pictures, crop, _ = images
    rows = np.array([[0, 0], [0, 1], [0, 1]])
    batch = reader.read(rows, (16, 32), first=7)
    assert batch.image.shape == (3, 3, 16, 32)
    assert not torch.equal(batch.image[1], batch.image[2])
    wide = sorted(name for name, (_, bucket) in pictures.items() if bucket == (16, 32))
    for place, image in enumerate(batch.image):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        candidates = []
        for name in wide:
            picture = pictures[name][0]
            top_left, flip = draw_crop((picture.height, picture.width), (16, 32), crop, f"{name}:{7 + place}")
            candidates.append(crop_pixels(picture, (16, 32), top_left, flip))
        assert any(np.array_equal(pixels, candidate) for candidate in candidates)
    again = reader.read(rows, (16, 32), first=7)
    assert torch.equal(again.image, batch.image)


def test_pixels_span_minus_one_to_one(images):
    reader, *_ = images
    image = reader.read(np.array([[1, 0], [1, 1]]), (32, 16), first=0).image
    assert image.dtype == torch.float32
    assert -1 <= image.min() < -0.9
    assert 0.9 < image.max() <= 1


@pytest.mark.parametrize("change", ["gone", "other bytes"])
def test_for_an_image_that_is_lost_another_stands_the_same_in_every_cut_of_the_step(images, change):
    reader, _, _, source = images
    lost_name, other = reader.names(np.array([[0, 0], [0, 1]]))
    path = lost_name.partition(":")[2]
    expected = reader.read(np.array([[0, 1]]), (16, 32), first=7).image
    source.delete(path) if change == "gone" else source.write(path, b"other bytes")
    with pytest.raises(RuntimeError, match=rf"{path}: the index keeps it.*above task.lost_share, 0\."):
        reader.read(np.array([[0, 0]]), (16, 32), first=7)
    reader._lost = lost = LostImages(most_share=0.002)  # two of the first thousand
    assert torch.equal(reader.read(np.array([[0, 0]]), (16, 32), first=7).image, expected)
    assert torch.equal(reader.read(np.array([[0, 1], [0, 0]]), (16, 32), first=6).image[1:], expected)
    (found,) = lost.take()
    assert (found.name, found.instead, lost.count) == (lost_name, other, 2)
    assert found.reason == ("its file is gone" if change == "gone" else "its bytes have changed")
    assert lost.take() == []
    with pytest.raises(RuntimeError, match="It is lost image 3 of 4"):
        reader.read(np.array([[0, 0]]), (16, 32), first=7)


def test_no_held_out_image_stands_for_one_that_is_trained_on(images, monkeypatch):
    reader, _, _, source = images
    (first,) = reader.names(np.array([[0, 0]]))
    held_out = reader._images.row(0, 1)["id"]
    monkeypatch.setattr(batches, "is_held_out", lambda image_id, share: share == 0.5 and image_id == held_out)
    reader._lost = LostImages(most_share=1.0, held_out_share=0.5)
    source.delete(first.partition(":")[2])
    with pytest.raises(RuntimeError, match="cannot be used now, nor can one of the images beside it: its file is gone"):
        reader.read(np.array([[0, 0]]), (16, 32), first=7)


def test_more_images_are_waited_for_than_are_decoded_at_a_time(images, monkeypatch):
    reader, *_ = images
    reader._decoders = threading.BoundedSemaphore(2)
    all_asked, lock, counts = threading.Barrier(8), threading.Lock(), [0, 0]
    read, crop = reader._originals.read, batches.read_crop

    def fetched(row):
        all_asked.wait(30)  # for eight at a time
        return read(row)

    def counted(*told):
        with lock:
            counts[0] += 1
            counts[1] = max(counts)
        try:
            return crop(*told)
        finally:
            with lock:
                counts[0] -= 1

    monkeypatch.setattr(reader._originals, "read", fetched)
    monkeypatch.setattr(batches, "read_crop", counted)
    assert len(reader.read(np.array([[0, 0], [0, 1]] * 4), (16, 32), first=0).image) == 8
    assert 1 <= counts[1] <= 2


def test_storage_that_fails_loses_no_image(images, monkeypatch):
    reader, *_ = images
    reader._lost = lost = LostImages(most_share=1.0)

    def broken(_):
        raise OSError("out of reach")

    monkeypatch.setattr(reader._originals, "read", broken)
    with pytest.raises(RuntimeError, match=r"the index keeps it, and it cannot be read: out of reach"):
        reader.read(np.array([[0, 0]]), (16, 32), first=7)
    assert lost.count == 0


@pytest.mark.parametrize("change", ["gone", "other bytes", "another image"])
def test_an_image_that_is_not_the_indexed_one_is_named(images, change):
    reader, _, _, source = images
    for file in source.list():
        if change == "gone":
            source.delete(file.name)
        else:
            source.write(file.name, source.read("1.png") if change == "another image" else b"other bytes")
    with pytest.raises(RuntimeError, match=r"\d.png: the index keeps it"):
        reader.read(np.array([[0, 0]]), (16, 32), first=0)
