"""A training step: the bare network's, ours, and one as diffusers' script for SDXL takes it, on the same data.

The network of the demo on eight maps of 32 x 32, where a step takes a second or so, in one thread. Sides take turns in
one process; seconds are those of its own computing. All begin with the same weights, and the first steps are checked to
end with the same.

- bare: forward, squared error, backward and AdamW on inputs that are there already;
- engine: the same inputs through the engine, which also clips, guards, sets the rate and averages;
- ours: the loop's step, from a batch of the latents dataset: draws, conditioning, curves and all of that;
- diffusers: their U-Net, scheduler and average in a loop as their train_text_to_image_sdxl.py has it, from cached
  latents and embeddings, written anew. Accelerate is left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.conditioning import conditioning_vector
from model.config import UNET_PRESETS, Conditioning
from model.denoiser_loss import DenoiserLossConfig
from pipelines.config import TextWeightsConfig, WeightsConfig
from pipelines.storage import StorageOptions
from pipelines.train import denoiser
from pipelines.train.batches import LatentBatch
from pipelines.train.config import (
    BatchConfig,
    DenoiserTaskConfig,
    EMAConfig,
    OptimizerConfig,
    ScheduleConfig,
    WorkersConfig,
)
from pipelines.train.engine import Engine
from tests.benchmarks.gpu_networks import diffusers_unet, fill, turns, twin
from tests.benchmarks.gpu_training import InTheLoop

PRESET, BATCH, SIDE, ROUNDS = "tiny-base", 8, 32, 5
SCALING_FACTOR, PIXELS = 0.5, 8
UNET = UNET_PRESETS[PRESET]
OPTIMIZER = OptimizerConfig(clip_norm=1e9)  # computed, and never in force: the bare side does not clip
LOSS = DenoiserLossConfig(caption_dropout=0.0)


class Manifest:
    """As much of a manifest as a task reads."""

    facts = {"vae": {"scaling_factor": SCALING_FACTOR}}  # noqa: RUF012
    fingerprint = {"stored_text": "embeddings"}  # noqa: RUF012


@pytest.fixture(autouse=True)
def alone(one_thread: None, one_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, one worker, and no dataset: batches are handed over."""
    monkeypatch.setattr(denoiser, "require_manifest", lambda *_: Manifest)
    monkeypatch.setattr(denoiser, "LatentReader", lambda *_: None)


def latents() -> LatentBatch:
    """A batch as the loader gives it."""
    draws = torch.Generator().manual_seed(1)
    size = torch.full((BATCH, 2), float(SIDE * PIXELS))
    conditions = dict.fromkeys(UNET.conditioning, size) | {Conditioning.CROP_TOP_LEFT: torch.zeros(BATCH, 2)}
    return LatentBatch(
        first=0,
        bucket=(SIDE * PIXELS, SIDE * PIXELS),
        mean=torch.randn(BATCH, 4, SIDE, SIDE, generator=draws).half(),
        std=torch.rand(BATCH, 4, SIDE, SIDE, generator=draws).half(),
        context=torch.randn(BATCH, 77, UNET.context_dim, generator=draws).half(),
        pooled=torch.randn(BATCH, UNET.pooled_dim, generator=draws).half(),
        conditions=conditions,
    )


