"""A node that is lost, and one that comes later, on a real cluster: training goes on with the workers that are there.

    python -m pytest tests/soak/test_elastic.py -s --soak 1

Ray needs a minute to notice either, so it is no part of the suite, whose tests of the engine cut steps for any number
of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines import networks
from pipelines.checkpoints import PROGRESS, list_checkpoints
from pipelines.config import WeightsConfig
from pipelines.storage import Storage
from tests.conftest import LOGICAL_CPUS, Demo
from tests.soak.killing import OwnCluster, ended, start_job, tail, until
from tests.soak.test_training import HANG, command, make_latents
from tests.test_survival import curve

CHECKPOINT, MORE = 80, 160  # images
MOST = 10**6  # images, more than there is time for
PATIENCE = 240.0  # seconds for Ray to notice that a node has gone, or come


@pytest.mark.timeout(0)
def test_training_shrinks_to_the_workers_that_are_left_and_grows_when_there_are_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers on a node each, one of which is lost; the other goes on with the same global batch, and when there is
    a node again there are two. The weights are those of two workers all the time, within rounding."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    demo, base, fixed = Demo(tmp_path), Storage(f"{tmp_path}/base"), tmp_path / "fixed"
    log, seen = tmp_path / "log", []
    often = [f"schedule.{name}_images={CHECKPOINT}" for name in ("checkpoint", "log")] + ["batch.micro_size=2"]
    elastic = ["workers.min_count=1", "workers.grow_seconds=5"]
    with OwnCluster() as cluster:
        make_latents(cluster, demo)
        node = cluster.add_node(LOGICAL_CPUS - 1)
        job = start_job(cluster, log, *command(demo, demo, base.uri, *often, *elastic, f"schedule.images={MOST}"))

        def newest(wanted: Callable[[int, int], bool]) -> bool:
            with suppress(FileNotFoundError, IndexError):  # none yet, or one that goes
                progress = base.read_json(f"{list_checkpoints(base)[-1]}/{PROGRESS}")
                now = (progress["images_seen"], progress["workers"])
                if now not in seen:
                    seen.append(now)
                    print(f"{time.monotonic() - begun:6.1f} s: {now[0]} images, {now[1]} workers", flush=True)
                return wanted(*now)
            return False

        begun = time.monotonic()
        assert until(lambda: newest(lambda images, workers: workers == 2), job, PATIENCE), tail(log)
        node.kill()
        cluster.nodes.remove(node)
        killed = time.monotonic()
        assert until(lambda: newest(lambda images, workers: workers == 1), job, PATIENCE), tail(log)
        shrunk = time.monotonic()
        cluster.add_node(LOGICAL_CPUS - 1)
        assert until(lambda: newest(lambda images, workers: workers == 2), job, PATIENCE), tail(log)
        grown = time.monotonic()
        job.terminate()  # it goes on below, to its end
        ended(job, log, HANG, "the job that was stopped")
        images = seen[-1][0] + MORE
        for name, output, words in (("elastic", base.uri, elastic), ("fixed", str(fixed), [])):
            place = demo if name == "elastic" else Demo(tmp_path / name)
            place.root.mkdir(exist_ok=True)
            job = start_job(cluster, log, *command(demo, place, output, *often, *words, f"schedule.images={images}"))
            assert ended(job, log, 2 * HANG, name) == 0, tail(log)
    seconds = f"{shrunk - killed:.0f} s after the kill; of two again {grown - shrunk:.0f} s later"
    print(f"the first checkpoint of one worker {seconds}")
    ours, theirs = (load_file(f"{folder}/weights.safetensors") for folder in (base.uri, fixed))
    begin = networks.unet(WeightsConfig(preset="tiny-base"), base.options).state_dict()
    moved = torch.cat([(theirs[name] - begin[name]).flatten() for name in theirs])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs])
    print(
        f"{images} images; the weights have moved by {moved.norm():.3g} and are {apart.norm() / moved.norm():.1e} apart"
    )
    assert apart.norm() < 0.01 * moved.norm()
    assert curve(tmp_path, "images_seen") == list(range(CHECKPOINT, images + 1, CHECKPOINT))
