"""Processes that are killed, at work, with kill -9: every stage ends with what an unbroken run gives."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file

from jobs import generate, preprocess, train_base, train_vae
from jobs.config import GenerateJob, PreprocessJob
from jobs.demo_images import render_images
from jobs.training_config import TrainBaseJob, TrainVAEJob
from pipelines.schema import Column, Reject, data_files, require_manifest
from pipelines.storage import TEMPORARY, Storage
from tests import deadly
from tests.conftest import SCHEDULE, Cluster, Demo, Finished, killing
from tests.in_process import without_ray


def content(dataset: Path, kind: str) -> dict[str, dict]:
    """Rows by path or id, whatever file they lie in."""
    storage = Storage(str(dataset))
    found: dict[str, dict] = {}
    for file in data_files(storage, require_manifest(storage, kind)):
        for row in storage.read_table(file.name).to_pylist():
            name = row[Column.PATH if kind == "index" else Column.ID]
            assert name not in found
            found[name] = row
    return found


def copy_of(finished: Finished, folder: Path, *parts: str) -> Demo:
    """A demo on some of the finished one's folders."""
    for part in parts:
        shutil.copytree(finished.root / part, folder / part)  # copytree keeps modification times
    return Demo(folder)


def test_index_after_its_worker_is_killed(finished: Finished, tmp_path: Path) -> None:
    demo = copy_of(finished, tmp_path, "images")
    some = lambda: any((tmp_path / "index").rglob("*.parquet"))  # noqa: E731
    with killing("MapBatches(measure)", some) as killed:
        preprocess.run_stage(demo.load(PreprocessJob, "preprocess", "index_rows_per_file=1"), "index")
    assert killed
    assert content(tmp_path / "index", "index") == content(finished.root / "index", "index")


