"""Operations of training, and the curve that they make with time and a GPU's peak."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import UNET_PRESETS, VAE_PRESETS
from model.unet import UNet
from model.vae import VAE
from pipelines.train import meter as module
from pipelines.train.config import BatchConfig
from pipelines.train.meter import Meter
from pipelines.train.operations import Operations, peak_tflops

BUCKETS = [(32, 48), (64, 32), (96, 96)]


def counted(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("bucket", BUCKETS)
@pytest.mark.parametrize("preset", ["tiny-base", "tiny-refiner"])
def test_three_counts_say_what_every_bucket_costs_a_unet(preset, bucket):
    config = UNET_PRESETS[preset]
    height, width = (side // 4 for side in bucket)
    with torch.device("meta"):
        network = UNet(config)
        inputs = torch.empty(1, 4, height, width), torch.empty(1), torch.empty(1, 77, config.context_dim)
        expected = counted(lambda: network(*inputs, torch.empty(1, config.vector_dim)).sum().backward())
    assert Operations(config, 4)(bucket) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_three_counts_say_what_every_bucket_costs_a_vae(bucket):
    config = VAE_PRESETS["tiny"]
    height, width = bucket
    with torch.device("meta"):
        network = VAE(config)
        image, noise = torch.empty(1, 3, height, width), torch.empty(1, 4, height // 4, width // 4)
        expected = counted(lambda: network(image, noise)[0].sum().backward())
    assert Operations(config, 1)(bucket) == pytest.approx(expected, rel=1e-6)


def test_mfu_is_the_operations_done_over_those_that_could_have_been(monkeypatch):
    now = iter([0.0, 10.0, 14.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(now))
    meter = Meter(lambda bucket: 1e12 * bucket[0], peak_tflops=100.0)
    batch = BatchConfig(global_size=8, micro_size=4)
    means = {"term": torch.ones(2)}
    for step in (1, 2):
        meter._means.add("term", means["term"], torch.ones(2, dtype=torch.bool))
        for _ in range(2):
            meter.saw(4, (16, 24))  # 4 images of 16 TFLOP
        numbers = meter.read({}, batch, 8 * step, 0.0)
        assert ("mfu" in numbers) == (step == 2)  # the first interval is mostly start-up
    assert numbers["mfu"] == pytest.approx(2 * 4 * 16 / 4 / 100)


def test_an_unknown_device_has_no_peak_but_a_configured_one():
    assert peak_tflops(None, torch.device("cpu"), "bfloat16") is None
    assert peak_tflops(12.5, torch.device("cpu"), "float32") == 12.5
