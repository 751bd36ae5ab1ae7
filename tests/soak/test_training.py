"""Training that is killed at random, again and again: the same command ends with the weights of an unbroken run.

    python -m pytest tests/soak/test_training.py -s --soak 8

Killed with kill -9 are workers, drivers, and the node of the second worker: half of them while a checkpoint is being
written or uploaded, a quarter soon after one, and the others whenever it comes. Where a kill fell is read
off the stack of a worker, just before. Outputs lie on S3 and on local disk in turns.
"""

from __future__ import annotations

import random
import re
import secrets
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load

from jobs.demo_images import render_images
from pipelines.checkpoints import CHECKPOINTS, PROGRESS, list_checkpoints
from pipelines.lease import FOLDER as LEASES
from pipelines.storage import TEMPORARY, Storage, StorageOptions
from tests.conftest import BIN, LOGICAL_CPUS, ROOT, S3, Demo
from tests.faulty import Proxy, faulty
from tests.soak.killing import Node, OwnCluster, Tally, ended, start_job, tail, until, write_vae
from tests.test_survival import curve

IMAGES, CHECKPOINT, KEEP = 320, 32, 3
MOST_KILLS = 4  # of one run, so that it comes to its end
MEAN_SECONDS = 10.0  # between two kills that come whenever it is
STEP_SECONDS = 2.0  # after a checkpoint, at most, that a step is killed in
UPLOAD_SECONDS = 0.5  # that a part of a checkpoint takes more on its way to S3
PATIENCE = 300.0  # for a checkpoint, on a machine that other programs use as well
HANG = 300.0  # seconds after which a job that nobody kills any more hangs
KINDS = {"driver": 0.35, "worker": 0.4, "node": 0.25}
PLACES = {  # by what a worker's stack has, the first that fits
    "an upload": r"(_send|_put|_send_piped) \(pipelines/storage",
    "a checkpoint's write": r"_write \(pipelines/train/checkpointing",
    "a checkpoint's copy": r"save \(pipelines/train/checkpointing",
    "the export": r"(_export|export) \(pipelines/train/(loop|outputs)",
    "a restore": r"restore \(pipelines/train/checkpointing",
    "the start": r"(_task|_engines|hide|__init__) \(pipelines/train",
    "a step": r"train_on_worker \(pipelines/train/loop",
}


class SlowUploads:
    """S3 behind a proxy on which the parts of checkpoints take their time."""

    def __init__(self, proxy: Proxy) -> None:
        self.under_way: set[str] = set()
        """Requests that are being uploaded."""
        proxy.take = self._take  # type: ignore[method-assign]

    def _take(self, request: str) -> None:
        if request.startswith("PUT") and "/rank_" in request:
            self.under_way.add(request)
            time.sleep(UPLOAD_SECONDS)
            self.under_way.discard(request)


@dataclass
class Loop:
    """One training: the command again and again, killed as the seed has it, until it is finished."""

    cluster: OwnCluster
    node: Node
    tally: Tally
    random: random.Random
    demo: Demo
    output: Storage
    uploads: SlowUploads
    command: list[str]
    left: int
    """Kills that are left."""
    until: float
    """When the last process is killed, by the monotonic clock."""

    def run(self) -> Node:
        """Train to the end; gives the second node as it is then."""
        attempt = 0
        while True:
            log = self.demo.root / f"attempt-{attempt}.log"
            driver = start_job(self.cluster, log, *self.command)
            while self.left and driver.poll() is None and time.monotonic() < self.until:
                self.left -= self._kill(driver)
            code = ended(driver, log, HANG, f"seeds {self.tally.seeds}, {log}")
            if code == 0:
                return self.node
            assert code == -9, f"seeds {self.tally.seeds}: ended with {code}\n{tail(log)}"
            self.tally.counts["restarts"] += 1
            attempt += 1

    def _kill(self, driver: subprocess.Popen[bytes]) -> bool:
        """Wait for a moment, and kill; gives whether there was something to be killed."""
        kind = self.random.choices(list(KINDS), list(KINDS.values()))[0]
        moment, before = self.random.random(), whole(self.output)
        if moment < 0.5:
            came = until(lambda: self.uploads.under_way or unfinished(self.output), driver, PATIENCE)
        elif moment < 0.75:
            came = until(lambda: whole(self.output) - before, driver, PATIENCE)
            until(lambda: False, driver, self.random.uniform(0, STEP_SECONDS))
        else:
            came = not until(lambda: False, driver, self.random.expovariate(1 / MEAN_SECONDS))
        assert came or driver.poll() is not None, f"seeds {self.tally.seeds}: no checkpoint in {PATIENCE:g} s"
        workers = self.cluster.workers("RayTrainWorker")
        if driver.poll() is not None or (kind == "worker" and not workers):
            return False
        victim = self.random.choice(workers) if workers else None
        where = place_of(victim) if victim else "before workers"
        if driver.poll() is not None:
            return False
        if kind == "driver":
            driver.kill()
            driver.wait()
        elif kind == "node":
            self.node.kill()
            self.cluster.nodes.remove(self.node)
            self.node = self.cluster.add_node(LOGICAL_CPUS - 1)
        elif victim is not None:
            victim.kill()
        self.tally.killed(kind, where)
        return True


