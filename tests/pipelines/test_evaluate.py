"""Evaluation without a cluster: what its actors say of pictures, and how it follows a run that goes on beside it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.config import VAE_PRESETS
from model.metrics import psnr, ssim
from model.vae import VAE
from model.weights import Kind, save_weights
from pipelines import networks
from pipelines.clean import pinned_by_evaluation
from pipelines.config import SourceConfig, WeightsConfig
from pipelines.evaluate import evaluate as module
from pipelines.evaluate import subjects as subjects_module
from pipelines.evaluate.config import EvaluateConfig, InceptionConfig, ReconstructConfig
from pipelines.evaluate.evaluate import Result, evaluate
from pipelines.evaluate.measure import SCHEMA, MeasurePictures, MeasureReconstructions
from pipelines.evaluate.subjects import subjects
from pipelines.images import content_id
from pipelines.lease import lease
from pipelines.originals import Originals
from pipelines.schema import INDEX_SCHEMA, SCHEMA_VERSION, DataFile, write_manifest
from pipelines.storage import Storage, StorageOptions

SIZE = (32, 48)
OPTIONS = StorageOptions()


class Pooled(nn.Module):
    """Stands for Inception."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def config(tmp_path: Path, **settings) -> EvaluateConfig:
    return EvaluateConfig(
        network="vae",
        source=SourceConfig(path=f"{tmp_path}/images"),
        reconstruct=ReconstructConfig(
            vae=WeightsConfig(preset="tiny", path=f"{tmp_path}/run"), index=f"{tmp_path}/index", size=SIZE
        ),
        **settings,
    )


def evaluated(config: EvaluateConfig, output: Storage) -> Iterator[Result]:
    """The results, as a job has them that holds the output's lease."""
    with lease(output) as held:
        yield from evaluate(config, held)


@pytest.fixture
def inception(tmp_path) -> InceptionConfig:
    torch.jit.script(Pooled()).save(tmp_path / "inception.pt")
    return InceptionConfig(path=f"{tmp_path}/inception.pt")


@pytest.fixture
def vae(tmp_path) -> VAE:
    torch.manual_seed(0)
    network = VAE(VAE_PRESETS["tiny"])
    save_weights(tmp_path / "vae.safetensors", network.state_dict(), Kind.VAE, network.config)
    return network.eval()


def originals(tmp_path: Path) -> Originals:
    return Originals((SourceConfig(path=f"{tmp_path}/images"),), OPTIONS)


