"""Preprocessing whose process dies by kill -9 at any instruction, hundreds of times: the rows are an unbroken run's.

    python -m pytest tests/soak/test_commits.py -s --soak 8

Stages run in the process that is killed, one after another, in place of Ray Data: so it dies in a decoder, in a write,
in the lease and in any step of the commit, many times a minute. Tasks and actors of Ray are killed by
tests/test_survival.py. Only processes that were forked here are killed, each by its pid.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from jobs.cli import load
from jobs.config import PreprocessJob
from jobs.demo_images import render_images
from jobs.preprocess import _build
from model.config import VAE_PRESETS
from model.vae import VAE
from model.weights import Kind, save_weights
from pipelines.lease import lease
from pipelines.storage import Storage
from tests.in_process import without_ray
from tests.test_survival import content

IMAGES = 24
MOST_RUNS = 200  # of one output: a run that is killed leaves less to the next, so far fewer are needed
SETTINGS = """
index_rows_per_file = 3
source.path = "images"
vae = { preset = "tiny", path = "vae.safetensors" }
text = { preset = "tiny", seed = 2 }
encode.rows_per_file = 3
buckets = { table = [[16, 48], [24, 40], [32, 32], [40, 24], [48, 16]], multiple = 8 }
"""


def command(folder: str) -> None:
    """Both stages, as the job runs them."""
    job = load(PreprocessJob, "job.toml", [f"index={folder}/index", f"latents={folder}/latents"])
    for stage, place in (("index", job.index), ("latents", job.latents)):
        with lease(Storage(place or "")) as held:
            _build(job, stage, held, lambda: None)


def forked(run: Callable[[], None]) -> int:
    """The pid of a process that runs it and ends."""
    if pid := os.fork():
        return pid
    try:
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def killed_until_done(folder: str, draws: random.Random, longest: float) -> int:
    """Start the command again and again, killed at a random time each, until one ends first; gives the kills."""
    for kills in range(MOST_RUNS):
        pid = forked(lambda: command(folder))
        deadline = time.monotonic() + draws.uniform(0.0, longest)
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                ended = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        if os.waitstatus_to_exitcode(ended[1]) == 0:
            return kills
        assert os.waitstatus_to_exitcode(ended[1]) == -signal.SIGKILL, f"{folder}: an error after {kills} kills"
    raise AssertionError(f"{folder}: not done after {MOST_RUNS} runs of at most {longest:.1f} s")


def same_rows(ours: Path, theirs: Path) -> int:
    """Compare both datasets row by row; gives their rows. Passes of another size round differently."""
    assert content(ours / "index", "index") == content(theirs / "index", "index")
    found, expected = (content(root / "latents", "latents") for root in (ours, theirs))
    assert found.keys() == expected.keys()
    for name, row in found.items():
        for column, value in row.items():
            for one, other in zip(_values(value), _values(expected[name][column]), strict=True):
                if isinstance(one, bytes):
                    numbers = [np.frombuffer(data, np.float16).astype(float) for data in (one, other)]
                    np.testing.assert_allclose(*numbers, rtol=0.02, atol=0.005)
                else:
                    assert one == other
    return len(found) + len(content(ours / "index", "index"))


def _values(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


@pytest.mark.timeout(0)
def test_rows_are_those_of_an_unbroken_run_wherever_the_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    end = time.monotonic() + 60 * pytestconfig.getoption("--soak")
    without_ray(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(SETTINGS)
    # tqdm's own is a semaphore that forked processes share: one that is killed while it draws would stop all others.
    tqdm.set_lock(threading.RLock())
    render_images(tmp_path / "images", IMAGES, 96)
    torch.manual_seed(1)
    vae = VAE(VAE_PRESETS["tiny"])
    save_weights("vae.safetensors", vae.state_dict(), Kind.VAE, vae.config)
    times = []
    for name in ("first", "unbroken"):  # the first reads from disk what is imported
        begun = time.monotonic()
        assert os.waitpid(forked(lambda name=name: command(name)), 0)[1] == 0  # type: ignore[misc]
        times.append(time.monotonic() - begun)
    seed, outputs, kills = time.time_ns() % 1_000_000, 0, 0
    while time.monotonic() < end:
        killed = killed_until_done(f"seed-{seed}", random.Random(seed), times[1])
        rows = same_rows(tmp_path / f"seed-{seed}", tmp_path / "unbroken")
        print(f"seed {seed}: killed {killed} times, {rows} rows the same", flush=True)
        seed, outputs, kills = seed + 1, outputs + 1, kills + killed
    print(f"{outputs} outputs, {kills} kills; an unbroken run takes {times[1]:.1f} s")
    assert kills > 0
