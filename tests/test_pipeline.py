"""The whole pipeline, once, on the real Ray, DeepSpeed and MLflow: what each stage leaves behind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from jobs import generate, preprocess, train_base
from jobs.config import GenerateJob, PreprocessJob
from jobs.training_config import TrainBaseJob
from model.config import UNET_PRESETS, VAE_PRESETS
from model.vae import VAE
from model.weights import Kind, load_unet, load_vae, save_weights
from pipelines import networks
from pipelines.checkpoints import newest_checkpoint
from pipelines.config import EXPERIMENTS, WeightsConfig
from pipelines.images import content_id, fit
from pipelines.schema import Column, data_files, pair_array, require_manifest, tensor_array
from pipelines.storage import Storage, StorageOptions
from tests.conftest import SCHEDULE, Finished
from tests.reference import kept_rows


def rows(dataset: Storage, kind: str) -> list[dict]:
    manifest = require_manifest(dataset, kind)
    return [row for file in data_files(dataset, manifest) for row in dataset.read_table(file.name).to_pylist()]


def test_every_input_is_one_index_row_with_its_verdict(finished: Finished) -> None:
    index = {row[Column.PATH]: row for row in rows(Storage(str(finished.root / "index")), "index")}
    files = {path.name for path in (finished.root / "images").iterdir() if path.suffix not in (".json", ".jsonl")}
    assert index.keys() == files
    assert Counter(row[Column.REJECT_REASON] for row in index.values()) == {
        None: finished.images,
        "unreadable": 1,
        "duplicate": 1,
        "no_caption": 1,
    }
    assert "truncated" in index["truncated.jpg"][Column.REJECT_DETAIL]
    for name, row in index.items():
        data = (finished.root / "images" / name).read_bytes()
        assert row[Column.ID] == content_id(data)
        if row[Column.REJECT_REASON] != "unreadable":
            with Image.open(finished.root / "images" / name) as image:
                assert row[Column.ORIGINAL_SIZE] == [image.height, image.width]


def test_latents_hold_each_kept_row_once_with_its_true_conditioning(finished: Finished) -> None:
    index, latents = Storage(str(finished.root / "index")), Storage(str(finished.root / "latents"))
    kept = {row[Column.KEY]: row for row in kept_rows(index, require_manifest(index, "index")).to_pylist()}
    manifest = require_manifest(latents, "latents")
    seen = []
    for file in data_files(latents, manifest):
        table = latents.read_table(file.name)
        height, width = file.bucket or (0, 0)
        assert tensor_array(table, Column.LATENT_MEAN).shape[1:] == (4, height // 4, width // 4)
        assert (tensor_array(table, Column.LATENT_STD) > 0).all()
        assert tensor_array(table, Column.CONTEXT).shape[1:] == (77, 96)
        assert tensor_array(table, Column.POOLED).shape[1:] == (64,)
        assert (pair_array(table, Column.TARGET_SIZE) == (height, width)).all()
        for row in table.drop_columns([Column.LATENT_MEAN, Column.LATENT_STD]).to_pylist():
            origin = kept[row[Column.KEY]]
            seen.append(row[Column.KEY])
            assert row[Column.ORIGINAL_SIZE] == origin[Column.ORIGINAL_SIZE]
            assert row[Column.AESTHETIC_SCORE] == origin[Column.AESTHETIC_SCORE]
            resized = fit(tuple(origin[Column.ORIGINAL_SIZE]), (height, width))
            top, left = row[Column.CROP_TOP_LEFT]
            assert 0 <= top <= resized[0] - height
            assert 0 <= left <= resized[1] - width
    assert sorted(seen) == sorted(kept)
    assert sum(manifest.counts.values()) == manifest.rows == len(kept)
    assert manifest.parents == {"index": require_manifest(index, "index").digest}
    assert {"vae", "text", "buckets", "schema", "crop"} <= manifest.fingerprint.keys()


def test_nothing_in_a_dataset_names_a_place(finished: Finished) -> None:
    for name in ("index", "latents"):
        for path in (finished.root / name).rglob("*"):
            if path.is_file():
                assert str(finished.root).encode() not in path.read_bytes(), path


def test_the_report_lies_beside_the_index_and_with_its_mlflow_run(finished: Finished) -> None:
    html = (finished.root / "index" / "report.html").read_text()
    assert require_manifest(Storage(str(finished.root / "index")), "index").digest in html
    assert html.count("<img") >= finished.images / 2
    client = MlflowClient(f"sqlite:///{finished.root}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENTS["index"])
    run = client.search_runs([experiment.experiment_id], order_by=["start_time"])[0]
    assert run.data.metrics["seconds_measure"] > 0
    assert Path(client.download_artifacts(run.info.run_id, "report.html")).read_text() == html


def test_running_preprocessing_again_does_nothing_and_changes_nothing(finished: Finished, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.root.glob("*/data/**/*.parquet")}
    manifests = [(finished.root / name / "manifest.json").read_bytes() for name in ("index", "latents")]
    preprocess.run(finished.load(PreprocessJob, "preprocess"))
    printed = capsys.readouterr().out
    assert "index: nothing new" in printed
    assert "latents: nothing new" in printed
    assert before == {path: path.stat().st_mtime_ns for path in finished.root.glob("*/data/**/*.parquet")}
    assert manifests == [(finished.root / name / "manifest.json").read_bytes() for name in ("index", "latents")]


def test_training_leaves_weights_that_load_and_moved(finished: Finished) -> None:
    vae = load_vae(finished.root / "vae" / "weights.safetensors")
    assert vae.config.scaling_factor != VAE_PRESETS["tiny"].scaling_factor
    for name in ("base", "refiner"):
        unet = load_unet(finished.root / name / "weights.safetensors", UNET_PRESETS[f"tiny-{name}"])
        assert float(unet.out[2].weight.detach().abs().max()) > 0  # starts at zero
        assert json.loads((finished.root / name / "run.json").read_text())["finished_images"] == 32


def test_scaled_latents_have_about_unit_deviation(finished: Finished) -> None:
    latents = Storage(str(finished.root / "latents"))
    manifest = require_manifest(latents, "latents")
    tables = [latents.read_table(file.name) for file in data_files(latents, manifest)]
    means = np.concatenate([tensor_array(table, Column.LATENT_MEAN).astype(np.float32).ravel() for table in tables])
    stds = np.concatenate([tensor_array(table, Column.LATENT_STD).astype(np.float32).ravel() for table in tables])
    deviation = (means.var() + np.square(stds).mean()) ** 0.5 * manifest.facts["vae"]["scaling_factor"]
    assert 0.7 < deviation < 1.4  # measured on other crops than these


def test_a_finished_run_has_nothing_to_do(finished: Finished, capsys) -> None:
    train_base.run(finished.load(TrainBaseJob, "train_base", *SCHEDULE))
    assert "nothing to do" in capsys.readouterr().out


def test_a_run_is_not_continued_with_other_settings(finished: Finished) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr: 0\.001 -> 0\.5"):
        train_base.run(finished.load(TrainBaseJob, "train_base", *SCHEDULE, "optimizer.lr=0.5"))


def test_latents_of_another_vae_or_other_text_encoders_are_refused(finished: Finished, tmp_path) -> None:
    output = f'output="{tmp_path}"'
    job = finished.load(TrainBaseJob, "train_base", *SCHEDULE, output, "task.text.seed=5")
    with pytest.raises(ValueError, match=r"other weights of task\.text"):
        train_base.run(job)
    torch.manual_seed(3)
    vae = VAE(VAE_PRESETS["tiny"])
    save_weights(tmp_path / "other.safetensors", vae.state_dict(), Kind.VAE, vae.config)
    job = finished.load(TrainBaseJob, "train_base", *SCHEDULE, output, f'task.vae.path="{tmp_path}/other.safetensors"')
    with pytest.raises(ValueError, match=r"other weights of task\.vae"):
        train_base.run(job)


def test_each_stage_has_its_run_on_the_mlflow_page(finished: Finished) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{finished.root}/mlflow.db")
    for stage in ("index", "latents", "vae", "base", "refiner", "generate"):
        experiment = client.get_experiment_by_name(f"sdxl-{stage}")
        runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
        run = runs[0]
        assert run.info.status == "FINISHED"
        assert "config.json" in {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    digest = require_manifest(Storage(str(finished.root / "latents")), "latents").digest
    base = client.search_runs([client.get_experiment_by_name("sdxl-base").experiment_id])[0]
    assert [item.dataset.digest for item in base.inputs.dataset_inputs] == [digest]
    assert base.data.params["optimizer.lr"] == "0.001"
    assert len(base.data.tags["code"]) == 32
    model = client.get_model_version_by_alias("sdxl-base", "newest")
    assert (model.run_id, model.tags["images_seen"]) == (base.info.run_id, "32")
    assert model.tags["weights"] == f"{finished.root}/base/weights.safetensors"
    for curve in ("loss_unet", "learning_rate_unet", "gradient_norm_unet", "images_seen"):
        steps = [point.step for point in client.get_metric_history(base.info.run_id, curve)]
        assert steps == [8, 16, 24, 32]
    assert client.get_metric_history(base.info.run_id, "images_per_second")
    vae = client.search_runs([client.get_experiment_by_name("sdxl-vae").experiment_id])[0]
    for run, curve in ((base, "validation/squared_error"), (vae, "validation/psnr"), (vae, "validation/ssim")):
        points = client.get_metric_history(run.info.run_id, curve)
        assert [point.step for point in points] == [16, 32]
        assert all(0 < point.value < 100 for point in points)
    pictures = [artifact.path for artifact in client.list_artifacts(base.info.run_id, "images")]
    assert any("+step+16+" in name.replace("%2B", "+") for name in pictures), pictures
    for name in ("samples", "samples_by_original_size"):  # all workers' shares are in it: no column is black
        with Image.open(client.download_artifacts(base.info.run_id, f"pictures/{name}/{16:010d}.jpg")) as picture:
            assert np.median(np.asarray(picture), axis=0).max(axis=1).min() > 2


def test_pictures_are_made_once_and_carry_their_prompt(finished: Finished) -> None:
    manifest = json.loads((finished.root / "pictures" / "manifest.json").read_text())
    assert len(manifest["pictures"]) == finished.images
    for row in manifest["pictures"]:
        with Image.open(finished.root / "pictures" / row["file"]) as image:
            assert [image.height, image.width] == row["size"]
            assert image.text["prompt"] == row["text"]
    assert manifest["contact_sheets"] == ["contact_sheets/0000.png"]
    assert (finished.root / "pictures" / "contact_sheets" / "0000.png").exists()


def test_a_checkpoint_stands_in_for_its_run(finished: Finished) -> None:
    name = newest_checkpoint(Storage(str(finished.root / "base")))
    run, checkpoint = (
        WeightsConfig(preset="tiny-base", path=str(path))
        for path in (finished.root / "base", finished.root / "base" / str(name))
    )
    options = StorageOptions()
    assert networks.unet_fingerprint(checkpoint, options) == networks.unet_fingerprint(run, options)
    assert networks.trained_diffusion(checkpoint, options) == networks.trained_diffusion(run, options)
    assert torch.equal(networks.unet(checkpoint, options).out[2].weight, networks.unet(run, options).out[2].weight)


def test_a_rerun_makes_only_the_pictures_that_are_missing(finished: Finished, tmp_path, capsys) -> None:
    rows = [{"caption": f"a red fox {k}", "without": None if k % 2 else "blue", "seed": k} for k in range(5)]
    settings = [
        f'output="{tmp_path}/pictures"',
        f'generate.prompts={{parquet = "{tmp_path}/prompts.parquet", size = [32, 64], per_prompt = 2, '
        'columns = {prompt = "caption", negative = "without", seed = "seed"}}',
        'generate.sampling.sampler="euler_ancestral"',
        'generate.sampling.refiner="sdedit"',
        "generate.sampling.strength=0.5",
    ]
    for count, more in ((3, ["generate.batch=4"]), (5, ["generate.batch=3"])):
        pq.write_table(pa.Table.from_pylist(rows[:count]), tmp_path / "prompts.parquet")
        generate.run(finished.load(GenerateJob, "generate", *settings, *more))
    printed = capsys.readouterr().out
    assert "generate: 6 of 6 pictures made" in printed
    assert "generate: 4 of 10 pictures made" in printed
    manifest = json.loads((tmp_path / "pictures" / "manifest.json").read_text())
    told = [(row["text"], row["negative"], row["seed"]) for row in manifest["pictures"]]
    assert told == [(r["caption"], r["without"], r["seed"] + more) for r in rows for more in (0, 1)]
    assert len({row["file"] for row in manifest["pictures"]}) == 10
    (tmp_path / "pictures" / manifest["pictures"][7]["file"]).unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures" / "pictures").iterdir()}
    generate.run(finished.load(GenerateJob, "generate", *settings))
    assert "generate: 1 of 10 pictures made" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
