"""Training that is killed at random, again and again: the same command ends with the weights of an unbroken run.

    python -m pytest tests/soak/test_training.py -s --soak 8

Workers and drivers are killed with kill -9, half of them while a checkpoint is being written and the others whenever
it comes: at start, in a step, in an upload, in the export. Outputs lie on local disk and on S3 in turns. A failure
names its seed and all kills.
"""

from __future__ import annotations

import math
import os
import random
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from pipelines.checkpoints import CHECKPOINTS, list_checkpoints
from pipelines.storage import Storage, StorageOptions
from tests.conftest import ROOT, S3, Demo, Finished, ray_workers
from tests.test_survival import curve

IMAGES, CHECKPOINT = 640, 32
MOST_KILLS = 6  # of one run, so that it comes to its end
MEAN_SECONDS = 12.0  # between two kills that come whenever it is
PATIENCE = 60.0  # for a checkpoint that is being written


@dataclass
class Soak:
    """One run of the loop."""

    random: random.Random
    until: float = math.inf
    """When the last process is killed, by the monotonic clock: what is left then comes to its end."""
    kills: list[str] = field(default_factory=list)

    def train(self, demo: Demo, output: Storage, options: list[str], most_kills: int) -> None:
        """Start a training again and again, while it is killed up to `most_kills` times, until it is finished."""
        command = [sys.executable, "-m", "jobs.train_base", str(ROOT / "jobs/configs/demo/cpu/train_base.toml")]
        command += demo.arguments("train_base", *options, f"output={output.uri}")
        left = most_kills
        while True:
            with open(demo.root / "driver.log", "ab") as log:
                driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
            while left and driver.poll() is None and time.monotonic() < self.until:
                left -= self._kill(driver, output)
            if driver.wait(300) == 0:
                return
            if driver.returncode != -9:
                log_end = (demo.root / "driver.log").read_text()[-5000:]
                raise AssertionError(f"ended with {driver.returncode} after {self.kills}:\n{log_end}")

    def _kill(self, driver: subprocess.Popen[bytes], output: Storage) -> bool:
        """Wait for a moment, and kill a worker or the driver; gives whether there was one to be killed."""
        in_checkpoint = self.random.random() < 0.5
        deadline = time.monotonic() + (PATIENCE if in_checkpoint else self.random.expovariate(1 / MEAN_SECONDS))
        while time.monotonic() < deadline and driver.poll() is None and not (in_checkpoint and unfinished(output)):
            time.sleep(0.002)
        workers = ray_workers("RayTrainWorker")
        victim = "driver" if self.random.random() < 0.4 or not workers else "worker"
        if driver.poll() is not None:
            return False
        os.kill(driver.pid if victim == "driver" else self.random.choice(workers).pid, 9)
        if victim == "driver":
            driver.wait()
        caught = " with a checkpoint unfinished" if unfinished(output) else ""
        self.kills.append(f"{victim}{caught} at {newest(output)} images")
        print(self.kills[-1], flush=True)
        return True


def unfinished(output: Storage) -> bool:
    """Whether a checkpoint is being written, or was when its worker was killed."""
    folders = {"/".join(file.name.split("/")[:2]) for file in output.list(CHECKPOINTS)}
    return bool(folders - set(list_checkpoints(output)))


def newest(output: Storage) -> int:
    """Images that the newest whole checkpoint has seen."""
    return max((int(re.findall(r"_0*(\d+)_", name)[0]) for name in list_checkpoints(output)), default=0)


@pytest.mark.timeout(0)
def test_training_that_is_killed_at_random_ends_with_the_weights_of_an_unbroken_run(
    finished: Finished, s3: S3, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed = secrets.randbits(32)
    soak, runs = Soak(random.Random(seed)), 0
    options = [
        f"schedule.images={IMAGES}",
        f"schedule.checkpoint_images={CHECKPOINT}",
        f"schedule.log_images={CHECKPOINT}",
    ]
    options += ["schedule.sample_images=0", "schedule.validation_images=0", "workers.max_failures=1000"]
    options += [f"task.latents={finished.root}/latents", f"task.vae.path={finished.root}/vae"]
    options += [f"storage.s3_endpoint={s3.endpoint}", "storage.s3_region=us-east-1"]
    reach = StorageOptions(s3_endpoint=s3.endpoint, s3_region="us-east-1")

    def run(name: str, uri: str, most_kills: int) -> dict[str, torch.Tensor]:
        demo, output = Demo(tmp_path / name), Storage(uri, reach)
        demo.root.mkdir()
        soak.train(demo, output, options, most_kills)
        assert curve(demo.root, "images_seen") == list(range(CHECKPOINT, IMAGES + 1, CHECKPOINT))
        return load(output.read("weights.safetensors"))

    unbroken = run("unbroken", f"{tmp_path}/unbroken/base", 0)
    soak.until = time.monotonic() + 60 * pytestconfig.getoption("--soak")
    while time.monotonic() < soak.until:
        name = f"run{runs}"
        uri = f"s3://{s3.bucket}/{seed}/{name}" if runs % 2 else f"{tmp_path}/{name}/base"
        weights = run(name, uri, MOST_KILLS)
        different = [key for key, value in unbroken.items() if not torch.equal(weights[key], value)]
        assert not different, f"seed {seed}: {different} after {soak.kills}"
        runs += 1
    counts = Counter(re.sub(r" at .*", "", kill) for kill in soak.kills)
    print(f"\nseed {seed}: {runs} runs equal the unbroken one after {len(soak.kills)} kills: {dict(counts)}")
    assert soak.kills
