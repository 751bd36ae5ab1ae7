"""Errors as a person meets them: each names its cause and says what to do, and docs/errors.md has them all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from ray._private.utils import check_version_info

from jobs import preprocess
from jobs.cli import FAILURE, JobError, check_resources, load, main, start_ray
from jobs.config import PreprocessJob
from jobs.remedies import REMEDIES, remedy
from pipelines.storage import Storage
from tests.conftest import ROOT, S3, Cluster
from tests.faulty import Fault, faulty

PAGE = (ROOT / "docs/errors.md").read_text()
ADVICE = {item.cause: item.advice for item in REMEDIES}


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """Ends a job by an error, and gives what it printed of it."""
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text('index = "index"\nsource.path = "images"\nstages = ["index"]\n')

    def ended(*overrides: str, run=preprocess.plan) -> str:
        with pytest.raises(SystemExit) as ending:
            main(PreprocessJob, run, run, ["job.toml", *overrides, "--dry-run"])
        assert ending.value.code == FAILURE
        return capsys.readouterr().err

    return ended


def on(server: S3, bucket: str = "") -> list[str]:
    place = f"source.path=s3://{bucket or server.bucket}/images"
    return [place, f"storage.s3_endpoint={server.endpoint}", "storage.s3_attempts=1"]


@pytest.mark.parametrize("wrong", [{}, {"AWS_ACCESS_KEY_ID": "unknown"}, {"AWS_SECRET_ACCESS_KEY": "wrong"}])
def test_credentials_that_are_missing_or_wrong(s3: S3, told, monkeypatch, wrong):
    if not wrong:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    assert ADVICE["S3 credentials missing or without the right"] in told(*on(s3))


def test_a_bucket_that_is_not_there_holds_no_image(s3: S3, told):
    assert "s3://no-such-bucket/images: there is no such folder, or it is empty" in told(*on(s3, "no-such-bucket"))


def test_a_bucket_that_is_not_there_is_written_to(s3: S3, told):
    def write(job: PreprocessJob) -> None:
        Storage(job.index, job.storage).write("manifest.json", b"{}")

    with faulty(s3.endpoint) as proxy:  # the server itself makes a bucket where one is missing
        proxy.inject(Fault.NO_BUCKET, "^PUT ", times=9)
        error = told(*on(S3(proxy.endpoint, s3.bucket)), f"index=s3://{s3.bucket}/index", run=write)
    assert "AWS Error NO_SUCH_BUCKET" in error
    assert ADVICE["S3 bucket missing"] in error


def test_an_s3_server_that_is_not_there(told):
    error = told(*on(S3("http://127.0.0.1:9", "bucket")))
    assert "Could not connect to server" in error
    assert ADVICE["S3 server out of reach"] in error


def test_a_cluster_of_another_version():
    with pytest.raises(RuntimeError) as error:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.9.1"}, "this node")
    assert remedy(str(error.value)) == ADVICE["Ray or Python of another version"]


def test_more_gpus_or_cores_than_there_are(cluster: Cluster, tmp_path, monkeypatch, capsys):
    (tmp_path / "job.toml").write_text('index = "index"\nsource.path = "images"\nstages = ["index"]\n')
    job = load(PreprocessJob, str(tmp_path / "job.toml"), [])
    check_resources(job, "workers", CPU=1.0)
    check_resources(job, "workers", CPU=1.0, GPU=8.0)
    assert "warning: workers: 8 GPU are asked for, and Ray has 4 CPU, 0 GPU: it waits" in capsys.readouterr().err
    monkeypatch.delenv("RAY_ADDRESS")  # as a job that started Ray for itself
    with pytest.raises(JobError, match=r"workers: 64 CPU and 8 GPU are asked for, .* \(ray\.address\)"):
        check_resources(job, "workers", CPU=64.0, GPU=8.0)


def test_more_memory_than_there_is(told):
    def fill(job: PreprocessJob) -> None:
        torch.empty(2**60)

    assert ADVICE["memory of a node full"] in told(run=fill)


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_weights_on_a_hub_that_is_out_of_reach(tmp_path, environment):
    read = "from pipelines.networks import text_encoders\nfrom pipelines.config import TextWeightsConfig\n"
    read += "from pipelines.storage import StorageOptions\n"
    read += "names = {'clip_l': 'nobody/has-this', 'bigg': 'nobody/has-this'}\n"
    read += "text_encoders(TextWeightsConfig(preset='sdxl', **names), StorageOptions())"
    known = os.environ | {"HF_HOME": str(tmp_path)} | environment
    done = subprocess.run(
        [sys.executable, "-c", read], cwd=ROOT, env=known, capture_output=True, text=True, check=False
    )
    assert remedy(done.stderr.splitlines()[-1]) == ADVICE["weights on a hub that is out of reach"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_where_there_is_none(told):
    def move(job: PreprocessJob) -> None:
        torch.zeros(1, device="cuda")

    assert ADVICE["GPU asked for on a machine without one"] in told(run=move)


def test_a_worker_whose_peer_is_gone(tmp_path):
    join = f"""
