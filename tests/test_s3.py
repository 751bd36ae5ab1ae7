"""The pipeline on a real S3 server: every path is s3://, and wrong credentials are an error that says so."""

from __future__ import annotations

import pytest

from jobs import preprocess, train_base
from jobs.cli import load
from jobs.config import PreprocessJob
from jobs.training_config import TrainBaseJob
from model.config import UNET_PRESETS
from pipelines import networks
from pipelines.config import WeightsConfig
from pipelines.schema import require_manifest
from pipelines.storage import Storage, StorageOptions
from tests.conftest import ROOT, S3, Finished


@pytest.fixture(scope="module")
def bucket(s3: S3, finished: Finished) -> Storage:
    """A prefix that holds the images and the VAE."""
    storage = Storage(f"s3://{s3.bucket}/demo", StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1"))
    for folder in ("images", "vae"):
        for path in (finished.root / folder).glob("*.*"):
            storage.write(f"{folder}/{path.name}", path.read_bytes())
    return storage


def overrides(bucket: Storage, finished: Finished, name: str, *more: str) -> list[str]:
    local = finished.arguments(name, *more)
    return [argument.replace(f'"{finished.root}/', f'"{bucket.uri}/') for argument in local] + [
        f'storage.s3_endpoint="{bucket.options.s3_endpoint}"',
        'storage.s3_region="us-east-1"',
    ]


def test_preprocess_and_train_on_s3(bucket: Storage, finished: Finished, tmp_path) -> None:
    configs = ROOT / "jobs/configs/demo/cpu"
    job = load(PreprocessJob, str(configs / "preprocess.toml"), overrides(bucket, finished, "preprocess"))
    assert job.source.path == f"{bucket.uri}/images"
    preprocess.run(job)
    local = require_manifest(Storage(str(finished.root / "latents")), "latents")
    manifest = require_manifest(bucket.folder("latents"), "latents")
    assert manifest.counts == local.counts
    assert manifest.fingerprint == local.fingerprint
    short = ("schedule.images=16", "schedule.checkpoint_images=8", "workers.count=1")
    job = load(TrainBaseJob, str(configs / "train_base.toml"), overrides(bucket, finished, "train_base", *short))
    train_base.run(job)
    weights = WeightsConfig(preset="tiny-base", path=f"{bucket.uri}/base")
    assert networks.unet(weights, bucket.options).config == UNET_PRESETS["tiny-base"]
    names = [file.name for file in bucket.list("base")]
    assert any("checkpoint_" in name for name in names)


def test_wrong_credentials_are_refused(bucket: Storage, monkeypatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(OSError, match=r"(?i)access denied|signature|forbidden|403"):
        Storage(bucket.uri, bucket.options).list()
