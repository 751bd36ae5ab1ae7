"""The command line as a person meets it: what is printed, what is left behind, and how it ends."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jobs import generate, preprocess
from jobs.cli import FAILURE, HELD, LOOK, STOPPED, USAGE_ERROR, WORKER_ENVIRONMENT, JobError, main, start_ray
from jobs.config import GenerateJob, Job, PreprocessJob, RayConfig
from pipelines.config import without_secrets
from pipelines.schema import Manifest
from pipelines.storage import Storage
from pipelines.tracking import Lineage, open_run

ROOT = Path(__file__).parents[2]
PREPROCESS = """
index = "out/index"
latents = "out/latents"
source.path = "images"
buckets = {table = [[16, 48], [32, 32]], multiple = 8}
vae = {preset = "tiny", path = "out/vae"}
text = {preset = "tiny", seed = 0}
"""
GENERATE = """
output = "out/pictures"
[generate]
base = {preset = "tiny-base", path = "out/base"}
vae = {preset = "tiny", path = "out/vae"}
text = {preset = "tiny", seed = 0}
prompts = {texts = ["a cat", "a dog", "a cow"], size = [32, 48], count = 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in WORKER_ENVIRONMENT:  # main sets them for good
        monkeypatch.setenv(name, os.environ.get(name, ""))
    Path("job.toml").write_text(PREPROCESS)
    Path("pictures.toml").write_text(GENERATE)
    Path("images").mkdir()
    for number in range(3):
        buffer = io.BytesIO()
        Image.new("RGB", (20 + number, 30)).save(buffer, "PNG")
        Path(f"images/{number}.png").write_bytes(buffer.getvalue())
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def ended(*argv: str, kind=PreprocessJob, job=preprocess) -> int:
    with pytest.raises(SystemExit) as ending:
        main(kind, job.run, job.plan, argv)
    return ending.value.code


def test_a_dry_run_prints_the_settings_and_the_plan_and_leaves_nothing(folder, capsys):
    before = files(folder)
    assert ended("job.toml", "encode.batch=4", "driver={memory_mib=64, folder='images'}", "--dry-run") == 0
    assert files(folder) == before
    printed, error = capsys.readouterr()
    assert error == ""
    settings, end = json.JSONDecoder().raw_decode(printed)
    assert settings["encode"]["batch"] == 4
    assert settings["source"]["path"] == str(folder / "images")
    plan = printed[end:]
    assert f"source: folder of 3 images, {folder}/images" in plan
    assert "buckets: 2, from 16 x 48 to 32 x 32 (h x w)" in plan
    assert f"index: nothing yet, in {folder}/out/index" in plan
    assert f"latents: nothing yet, in {folder}/out/latents" in plan
    assert "driver: 64 MiB of rows in memory, the rest in images, with " in plan
    assert f"warning: vae.path: no weights at {folder}/out/vae" in plan


def test_a_dry_run_says_what_sources_hold_without_reading_them(folder, capsys):
    Path("tars").mkdir()
    Path("tars/0.tar").write_bytes(bytes(10_240))
    several = 'sources=[{name="own", path="images"}, {name="web", path="tars"}]'
    Path("job.toml").write_text(Path("job.toml").read_text().replace('source.path = "images"', several))
    assert ended("job.toml", "--dry-run") == 0
    plan = capsys.readouterr().out
    assert f"own: folder of 3 images, {folder}/images" in plan
    assert f"web: webdataset of 1 file, 10.0 KiB, {folder}/tars" in plan


def test_a_dry_run_of_pictures_prints_how_many_and_how_large(folder, capsys):
    before = files(folder)
    assert ended("pictures.toml", "--dry-run", kind=GenerateJob, job=generate) == 0
    assert files(folder) == before
    plan = capsys.readouterr().out
    assert "prompts: 2, 2 of 32 x 48" in plan
    assert plan.count("warning: no weights at ") == 2


def test_a_mistake_in_the_settings_starts_nothing_and_ends_with_two(folder, capsys):
    assert ended("job.toml", "encode.bach=3") == USAGE_ERROR == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: job.toml: wrong settings:")
    assert "encode.bach: there is no such setting; did you mean batch?" in error


@pytest.mark.parametrize("argv", [["nothing.toml"], [], ["job.toml", "--no-such-flag"], ["job.toml", "batch"]])
def test_a_mistake_on_the_command_line_ends_with_two(folder, capsys, argv):
    assert ended(*argv) == USAGE_ERROR
    assert capsys.readouterr().out == ""


def test_what_fails_on_its_way_is_told_in_words_and_ends_with_one(folder, capsys):
    for image in Path("images").iterdir():
        image.unlink()
    assert ended("job.toml", "--dry-run") == FAILURE == 1
    assert capsys.readouterr().err.startswith(
        f"error: source 'source', {folder}/images: there is no such folder, or it"
    )


def test_flags_and_settings_may_come_in_any_order(folder):
    assert ended("--dry-run", "job.toml", "encode.batch=4") == 0
    assert ended("job.toml", "--dry-run", "encode.batch=4") == 0


def test_help_names_the_job_and_its_arguments():
    command = [sys.executable, "-m", "jobs.preprocess", "--help"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert text.startswith("usage: python -m jobs.preprocess ")
    assert all(word in text for word in ("CONFIG.toml", "key=value", "--dry-run"))


def test_a_job_that_is_told_to_end_ends_as_by_control_c(folder, capsys):
    def told(job: PreprocessJob) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ending:
        main(PreprocessJob, preprocess.run, told, ["job.toml", "--dry-run"])
    assert ending.value.code == STOPPED
    assert capsys.readouterr().err == "stopped: what is finished stays, and the same command goes on\n"


def test_no_password_is_printed_or_kept(folder, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-key")
    endpoint = "storage.s3_endpoint=http://someone:planted-word@127.0.0.1:1"
    tracking = f"tracking.uri=http://someone:planted-word@{folder}"
    assert ended("job.toml", endpoint, tracking, "--dry-run") == 0
    printed = capsys.readouterr()
    assert '"http://***@127.0.0.1:1"' in printed.out
    for reason in (ValueError, OSError, RuntimeError):  # each is told in another way
        message = "http://someone:planted-word@host refused planted-key"

        def fail(_, reason=reason, message=message):
            raise reason(message)

        with pytest.raises(SystemExit) as ending:
            main(PreprocessJob, fail, fail, ["job.toml", "--dry-run"])
        assert ending.value.code == FAILURE
        printed = capsys.readouterr()
        assert "http://***@host refused ***" in printed.err
        assert "planted" not in printed.out + printed.err
    assert ended("job.toml", "storage.s3_endpoit=http://someone:planted-word@host") == USAGE_ERROR
    assert "planted" not in "".join(capsys.readouterr())


def test_no_password_is_told_to_mlflow(folder, empty_mlflow):
    from mlflow import MlflowClient

    uri = f"sqlite:///{shutil.copy(empty_mlflow, folder / 'mlflow.db')}"
    config = {"storage": {"s3_endpoint": "http://someone:planted-word@host"}}
    manifest = Manifest(kind="index", rows=1, counts={}, fingerprint={}, parents={}, files="f", digest="d")
    inputs = [Lineage(name="index", uri="s3://someone:planted-word@bucket/index", manifest=manifest)]
    output = Storage(str(folder / "out"))
    run_id = open_run(uri, stage="index", name="index", config=config, inputs=inputs, output=output).ticket.run_id
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(run_id)
    assert run.data.params == {"storage.s3_endpoint": "http://***@host"}
    assert "s3://***@bucket/index" in str(run.to_dictionary())
    assert "planted" not in str(run.to_dictionary())
    kept = client.download_artifacts(run_id, "config.json", str(folder))
    assert "planted" not in Path(kept).read_text()


@pytest.mark.parametrize(
    ("latents", "code"),
    [
        (None, LOOK),
        (USAGE_ERROR, FAILURE),
        (FAILURE, FAILURE),
        (HELD, HELD),
        (OSError("disk"), FAILURE),
        (RuntimeError("a task"), FAILURE),
    ],
)
def test_what_a_stage_asks_to_look_at_is_told_however_the_next_one_ends(folder, capsys, monkeypatch, latents, code):
    def stage(job: PreprocessJob, name: str) -> str | None:
        if name == "index":
            return "index: look at it"
        if isinstance(latents, int):
            raise JobError("latents: ended", latents)
        if latents is not None:
            raise latents
        return None

    monkeypatch.setattr(preprocess, "run_stage", stage)
    with pytest.raises(SystemExit) as ending:
        main(PreprocessJob, preprocess.run, preprocess.plan, ["job.toml"], needs_ray=False)
    assert ending.value.code == code
    assert "index: look at it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("postgresql://me:word@host/db", "postgresql://***@host/db"),
        (
            "postgresql://host/db?user=me&password=word&sslmode=require",
            "postgresql://host/db?user=me&password=***&sslmode=require",
        ),
        ("http://host/a?X-Amz-Signature=abc&x=1", "http://host/a?X-Amz-Signature=***&x=1"),
        ("s3://bucket/images?of=cats", "s3://bucket/images?of=cats"),
    ],
)
def test_an_address_is_told_without_its_secrets(address, told):
    assert without_secrets({"uri": [address]}) == {"uri": [told]}


def test_the_labels_of_a_job_are_those_that_ray_data_starts_every_stage_with(monkeypatch):
    from ray.data import DataContext

    options = DataContext.get_current().execution_options
    monkeypatch.setattr(options, "label_selector", None)  # as it was, once the test has ended
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    start_ray(Job())
    assert options.label_selector is None
    start_ray(Job(ray=RayConfig(label_selector={"ray-subcluster": "data"})))
    assert options.label_selector == {"ray-subcluster": "data"}