def make_latents(cluster: OwnCluster, demo: Demo) -> None:
    """Latents of rendered pictures by a VAE of random weights, in the demo's folder."""
    render_images(demo.root / "images", 24, 96)
    config, log = str(ROOT / "jobs/configs/demo/cpu/preprocess.toml"), demo.root / "preprocess.log"
    write_vae(demo.root / "vae.safetensors")
    words = [*demo.arguments("preprocess"), f"vae.path={demo.root}/vae.safetensors"]
    job = start_job(cluster, log, "jobs.preprocess", config, *words)
    assert ended(job, log, HANG, "preprocessing") == 0, tail(log)


def command(made: Demo, demo: Demo, output: str, *options: str) -> list[str]:
    """A training on the latents that were made, a worker on each of two nodes; its curves are in the demo's folder."""
    words = [word for word in demo.arguments("train_base") if not word.startswith(("output=", "task."))]
    words += [f"output={output}", f"task.latents={made.root}/latents", f"task.vae.path={made.root}/vae.safetensors"]
    words += ["schedule.sample_images=0", "schedule.validation_images=0", "workers.max_failures=1000"]
    words += [f"workers.cpus={LOGICAL_CPUS - 1}", *options]
    return ["jobs.train_base", str(ROOT / "jobs/configs/demo/cpu/train_base.toml"), *words]


def place_of(worker: psutil.Process) -> str:
    """What a worker is at, by the stacks of its threads."""
    command = [str(BIN / "py-spy"), "dump", "--nonblocking", "--pid", str(worker.pid)]
    stack = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next((place for place, seen in PLACES.items() if re.search(seen, stack)), "imports")


def unfinished(output: Storage) -> bool:
    """Whether a checkpoint is being written, or deleted, or was when its worker was killed."""
    return bool(output.folders(CHECKPOINTS) - whole(output))


def whole(output: Storage) -> set[str]:
    """The checkpoints that are whole."""
    return {file.name.removesuffix(f"/{PROGRESS}") for file in output.list(CHECKPOINTS)}


def nothing_is_left(output: Storage) -> None:
    """Checkpoints are whole, and as many as are kept, or one more where the last deletion was killed; no claim is left,
    and no temporary file."""
    assert len(list_checkpoints(output)) in (KEEP, KEEP + 1)
    assert not unfinished(output)
    assert not [file.name for file in output.list(LEASES) if not file.name.endswith(".broken")]
    if output.is_local:
        assert not list(Path(output.uri).rglob(f"{TEMPORARY}*"))


@pytest.mark.timeout(0)
def test_training_that_is_killed_at_random_ends_with_the_weights_of_an_unbroken_run(
    s3: S3, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seed, tally = secrets.randbits(24), Tally("training")
    made = Demo(tmp_path / "made")
    options = [f"schedule.{name}_images={CHECKPOINT}" for name in ("checkpoint", "log")]
    options += [f"schedule.images={IMAGES}", f"schedule.keep_checkpoints={KEEP}", "storage.s3_region=us-east-1"]

    with OwnCluster() as cluster, faulty(s3.endpoint) as proxy, tally:
        options += [f"storage.s3_endpoint={proxy.endpoint}"]
        reach, uploads = StorageOptions(s3_endpoint=proxy.endpoint, s3_region="us-east-1"), SlowUploads(proxy)
        make_latents(cluster, made)
        node = cluster.add_node(LOGICAL_CPUS - 1)

        def train(name: str, uri: str, kills: int, end: float) -> dict[str, torch.Tensor]:
            nonlocal node
            demo, output = Demo(tmp_path / name), Storage(uri, reach)
            demo.root.mkdir()
            words = command(made, demo, uri, *options)
            node = Loop(cluster, node, tally, random.Random(seed), demo, output, uploads, words, kills, end).run()
            assert curve(demo.root, "images_seen") == list(range(CHECKPOINT, IMAGES + 1, CHECKPOINT))
            nothing_is_left(output)
            return load(output.read("weights.safetensors"))

        begun = time.monotonic()
        unbroken = train("unbroken", f"{tmp_path}/unbroken/base", 0, 0)
        print(f"an unbroken run takes {time.monotonic() - begun:.0f} s", flush=True)
        tally.begun = time.monotonic()
        end = tally.begun + 60 * pytestconfig.getoption("--soak")
        while time.monotonic() < end:
            tally.seeds.append(seed)
            place = "s3" if len(tally.seeds) % 2 else "local"
            name = f"run-{seed}"
            uri = f"s3://{s3.bucket}/{name}" if place == "s3" else f"{tmp_path}/{name}/base"
            weights = train(name, uri, MOST_KILLS, end)
            assert weights.keys() == unbroken.keys()
            different = [key for key, value in unbroken.items() if not torch.equal(weights[key], value)]
            assert not different, f"seed {seed}: {different}"
            tally.counts[f"runs equal to the bit ({place})"] += 1
            tally.counts["steps compared"] += IMAGES // 8
            seed += 1
    assert tally.kills
