"""The encode stage without a cluster: crops with their conditioning, and the encoder as a plain object."""

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from model.config import TEXT_PRESETS
from model.text import tokenize
from model.tiling import encode_tiled
from model.vae import VAE as VAE_CLASS
from pipelines import images, networks
from pipelines.config import CropConfig, SourceConfig, TextWeightsConfig, WeightsConfig
from pipelines.images import content_id, crop_pixels, draw_crop
from pipelines.originals import Originals
from pipelines.preprocess.config import EncodeConfig
from pipelines.preprocess.crop import PIXELS, crop_images, rows_of_crops
from pipelines.preprocess.encode import Encoder, checked
from pipelines.preprocess.write import FAILURE, cut, write_units
from pipelines.ranges import StorageError
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, DataFile, latents_schema, tensor_array, write_manifest
from pipelines.storage import Storage, StorageOptions
from pipelines.train.batches import LatentReader
from tests import deadly

BUCKET = (16, 24)
CROP = CropConfig(flip_chance=0.5, seed=3)
VAE, TEXT = WeightsConfig(preset="tiny", seed=1), TextWeightsConfig(preset="tiny", seed=2)
LATENT = (4, BUCKET[0] // 4, BUCKET[1] // 4)
SHAPES = (LATENT, (77, 96), (64,))
COUNTED = ("vae_slots", "vae_slots_filled", "captions", "captions_encoded")


@pytest.fixture
def source(tmp_path):
    return Storage(str(tmp_path / "images"))


@pytest.fixture(scope="module")
def encoder():
    return Encoder(VAE, TEXT, EncodeConfig(batch=2, text_batch=2), StorageOptions())


def picture(number: int) -> Image.Image:
    draws = np.random.default_rng(number)
    return Image.fromarray(draws.integers(0, 256, (20 + number, 50, 3), dtype=np.uint8))


def originals(source: Storage) -> Originals:
    return Originals([SourceConfig(path=source.uri)], source.options)


def kept(source: Storage, captions: list[str | list[str]], crops: int = 1) -> pa.Table:
    """One unit of index rows, as the latents stage receives it; an image has one caption, or a list of them."""
    rows = []
    for number, caption in enumerate(captions):
        buffer = io.BytesIO()
        picture(number).save(buffer, "PNG")
        source.write(f"{number}.png", buffer.getvalue())
        known = {"key": f"k{number}", "id": content_id(buffer.getvalue())}
        texts = [caption] if isinstance(caption, str) else caption
        known |= {"captions": texts, "caption_weights": [1 / len(texts)] * len(texts)}
        known |= {"source": "source", "path": f"{number}.png"}
        sizes = {"original_size": [20 + number, 50], "bucket": list(BUCKET), "aesthetic_score": number + 0.5}
        rows.append(known | sizes)
    columns = [name for name in INDEX_SCHEMA.names if name not in ("file_size", "reject_reason", "reject_detail")]
    schema = pa.schema([INDEX_SCHEMA.field(name) for name in columns])
    kept = rows_of_crops(pa.Table.from_pylist(rows, schema), crops)
    (unit,) = cut(kept, kept.num_rows, "16x24")
    return unit


def test_an_image_that_kills_its_decoder_is_a_failed_row_and_the_others_are_cropped_as_ever(source, monkeypatch):
    unit = kept(source, ["a", "b"])
    expected = crop_images(unit, originals(source), CROP, 10_000).to_pylist()
    deadly_png = source.read("0.png") + deadly.SEGFAULT
    source.write("0.png", deadly_png)
    rows = [row | ({"id": content_id(deadly_png)} if row["path"] == "0.png" else {}) for row in unit.to_pylist()]
    monkeypatch.setattr("pipelines.preprocess.crop.read_crops", deadly.read_crops)
    table = pa.Table.from_pylist(rows, unit.schema)
    found = crop_images(table, originals(source), CROP, 10_000, attempt=lambda: 1).to_pylist()
    timing = "unit_seconds_crop"
    assert found[1] | {timing: 0} == expected[1] | {timing: 0}
    assert found[0][FAILURE] == "DecoderKilledError: ended by SIGSEGV, in each of 2 processes of its own"


def test_a_crop_travels_with_its_true_conditioning(source):
    unit = kept(source, ["a", "b", "c"])
    rows = crop_images(unit, originals(source), CROP, 10_000)
    assert rows.column("unit").to_pylist() == unit.column("unit").to_pylist()
    for number, row in enumerate(rows.to_pylist()):
        top_left, flip = draw_crop((20 + number, 50), BUCKET, CROP, row["id"])
        assert (tuple(row["crop_top_left"]), row["flip"]) == (top_left, flip)
        assert row["target_size"] == list(BUCKET)
        assert row["original_size"] == [20 + number, 50]
        assert row[FAILURE] is None
        assert row[PIXELS] == crop_pixels(picture(number), BUCKET, top_left, flip).tobytes()


def test_each_crop_of_an_image_is_a_row_drawn_by_its_number_and_the_image_is_decoded_once(source, monkeypatch):
    opened = []
    read = images.decode_reduced
    monkeypatch.setattr(images, "decode_reduced", lambda *given: opened.append(given) or read(*given))
    one, three = (kept(source, ["a", "b"], crops) for crops in (1, 3))
    assert three.column("crop").to_pylist() == [0, 1, 2] * 2
    keys = three.column("key").to_pylist()
    assert (keys[::3], len(set(keys))) == (one.column("key").to_pylist(), 6)
    assert kept(source, ["a", "b"], 2).column("key").to_pylist() == [*keys[:2], *keys[3:5]]
    found = crop_images(three, originals(source), CROP, 10_000).to_pylist()
    assert len(opened) == 2
    for row in found:
        draw = row["id"] if row["crop"] == 0 else f"{row['id']} crop {row['crop']}"
        number = int(row["path"][0])
        top_left, flip = draw_crop((20 + number, 50), BUCKET, CROP, draw)
        assert (tuple(row["crop_top_left"]), row["flip"]) == (top_left, flip)
        assert row[PIXELS] == crop_pixels(picture(number), BUCKET, top_left, flip).tobytes()
    assert len({(row["path"], *row["crop_top_left"], row["flip"]) for row in found}) > 2
    source.delete("1.png")
    failed = [row["crop"] for row in crop_images(three, originals(source), CROP, 10_000).to_pylist() if row[FAILURE]]
    assert failed == [0, 1, 2]


def test_an_image_that_changed_or_went_is_a_failure_and_the_others_are_not(source):
    unit = kept(source, ["a", "b", "c"])
    source.write("0.png", source.read("1.png"))
    source.delete("2.png")
    first, second, third = crop_images(unit, originals(source), CROP, 10_000).column(FAILURE).to_pylist()
    assert "changed since it was indexed" in first
    assert second is None
    assert "2.png" in third
    assert source.root not in third


def test_a_failing_storage_ends_the_job_and_is_no_failure_of_an_image(source, monkeypatch):
    unit = kept(source, ["a"])

    def fail(*_: object) -> bytes:
        raise StorageError("connection reset")

    monkeypatch.setattr(Originals, "read", fail)
    with pytest.raises(StorageError):
        crop_images(unit, originals(source), CROP, 10_000)


def test_rows_are_encoded_as_one_image_and_one_caption_at_a_time_would_be(source, encoder):
    captions = ["a cat", "a dog", "a cat", "", "a bird"]
    rows = crop_images(kept(source, captions), originals(source), CROP, 10_000)
    latents = encoder(rows)
    assert latents.column("key").to_pylist() == [f"k{n}" for n in range(5)]
    assert latents.column("captions").to_pylist() == [[caption] for caption in captions]
    vae, text = networks.vae(VAE, StorageOptions()), networks.text_encoders(TEXT)
    mean, std = tensor_array(latents, "latent_mean"), tensor_array(latents, "latent_std")
    context, pooled = tensor_array(latents, "context"), tensor_array(latents, "pooled")
    assert (mean.shape, context.shape, pooled.shape) == ((5, *LATENT), (5, 77, 96), (5, 64))
    with torch.no_grad():
        for number, pixels in enumerate(rows.column(PIXELS).to_pylist()):
            image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, *BUCKET, 3).permute(0, 3, 1, 2)
            posterior = vae.encode(image / 127.5 - 1)
            features = text(tokenize([captions[number]], TEXT_PRESETS["tiny"]))
            for found, expected in (
                (mean[number], posterior.mean),
                (std[number], posterior.std),
                (context[number], features.context),
                (pooled[number], features.pooled),
            ):
                np.testing.assert_allclose(found, expected[0].numpy(), rtol=2e-3, atol=2e-3)
    assert np.array_equal(context[0], context[2])
    assert not np.array_equal(context[0], context[1])