class Ours:
    """The loop's step."""

    def __init__(self) -> None:
        config = DenoiserTaskConfig(
            unet=WeightsConfig(preset=PRESET),
            latents="latents",
            vae=WeightsConfig(preset="tiny"),
            text=TextWeightsConfig(preset="tiny", seed=0),
            loss=LOSS,
        )
        batch = BatchConfig(global_size=BATCH, micro_size=BATCH)
        self.task = denoiser.DenoiserTask(config, batch, "", StorageOptions(), torch.device("cpu"))
        self.network = fill(self.task.networks()["unet"])
        self.start = {name: value.clone() for name, value in self.network.state_dict().items()}
        schedule = ScheduleConfig(images=10**9, checkpoint_images=1)
        self.engine = Engine(
            "unet",
            self.network.train(),
            optimizer=OPTIMIZER,
            schedule=schedule,
            batch=batch,
            workers=WorkersConfig(),
            ema=EMAConfig(),
        )
        self.loop, self.seen = InTheLoop(self.task, self.engine), 0

    def engine_alone(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        """A step on inputs that are there already."""
        self.seen += BATCH
        self.engine.backward(F.mse_loss(self.engine(*inputs), target))
        self.engine.step(self.seen)

    def step(self, batch: LatentBatch) -> None:
        """A step from a batch."""
        self.loop([(batch, 1.0)])


def adamw(network: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(network.parameters(), lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)


class Theirs:
    """A step of diffusers' script, with and without its average."""

    def __init__(self, network: nn.Module) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.unet, _ = diffusers_unet(network, UNET)
        self.schedule = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
        self.optimizer = adamw(self.unet)
        self.rate = get_scheduler("constant", self.optimizer)
        self.average = EMAModel(self.unet.parameters())

    def step(self, batch: LatentBatch, averaged: bool, drawn: tuple[Tensor, ...] | None = None) -> Tensor:
        """The loss before the step; `drawn` are the posterior's noise, the noise and the timesteps."""
        shape = batch.mean.shape
        posterior, noise, timesteps = drawn or (
            torch.randn(shape),
            torch.randn(shape),
            torch.randint(0, 1000, (BATCH,)),
        )
        clean = (batch.mean.float() + batch.std.float() * posterior) * SCALING_FACTOR
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        ids = torch.cat([batch.conditions[name] for name in UNET.conditioning], dim=1)
        added = {"text_embeds": batch.pooled.float(), "time_ids": ids}
        prediction = self.unet(noisy, timesteps, batch.context.float(), added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float(), reduction="mean")
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), OPTIMIZER.clip_norm)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        if averaged:
            self.average.step(self.unet.parameters())
        loss.item()  # the script gathers and logs it at every step
        return loss.detach()


@pytest.mark.timeout(1200)
def test_training_step() -> None:
    ours, batch = Ours(), latents()
    start = twin(ours.network, UNET)
    start.load_state_dict({name: value.clone() for name, value in ours.start.items()}, assign=True)
    bare, theirs = twin(start, UNET), Theirs(start)
    bare.load_state_dict({name: value.clone() for name, value in ours.start.items()}, assign=True)
    draws = ours.task._draws(batch, LOSS)
    clean = (batch.mean.float() + batch.std.float() * draws.posterior_noise) * SCALING_FACTOR
    noisy = ours.task._diffusion.add_noise(clean, draws.noise, draws.timesteps)
    inputs = (noisy, draws.timesteps, batch.context.float(), _vector(batch))
    bare_adamw = adamw(bare.requires_grad_(True))

    def bare_step() -> None:
        F.mse_loss(bare(*inputs), draws.noise).backward()
        bare_adamw.step()
        bare_adamw.zero_grad()

    bare_step()
    ours.step(batch)
    theirs.step(batch, averaged=True, drawn=(draws.posterior_noise, draws.noise, draws.timesteps))
    moved = _moves(ours.engine.full_weights(), ours.start)
    for limit, network in ((1e-3, bare), (0.05, start)):  # the last shares its weights with diffusers' U-Net
        error = float((moved - _moves(network.state_dict(), ours.start)).norm() / moved.norm())
        assert error < limit, f"the first step differs by {error:.1e}"
        print(f"\nthe first step differs by {error:.1e}", end="")
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: ours.step(batch),
        "engine": lambda: ours.engine_alone(inputs, draws.noise),
        "diffusers, averaged": lambda: theirs.step(batch, averaged=True),
        "diffusers, not averaged": lambda: theirs.step(batch, averaged=False),
        "bare": bare_step,
    }
    seconds = turns(sides, ROUNDS, "cpu")
    parameters = sum(p.numel() for p in bare.parameters())
    print(f"\na step of {BATCH} at {SIDE} x {SIDE} latents, {parameters:,} parameters, one thread")
    for name, values in seconds.items():
        ratios = [own / other for own, other in zip(values, seconds["bare"], strict=True)]
        print(
            f"  {name:<24} {statistics.median(values):.3f} s ({min(values):.3f} to {max(values):.3f})  "
            f"times bare {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        )


def _moves(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
    """How far each weight has moved; AdamW's first step is about its rate, whichever small gradient points the way."""
    return torch.cat([(weights[name] - start[name]).flatten() for name in start])


def _vector(batch: LatentBatch) -> Tensor:
    return conditioning_vector(batch.pooled, batch.conditions, UNET)
