"""Compiled blocks under DeepSpeed: the same steps as without, gradients and average included."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from model.config import BASE_CONDITIONING, UNetConfig
from model.speed import compile_blocks
from model.unet import UNet
from pipelines.train.config import BatchConfig, EMAConfig, OptimizerConfig, ScheduleConfig, WorkersConfig
from pipelines.train.engine import Engine

BATCH, STEPS = 2, 3
SMALL = UNetConfig(  # a block of each kind, and little else to compile
    model_channels=32,
    channel_mult=(1,),
    transformer_depth=(0,),
    middle_depth=1,
    num_res_blocks=1,
    context_dim=16,
    pooled_dim=8,
    head_channels=32,
    conditioning=BASE_CONDITIONING,
)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", os.environ.get("MASTER_PORT", "29622"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.distributed.destroy_process_group()


def trained(compiled: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and averaged weights, after steps of two passes each."""
    torch.manual_seed(0)
    network = UNet(SMALL)
    nn.init.normal_(network.out[2].weight, std=0.1)  # starts at zero, and nothing else would learn
    if compiled:
        compile_blocks(network)
    engine = Engine(
        "unet",
        network.train(),
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-2),  # smooth where a gradient is next to none
        schedule=ScheduleConfig(images=100, checkpoint_images=100),
        batch=BatchConfig(global_size=2 * BATCH, micro_size=BATCH),
        workers=WorkersConfig(),
        ema=EMAConfig(halflife_images=8),
    )
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(STEPS):
        for _ in range(2):
            x = torch.randn(BATCH, 4, 8, 12, generator=generator)
            context = torch.randn(BATCH, 77, SMALL.context_dim, generator=generator)
            vector = torch.randn(BATCH, SMALL.vector_dim, generator=generator)
            loss = (engine(x, torch.tensor([10, 900]), context, vector) - x).square().mean()
            engine.backward(loss)
            engine.step((step + 1) * 2 * BATCH)
            losses.append(float(loss.detach()))
    return losses, engine.full_weights(averaged=True)


def test_a_compiled_unet_takes_the_steps_of_the_plain_one() -> None:
    plain, weights = trained(compiled=False)
    counters.clear()
    losses, others = trained(compiled=True)
    assert counters["stats"]["unique_graphs"] > 0
    assert counters["aot_autograd"]["ok"] > 0
    assert losses == pytest.approx(plain, rel=1e-4)
    assert len(set(plain)) == len(plain)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=1e-5)