def test_crops_larger_than_a_tile_are_encoded_in_tiles(source, encoder, monkeypatch):
    rows = crop_images(kept(source, ["a cat", "a dog", "a bird"]), originals(source), CROP, 10_000)
    whole = encoder(rows)
    sizes = []
    plain = VAE_CLASS.encode
    monkeypatch.setattr(VAE_CLASS, "encode", lambda self, x: sizes.append(tuple(x.shape[2:])) or plain(self, x))
    monkeypatch.setattr(encoder, "config", replace(encoder.config, tile=48))
    assert encoder(rows).column("latent_mean").equals(whole.column("latent_mean"))
    assert sizes == [BUCKET] * 2
    sizes.clear()
    monkeypatch.setattr(encoder, "config", replace(encoder.config, tile=16))
    tiled = encoder(rows)
    assert sizes == [(12, 20), (16, 16), (16, 16)] * 2  # a small copy for the norms, then both tiles, for each pass
    pixels = np.stack([np.frombuffer(row, np.uint8).reshape(*BUCKET, 3) for row in rows.column(PIXELS).to_pylist()])
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = encode_tiled(encoder.vae, image, tile=16, overlap=4)
    np.testing.assert_allclose(tensor_array(tiled, "latent_mean"), expected.mean.numpy(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(tensor_array(tiled, "latent_std"), expected.std.numpy(), rtol=2e-3, atol=2e-3)
    assert not tiled.column("latent_mean").equals(whole.column("latent_mean"))


def test_an_image_of_several_captions_has_the_text_of_each_and_distinct_ones_are_encoded_once(source):
    encoder = Encoder(VAE, TEXT, EncodeConfig(batch=2, text_batch=2), StorageOptions())
    captions = [["a cat", "a pet"], ["a dog"], ["a pet", "a dog", "a beast"]]
    seen: list[int] = []
    with encoder.text.register_forward_hook(lambda layer, tokens, features: seen.append(len(features.pooled))):
        latents = encoder(crop_images(kept(source, captions), originals(source), CROP, 10_000))
    assert sum(seen) == 4
    assert [sum(latents.column(f"unit_count_{name}").to_pylist()) for name in COUNTED] == [4, 3, 6, 4]
    assert latents.column("captions").to_pylist() == captions
    seen.clear()
    with encoder.text.register_forward_hook(lambda layer, tokens, features: seen.append(len(features.pooled))):
        again = encoder(crop_images(kept(source, captions), originals(source), CROP, 10_000))
        encoder.known.popitem(last=False)
        encoder(crop_images(kept(source, captions), originals(source), CROP, 10_000))
    assert seen == [1]  # the encoder knew all of them, and then all but one
    assert again.column("context").equals(latents.column("context"))
    forgetful = Encoder(VAE, TEXT, EncodeConfig(text_batch=1, kept_captions=2), StorageOptions())
    texts = ["a cat", "a pet", "a dog", "a beast"]
    alone = forgetful(crop_images(kept(source, texts), originals(source), CROP, 10_000))
    assert len(forgetful.known) == 2
    for name in ("context", "pooled"):
        assert [len(texts) for texts in latents.column(name).to_pylist()] == [2, 1, 3]
        np.testing.assert_allclose(
            tensor_array(latents, name), tensor_array(alone, name)[[0, 1, 2, 1, 2, 3]], rtol=2e-3, atol=2e-3
        )


def test_tokens_are_stored_in_place_of_embeddings_and_read_as_they_were(source, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "text_encoders", None)  # nothing of it is asked for
    encoder = Encoder(VAE, TEXT, EncodeConfig(text="tokens"), StorageOptions())
    captions = [["a cat", "a pet"], ["a dog"]]
    rows = encoder(crop_images(kept(source, captions), originals(source), CROP, 10_000))
    expected = tokenize([text for texts in captions for text in texts], TEXT_PRESETS["tiny"])
    assert np.array_equal(tensor_array(rows, "tokens"), torch.stack([expected.clip_l, expected.bigg], 1).numpy())
    dataset = Storage(str(tmp_path / "dataset"))
    write_units(rows, dataset, "data/x", "none")
    (file,) = dataset.list()
    written, told = dataset.read_table(file.name).schema, latents_schema(LATENT)
    assert written == told
    assert [field.metadata for field in written] == [field.metadata for field in told]
    content = {"counts": {}, "fingerprint": {"schema": SCHEMA_VERSION}, "parents": {}}
    manifest = write_manifest(dataset, [DataFile(name=file.name, rows=2, bucket=BUCKET)], kind="latents", **content)
    read = [LatentReader(dataset, manifest, seed=0).read(np.array([[0, 0], [0, 1]]), BUCKET, n) for n in range(20)]
    assert {batch.tokens.dtype for batch in read} == {torch.int64}
    assert all(batch.context.shape == batch.pooled.shape == (2, 0) for batch in read)
    for place, texts in ((0, [0, 1]), (1, [2])):
        seen = {tuple(batch.tokens[place].flatten().tolist()) for batch in read}
        wanted = {tuple(torch.cat([expected.clip_l[text], expected.bigg[text]]).tolist()) for text in texts}
        assert seen == wanted


def test_latents_are_the_posteriors_and_not_scaled(source, encoder):
    rows = crop_images(kept(source, ["a"]), originals(source), CROP, 10_000)
    assert (tensor_array(encoder(rows), "latent_std") > 0).all()


@pytest.mark.parametrize("gone", [[0], [0, 1], [0, 1, 2]])
def test_failed_rows_pass_through_to_the_report(source, encoder, tmp_path, gone):
    unit = kept(source, ["a", "b", "c"])
    for number in gone:
        source.delete(f"{number}.png")
    dataset = Storage(str(tmp_path / "dataset"))
    latents = encoder(crop_images(unit, originals(source), CROP, 10_000))
    (report,) = write_units(latents, dataset, "data/x", "lz4").to_pylist()
    assert (report["rows"], len(report["failures"])) == (3 - len(gone), len(gone))
    assert {failure["path"] for failure in report["failures"]} == {f"{number}.png" for number in gone}
    left = [f"k{number}" for number in range(3) if number not in gone]
    assert [key for file in dataset.list() for key in dataset.read_table(file.name)["key"].to_pylist()] == left


def test_a_written_file_has_the_schema_of_latents(source, encoder, tmp_path):
    dataset = Storage(str(tmp_path / "dataset"))
    write_units(
        encoder(crop_images(kept(source, [["a", "c"], "b"]), originals(source), CROP, 10_000)), dataset, "data/x", "lz4"
    )
    (file,) = dataset.list()
    written, expected = dataset.read_table(file.name).schema, latents_schema(*SHAPES)
    assert written == expected
    assert [field.metadata for field in written] == [field.metadata for field in expected]


def test_values_that_are_not_finite_fail_their_row(source):
    unit = kept(source, ["a", "b"])
    broken = Encoder(VAE, TEXT, EncodeConfig(), StorageOptions())
    with torch.no_grad():
        next(broken.vae.parameters()).fill_(float("nan"))
    reasons = broken(crop_images(unit, originals(source), CROP, 10_000)).column(FAILURE).to_pylist()
    assert reasons == ["not finite in float32"] * 2


def test_an_image_that_overflows_in_float16_is_named_with_the_remedy_and_the_others_are_encoded(source, tmp_path):
    unit = kept(source, ["a", "b", "c"])
    half = Encoder(VAE, TEXT, EncodeConfig(dtype="float16", batch=2), StorageOptions())
    rows = crop_images(unit, originals(source), CROP, 10_000)
    whole = half(rows)
    assert whole.column(FAILURE).to_pylist() == [None] * 3

    def too_bright(layer, inputs, result):
        """One image blown up beyond 65,504."""
        bright = torch.tensor([torch.equal(one, marked) for one in inputs[0]])
        return torch.where(bright.view(-1, 1, 1, 1), result * 1e6, result)

    pixels = torch.frombuffer(bytearray(rows.column(PIXELS)[1].as_py()), dtype=torch.uint8).view(*BUCKET, 3)
    marked = (pixels.permute(2, 0, 1).float() / 127.5 - 1).half()
    half.vae.encoder.conv_in.register_forward_hook(too_bright)
    latents = half(rows)
    reason = "not finite in float16; set encode.dtype to bfloat16 or float32"
    assert latents.column(FAILURE).to_pylist() == [None, reason, None]
    for row in (0, 2):
        for name in ("latent_mean", "latent_std"):  # a pass of another size rounds differently on some processors
            one, other = (tensor_array(table, name)[row].astype(np.float32) for table in (latents, whole))
            np.testing.assert_allclose(one, other, rtol=0.01, atol=0.01)
    (report,) = write_units(latents, Storage(str(tmp_path / "dataset")), "data/x", "lz4").to_pylist()
    assert [(failure["path"], failure[FAILURE]) for failure in report["failures"]] == [("1.png", reason)]


def test_a_file_whose_text_would_not_fit_a_page_is_refused_before_anything_is_encoded():
    unit = pa.table({"captions": [[str(n) for n in range(5_000)]] * 16})
    tiny = TEXT_PRESETS["tiny"]
    fitting = [unit.slice(0, 14), unit.slice(0, 1)]
    assert list(checked(fitting, tiny)) == fitting
    with pytest.raises(ValueError, match=r"rows_per_file: 16 images with 80000 captions .* set it to 14 or less"):
        list(checked([unit.slice(0, 1), unit], tiny))