def test_an_index_with_images_that_kill_their_decoder_has_all_the_others(cluster: Cluster, tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    render_images(tmp_path / "images", 12, 96)

    def index(name: str) -> dict[str, dict]:
        place = f'index="{tmp_path / name}"'
        preprocess.run_stage(demo.load(PreprocessJob, "preprocess", place, "index_rows_per_file=1000"), "index")
        return content(tmp_path / name, "index")

    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch)
        expected = index("without")
    for number in range(2):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((64, 64 + number)).save(buffer, "PNG")
        (tmp_path / "images" / f"deadly_{number}.png").write_bytes(buffer.getvalue() + deadly.SEGFAULT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.preprocess.pipeline.measure", deadly.measure)
        found = index("with")
    killers = [found.pop(f"deadly_{number}.png") for number in range(2)]
    assert [row[Column.REJECT_REASON] for row in killers] == [Reject.KILLS_DECODER] * 2
    assert "SIGSEGV" in killers[0][Column.REJECT_DETAIL]
    assert found == expected


def test_latents_after_the_encoder_is_killed(finished: Finished, tmp_path: Path) -> None:
    demo = copy_of(finished, tmp_path, "images", "index", "vae")
    some = lambda: any((tmp_path / "latents").rglob("*.parquet"))  # noqa: E731
    with killing("MapWorker(MapBatches(Encoder))", some) as killed:
        preprocess.run_stage(demo.load(PreprocessJob, "preprocess", "encode.rows_per_file=1"), "latents")
    assert killed
    ours, theirs = (content(root / "latents", "latents") for root in (tmp_path, finished.root))
    assert ours.keys() == theirs.keys()
    for name, row in ours.items():
        for column, value in row.items():
            if isinstance(value, bytes):  # passes of another size round differently
                one, other = (np.frombuffer(data, np.float16).astype(float) for data in (value, theirs[name][column]))
                np.testing.assert_allclose(one, other, rtol=0.02, atol=0.005)
            else:
                assert value == theirs[name][column]


def test_a_run_that_stopped_half_way_leaves_nothing_that_looks_finished(finished: Finished, tmp_path: Path) -> None:
    """What a killed driver leaves: some whole files, one half-written, and no manifest."""
    demo = copy_of(finished, tmp_path, "images", "index", "vae", "latents")
    whole = sorted((tmp_path / "latents" / "data").rglob("*.parquet"))
    shutil.rmtree(tmp_path / "latents" / "manifests")
    shutil.rmtree(tmp_path / "latents" / "files")
    (tmp_path / "latents" / "manifest.json").unlink()
    lost = whole[0]
    lost.with_name(f"{TEMPORARY}1").write_bytes(lost.read_bytes()[:100])
    lost.unlink()
    kept = {path: path.stat().st_mtime_ns for path in whole[1:]}
    job = demo.load(TrainBaseJob, "train_base", *SCHEDULE)
    with pytest.raises(FileNotFoundError, match="holds no finished latents"):
        train_base.run(job)
    preprocess.run_stage(demo.load(PreprocessJob, "preprocess"), "latents")
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # what was whole is not done again
    assert not list(tmp_path.rglob(f"{TEMPORARY}*"))
    assert content(tmp_path / "latents", "latents") == content(finished.root / "latents", "latents")


def test_training_of_two_networks_after_a_worker_is_killed_ends_with_the_same_weights(
    finished: Finished, tmp_path: Path
) -> None:
    demo = copy_of(finished, tmp_path, "images", "index")
    with killing("RayTrainWorker", lambda: 16 in checkpointed(tmp_path / "vae")) as killed:
        train_vae.run(demo.load(TrainVAEJob, "train_vae", *SCHEDULE, "task.loss.adversarial_start_images=16"))
    assert killed
    assert_same_weights(tmp_path / "vae", finished.root / "vae")
    assert curve(tmp_path, "images_seen", "vae") == [8, 16, 24, 32]  # neither a gap nor a point twice


def test_training_in_two_goes_with_a_worker_killed_and_the_export_missed_equals_training_in_one(
    finished: Finished, tmp_path: Path
) -> None:
    demo = copy_of(finished, tmp_path, "latents", "vae")
    base = tmp_path / "base"
    train_base.run(demo.load(TrainBaseJob, "train_base", "schedule.images=16", "schedule.checkpoint_images=16"))
    first = json.loads((base / "run.json").read_text())
    with killing("RayTrainWorker", lambda: 24 in checkpointed(base)) as killed:
        train_base.run(demo.load(TrainBaseJob, "train_base", "schedule.images=32", "schedule.checkpoint_images=8"))
    assert killed
    assert_same_weights(base, finished.root / "base")
    assert curve(tmp_path, "images_seen") == [8, 16, 24, 32]
    last = json.loads((base / "run.json").read_text())
    assert last["run_id"] == first["run_id"]

    (base / "weights.safetensors").unlink()  # as a driver leaves it that was killed before the export
    (base / "run.json").write_text(json.dumps({key: last[key] for key in last if key != "finished_images"}))
    others = ["workers.count=1", "workers.zero_stage=3"]  # who take up the same bits
    train_base.run(demo.load(TrainBaseJob, "train_base", *SCHEDULE, *others))
    assert_same_weights(base, finished.root / "base")
    assert curve(tmp_path, "images_seen") == [8, 16, 24, 32]


def test_pictures_after_the_generator_is_killed(finished: Finished, tmp_path: Path) -> None:
    demo = copy_of(finished, tmp_path, "index", "vae", "base", "refiner")
    some = lambda: any((tmp_path / "pictures" / "pictures").glob("*.png"))  # noqa: E731
    with killing("MapWorker(MapBatches(Generator))", some) as killed:
        generate.run(demo.load(GenerateJob, "generate", "generate.batch=1"))
    assert killed
    ours, theirs = (
        {p.name: p.read_bytes() for p in (r / "pictures/pictures").iterdir()} for r in (tmp_path, finished.root)
    )
    assert ours.keys() == theirs.keys()
    for name, data in ours.items():  # passes of another size round differently
        assert np.abs(pixels(data).astype(int) - pixels(theirs[name])).max() <= 2


def checkpointed(run: Path) -> set[int]:
    """Images that the whole checkpoints of a run had seen."""
    return {json.loads(path.read_text())["images_seen"] for path in run.glob("checkpoints/checkpoint_*/progress.json")}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def curve(root: Path, name: str, stage: str = "base") -> list[int]:
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name(f"sdxl-{stage}").experiment_id])
    assert len(runs) == 1
    return [point.step for point in client.get_metric_history(runs[0].info.run_id, name)]


def assert_same_weights(run: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
