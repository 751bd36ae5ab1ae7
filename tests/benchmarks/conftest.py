"""Benchmarks as tests: without --benchmarks the suite runs those that are cheap, small and for one round, so that no
change leaves them behind. What they check holds as ever; their figures are then worth nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.config import TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS
from tests.in_process import forget_workers

SMALL: dict[str, dict[str, Any]] = {  # by module, what takes the place of its names
    "test_checkpoint_stall": {"WIDTH": 32, "BATCH": 2, "STEPS": 1, "ROUNDS": 1},
    "test_crops": {"ROWS": 500, "MIXES": (500,)},
    "test_decode": {"ROUNDS": 1, "IMAGES": 2, "SHRINK": 4},
    "test_gpu_training": {},
    "test_latent_store": {"ROWS": 8, "FILE_ROWS": 4, "BATCH": 2, "ROUNDS": 1},
    "test_loaders": {"FILES": 2, "FILE_ROWS": 8, "BATCH": 2, "ROUNDS": 1},
    "test_networks": {
        "ROUNDS": 1,
        "NARROW_BASE": UNET_PRESETS["tiny-base"],
        "LATENT_SIZE": (8, 8),
        "VAE_CONFIG": VAE_PRESETS["tiny"],
        "IMAGE_SIZE": 32,
        "TEXT": TEXT_PRESETS["tiny"],
        "compile_blocks": lambda network: None,  # a minute of a compiler's work
    },
    "test_scale": {
        **{"SIZES": (800,), "SMALL_FILES": (200,), "LOADED": (256,)},
        **{"TABLES": 4, "INDEX_FILE_ROWS": 256, "LATENTS_FILE_ROWS": 16, "STEPS": 2, "GLOBAL_SIZE": 8},
        # in this process: ones that import all anew take 20 s
        "run": lambda part, *given: getattr(sys.modules["tests.benchmarks.test_scale"], part)(*given),
    },
    "test_training_step": {"BATCH": 2, "SIDE": 8, "ROUNDS": 1},
    "test_unit_costs": {"ROUNDS": 1, "SIZES": ((128, 128), (256, 256)), "BUCKET": (128, 128), "INDEX_ROWS": 16},
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """All are imported; those that start a cluster or other processes run for figures only."""
    if config.getoption("--benchmarks"):
        return
    large = [item for item in items if item.path.parent.name == "benchmarks" and item.path.stem not in SMALL]
    config.hook.pytest_deselected(items=large)
    items[:] = [item for item in items if item not in large]


@pytest.fixture(autouse=True)
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sizes of a test, unless --benchmarks asks for figures."""
    if not request.config.getoption("--benchmarks"):
        for name, value in SMALL[request.path.stem].items():
            monkeypatch.setattr(request.module, name, value)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one another count as computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_worker() -> Iterator[None]:
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        forget_workers()  # of other tests in this process
        yield
        torch.distributed.destroy_process_group()
        forget_workers()