from datetime import timedelta
import os, torch, torch.distributed as dist
group = dist.ProcessGroupGloo(dist.FileStore("{tmp_path}/store", 2), int(os.environ["RANK"]), 2, timedelta(seconds=60))
"""
    reduce = "while True: group.allreduce([torch.ones(1)]).wait()"
    start = [[sys.executable, "-c", join + what] for what in ("os._exit(0)", reduce)]
    gone, left = (
        subprocess.Popen(words, env=os.environ | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank, words in enumerate(start)
    )
    error = left.communicate(timeout=200)[1]
    assert gone.wait() == 0
    assert remedy(error) == ADVICE["workers that do not reach each other"]


def test_an_address_where_no_cluster_is(told, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    error = told("ray.address=127.0.0.1:9", run=start_ray)
    assert "error: ray.address: nobody answers at 127.0.0.1:9" in error
    assert ADVICE["no Ray cluster at the address"] in error


@pytest.mark.parametrize(
    ("cause", "message"),  # as the libraries word them; docs/errors.md says which were not provoked
    [
        ("S3 bucket missing", "When initiating multiple part upload: AWS Error NO_SUCH_BUCKET during CreateMultipart"),
        (
            "GPU memory full",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        (
            "memory of a node full",
            "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 16.0 GiB for an array",
        ),
        (
            "memory of a node full",
            "Task was killed due to the node running low on memory.",
        ),
        ("Ray token missing or wrong", "Unauthenticated: Invalid or missing authentication token"),
        (
            "no Ray cluster at the address",
            "Could not find any running Ray instance. Please specify the one",
        ),
        ("workers that do not reach each other", "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL"),
        (
            "workers that do not reach each other",
            "[gloo/tcp/pair.cc:547] Connection closed by peer [10.0.0.3]",
        ),
        (
            "shared memory full",
            "NCCL WARN Error while creating shared memory segment /dev/shm/nccl-8Hk2 (size 9637888), "
            "error: No space left on device (28)",
        ),
        ("disk full", "OSError: [Errno 28] No space left on device"),
        ("Ray token missing or wrong", "Authentication failed: Forbidden: Invalid authentication token"),
        ("no compiler", "Failed to find C compiler. Please specify via CC environment variable"),
        ("no compiler", "torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in CppConfig.cxx"),
        ("machine too busy to start Ray", "Exception: The current node timed out during startup. This could happen"),
        ("GPU asked for on a machine without one", "RuntimeError: No CUDA GPUs are available"),
    ],
)
def test_messages_of_libraries_get_their_advice(cause, message):
    assert remedy(message) == ADVICE[cause]


def test_what_is_not_known_gets_no_advice(told, tmp_path):
    assert remedy("optimizer.lr: 0.001 -> 0.5") is None
    Path("images").mkdir()
    Image.new("RGB", (8, 8)).save("images/a.png")

    def fail(job: PreprocessJob) -> None:
        raise ValueError("words of ours")

    assert "what to do" not in told(run=fail)


def test_the_page_has_every_advice_and_names_tests_that_exist():
    lines = PAGE.replace("\n", " ")
    assert [item.cause for item in REMEDIES if item.advice not in lines] == []
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", PAGE)
    assert len(named) > 10
    texts = [(path.name, path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")]  # names occur twice
    there = {(name, test) for name, text in texts for test in re.findall(r"^def (test_\w+)\(", text, re.M)}
    assert set(named) - there == set()