def stored(tmp_path: Path) -> tuple[pa.Table, list[np.ndarray]]:
    """Rows of two images of other sizes than SIZE, and what their middles are."""
    images, rows, middles = Storage(f"{tmp_path}/images"), [], []
    draws = np.random.default_rng(0)
    for number, (height, width) in enumerate([(32, 60), (40, 48)]):
        pixels = draws.integers(0, 256, (height, width, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.write(f"{number}.png", buffer.getvalue())
        row = {
            "number": number,
            "source": "source",
            "path": f"{number}.png",
            "id": content_id(buffer.getvalue()),
            "caption": "noise",
        }
        rows.append(row | {"size": list(SIZE)})
        top, left = (height - SIZE[0]) // 2, (width - SIZE[1]) // 2
        middles.append(pixels[top : top + SIZE[0], left : left + SIZE[1]])
    return pa.Table.from_pylist(rows, SCHEMA), middles


def features(column: pa.ChunkedArray) -> Tensor:
    return torch.tensor(np.frombuffer(b"".join(column.to_pylist()), np.float32)).view(len(column), -1)


def test_reconstructions_are_measured_on_the_middle_of_each_image_as_8_bit_pictures(tmp_path, inception, vae):
    rows, middles = stored(tmp_path)
    stage = MeasureReconstructions(
        config(tmp_path, inception=inception, shown=1),
        OPTIONS,
        originals(tmp_path),
        10**6,
        f"{tmp_path}/vae.safetensors",
    )
    found = stage(rows)
    image = torch.from_numpy(np.stack(middles)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        made = ((vae.decode(vae.encode(image).mean).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    assert found.column("psnr").to_pylist() == pytest.approx(psnr(image, made).tolist(), rel=1e-5)
    assert found.column("ssim").to_pylist() == pytest.approx(ssim(image, made).tolist(), rel=1e-4)
    for name, expected in (("features_real", image), ("features_made", made)):
        torch.testing.assert_close(features(found.column(name)), Pooled()(expected), atol=0.02, rtol=0)
    first, second = found.column("picture").to_pylist()
    assert second is None
    shown = np.asarray(Image.open(io.BytesIO(first)))
    assert np.array_equal(shown[: SIZE[0]], middles[0])  # and its reconstruction below
    assert shown.shape == (2 * SIZE[0], SIZE[1], 3)


def test_an_image_that_has_changed_since_it_was_indexed_is_named(tmp_path, inception):
    rows, _ = stored(tmp_path)
    shutil.copy(tmp_path / "images/0.png", tmp_path / "images/1.png")
    stage = MeasurePictures(config(tmp_path, inception=inception), OPTIONS, originals(tmp_path), 10**6)
    assert len(features(stage(rows.slice(0, 1)).column("features"))) == 1
    with pytest.raises(RuntimeError, match=r"1\.png cannot be measured: its bytes have changed"):
        stage(rows)


class Run:
    """A training run's folder, as another process writes it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, images: int) -> None:
        settings = {"schedule": {"images": images}}
        self._write("run.json", {"settings": settings, "run_id": "1"})

    def checkpoint(self, images_seen: int) -> None:
        self._write(f"checkpoints/checkpoint_{images_seen}/progress.json", {"images_seen": images_seen})

    def delete(self, images_seen: int) -> None:
        shutil.rmtree(self.root / f"checkpoints/checkpoint_{images_seen}")

    def finish(self, images: int, target: int) -> None:
        settings = {"schedule": {"images": target}}
        self._write("run.json", {"settings": settings, "run_id": "1", "finished_images": images})

    def _write(self, name: str, document: dict) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).write_text(json.dumps(document))


@pytest.fixture
def run(tmp_path, monkeypatch, vae) -> Run:
    """A run whose checkpoints hold `vae`, and an evaluation that measures their least weight."""

    def weights(checkpoint: Storage, name: str, network: nn.Module) -> dict[str, Tensor]:
        images_seen = checkpoint.read_json("progress.json")["images_seen"]  # FileNotFoundError where it is deleted
        assert (name, next(network.parameters()).device.type) == ("vae", "meta")
        return {key: value + images_seen for key, value in vae.state_dict().items()}

    def measure(config, subject, folder, held, index):
        folder.write("picture.png", b"made for it")
        return {
            "shift": float(
                (
                    networks.vae(WeightsConfig(preset="tiny", path=subject.path), StorageOptions()).quant_conv.bias
                    - vae.quant_conv.bias
                )
                .mean()
                .detach()
            )
        }, b"png"

    monkeypatch.setattr(subjects_module, "averaged_weights", weights)
    monkeypatch.setattr(module, "_reconstructions", measure)
    index(tmp_path, "a.png")
    return Run(tmp_path / "run")


def index(tmp_path: Path, *paths: str) -> str:
    """Commit an index of images with these paths; gives the version's digest."""
    dataset = Storage(f"{tmp_path}/index")
    name = f"data/{len(paths)}.parquet"
    told = {"key": "k", "source": "source", "id": "0", "captions": ["c"], "caption_weights": [1.0], "file_size": 1}
    told |= {"caption_reasons": [None], "bucket": [32, 32], "original_size": [32, 32]}
    rows = [dict.fromkeys(INDEX_SCHEMA.names) | told | {"path": path} for path in paths]
    dataset.write_table(name, pa.Table.from_pylist(rows, INDEX_SCHEMA))
    fingerprint = {"schema": SCHEMA_VERSION, "max_pixels": 10**6}
    content = {"counts": {"kept": len(rows)}, "fingerprint": fingerprint, "parents": {}}
    return write_manifest(dataset, [DataFile(name=name, rows=len(rows))], kind="index", **content).digest


def test_an_index_that_grows_beside_an_evaluation_changes_none_of_its_figures(run, tmp_path, monkeypatch):
    first, measured = index(tmp_path, "b.png", "c.png"), []

    def measure(config, subject, folder, held, pinned):
        rows = module.evaluated_rows(config, folder.options, pinned)
        measured.append((subject.images_seen, [row["path"] for row in rows]))
        index(tmp_path, "a.png", "b.png", "c.png")  # a nightly commit
        return {}, b"png"

    monkeypatch.setattr(module, "_reconstructions", measure)
    output = Storage(f"{tmp_path}/evaluation")
    run.start(64)
    run.checkpoint(16)
    run.checkpoint(32)
    watching = evaluated(config(tmp_path, watch=True), output)
    assert [next(watching).images_seen for _ in range(2)] == [16, 32]
    watching.close()
    run.checkpoint(48)
    again = evaluated(config(tmp_path, watch=True), output)  # started anew
    assert [(r.images_seen, r.measured) for r in (next(again) for _ in range(3))] == [
        (16, False),
        (32, False),
        (48, True),
    ]
    again.close()
    assert measured == [(images, ["b.png", "c.png"]) for images in (16, 32, 48)]
    assert pinned_by_evaluation(output) == {first}
    other = Storage(f"{tmp_path}/other")
    next(evaluated(config(tmp_path), other))
    assert measured[-1] == (48, ["a.png", "b.png", "c.png"])
    Storage(f"{tmp_path}/index").delete(f"manifests/{first}.json")
    with pytest.raises(FileNotFoundError, match=f"version {first} of .*, which is gone; choose another output"):
        next(evaluated(config(tmp_path), output))


def test_a_checkpoint_that_could_not_be_read_once_is_read_again_though_the_run_has_ended(run, tmp_path, monkeypatch):
    run.start(64)
    run.checkpoint(16)
    save_weights(run.root / "weights.safetensors", VAE(VAE_PRESETS["tiny"]).state_dict(), Kind.VAE, VAE_PRESETS["tiny"])
    run.finish(64, 64)
    reads, slept, read = [], [], subjects_module.averaged_weights

    def once_broken(*told):
        reads.append(1)
        if len(reads) == 1:
            raise OSError("try again")
        return read(*told)

    monkeypatch.setattr(subjects_module, "averaged_weights", once_broken)
    monkeypatch.setattr(module.time, "sleep", lambda _: slept.append(1))
    output = Storage(f"{tmp_path}/evaluation")
    results = list(evaluated(config(tmp_path, watch=True), output))
    assert {result.images_seen for result in results} == {16, 64}
    assert output.read_json("metrics.json")["missed"] == []


def test_a_checkpoint_that_is_gone_before_it_could_be_read_is_told_as_missed(run, tmp_path, monkeypatch):
    run.start(64)
    run.checkpoint(16)

    def broken(*_):
        raise OSError("try again")

    def end(_):
        run.delete(16)
        run.finish(64, 64)
        run.checkpoint(64)

    monkeypatch.setattr(subjects_module, "averaged_weights", broken)
    monkeypatch.setattr(module.time, "sleep", end)
    output = Storage(f"{tmp_path}/evaluation")
    save_weights(run.root / "weights.safetensors", VAE(VAE_PRESETS["tiny"]).state_dict(), Kind.VAE, VAE_PRESETS["tiny"])
    assert [result.images_seen for result in evaluated(config(tmp_path, watch=True), output)] == [64]
    assert output.read_json("metrics.json")["missed"] == ["000000000016"]


def test_of_many_checkpoints_some_are_measured_and_the_end_always(run, tmp_path, monkeypatch):
    run.start(64)
    for images_seen in (8, 16, 24, 32, 40, 48):
        run.checkpoint(images_seen)
    save_weights(run.root / "weights.safetensors", VAE(VAE_PRESETS["tiny"]).state_dict(), Kind.VAE, VAE_PRESETS["tiny"])
    run.finish(52, 52)
    results = evaluated(config(tmp_path, watch=True, every_images=20), Storage(f"{tmp_path}/evaluation"))
    assert [result.images_seen for result in results] == [8, 24, 40, 52]


def test_watching_follows_a_run_from_before_its_start_to_its_end(run, tmp_path, monkeypatch, vae):
    def finish() -> None:
        run.checkpoint(64)
        run.delete(48)
        save_weights(
            run.root / "weights.safetensors", {k: v + 64 for k, v in vae.state_dict().items()}, Kind.VAE, vae.config
        )
        run.finish(64, 64)

    story = iter(
        [
            lambda: run.start(64),
            lambda: (run.checkpoint(16), run.checkpoint(32)),
            lambda: (run.delete(16), run.delete(32), run.checkpoint(48)),
            finish,
        ]
    )
    monkeypatch.setattr(module.time, "sleep", lambda _: next(story)())
    output = Storage(f"{tmp_path}/evaluation")
    results = evaluated(config(tmp_path, watch=True), output)
    first = next(results)
    run.delete(16)  # what is copied can be measured all the same
    run.checkpoint(16)
    assert output.exists("weights/000000000032.safetensors")
    found = [first, *results]
    assert [(r.images_seen, round(r.numbers["shift"])) for r in found] == [(16, 16), (32, 32), (48, 48), (64, 64)]
    assert all(result.measured for result in found)
    assert output.list("weights") == []  # no copy stays
    summary = output.read_json("metrics.json")
    assert [row["images_seen"] for row in summary["results"]] == [16, 32, 48, 64]
    assert summary["missed"] == []
    again = list(evaluated(config(tmp_path, watch=True), output))  # whose checkpoints are gone, but for the last
    assert [(r.images_seen, r.measured, r.numbers) for r in again] == [(r.images_seen, False, r.numbers) for r in found]


def test_a_run_that_is_trained_longer_is_not_at_its_end(run, tmp_path, monkeypatch, vae):
    run.finish(16, target=32)
    save_weights(run.root / "weights.safetensors", vae.state_dict(), Kind.VAE, vae.config)
    slept = []
    monkeypatch.setattr(module.time, "sleep", lambda _: (slept.append(1), run.finish(32, target=32)))
    results = list(evaluated(config(tmp_path, watch=True), Storage(f"{tmp_path}/evaluation")))
    assert [result.images_seen for result in results] == [16, 32]
    assert slept == [1]


def test_a_copy_that_a_killed_evaluation_left_is_measured(run, tmp_path, monkeypatch):
    run.start(64)
    run.checkpoint(16)
    output = Storage(f"{tmp_path}/evaluation")
    weights = WeightsConfig(preset="tiny", path=f"{tmp_path}/run")
    (subject,) = subjects(weights, Kind.VAE, StorageOptions())
    subjects_module.copied_out(subject, weights, Kind.VAE, output)
    run.delete(16)
    assert next(evaluated(config(tmp_path, watch=True), output)).images_seen == 16


def test_a_checkpoint_that_cannot_be_read_for_long_is_an_error(run, tmp_path, monkeypatch):
    run.start(64)
    run.checkpoint(16)
    monkeypatch.setattr(module, "COPY_ATTEMPTS", 2)
    monkeypatch.setattr(module.time, "sleep", lambda _: None)

    def missing(*_):
        raise ValueError("a part is missing")

    monkeypatch.setattr(subjects_module, "averaged_weights", missing)
    with pytest.raises(RuntimeError, match=r"checkpoint_16 cannot be read: a part is missing"):
        next(evaluated(config(tmp_path, watch=True), Storage(f"{tmp_path}/evaluation")))


def test_without_watching_the_newest_state_is_measured_once(run, tmp_path):
    output = Storage(f"{tmp_path}/evaluation")
    run.start(64)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        next(evaluated(config(tmp_path), output))
    run.checkpoint(16)
    run.checkpoint(32)
    assert [(r.images_seen, r.measured) for r in evaluated(config(tmp_path), output)] == [(32, True)]
    assert [(r.images_seen, r.measured) for r in evaluated(config(tmp_path), output)] == [(32, False)]
    run.checkpoint(48)
    assert [(r.images_seen, r.measured) for r in evaluated(config(tmp_path), output)] == [(48, True)]
    assert [row["images_seen"] for row in output.read_json("metrics.json")["results"]] == [32, 48]
