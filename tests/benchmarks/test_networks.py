"""The networks beside diffusers and transformers on one core, the same weights on both sides.

Sides take turns in one process; each line gives the median seconds of computing of the rounds, and their least and
greatest. Memory is the peak of what torch's allocator holds beyond weights and gradients, read off the profiler in a
round of its own.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import TEXT_PRESETS, UNET_PRESETS, VAE_PRESETS, TextConfig
from model.speed import compile_blocks
from model.unet import UNet
from model.vae import VAE
from tests.benchmarks.gpu_networks import (
    built,
    diffusers_unet,
    diffusers_vae,
    inputs_of,
    same_answer,
    text_sides,
    turns,
    twin,
)

ROUNDS = 7
pytestmark = pytest.mark.usefixtures("one_thread")
LATENT_SIZE, IMAGE_SIZE = (32, 32), 256
VAE_CONFIG = VAE_PRESETS["sdxl"]
NARROW_BASE = replace(UNET_PRESETS["base"], model_channels=128)  # all of the base's blocks
TEXT = TextConfig(  # the published widths, and a fifth of the layers
    clip_l=replace(TEXT_PRESETS["sdxl"].clip_l, layers=4), bigg=replace(TEXT_PRESETS["sdxl"].bigg, layers=6)
)


def peak_mib(run: Callable[[], object]) -> float:
    """Greatest sum of what was allocated and not yet freed since the call began, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = greatest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        greatest = max(greatest, held)
    return greatest / 2**20


def show(title: str, sides: Mapping[str, Callable[[], object]]) -> None:
    """Time and memory of each side, and the ratios to the last one."""
    print(f"\n{title}")
    seconds = turns(sides, ROUNDS, "cpu")
    peaks = {name: peak_mib(run) for name, run in sides.items()}
    peer = list(sides)[-1]
    for name, values in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(values, seconds[peer], strict=True)]
        print(
            f"  {name:<16} {statistics.median(values):7.3f} s ({min(values):.3f} to {max(values):.3f})"
            f"  faster {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            f"  peak {peaks[name]:7.1f} MiB, ratio {peaks[name] / peaks[peer]:.2f}"
        )


@pytest.mark.timeout(1800)  # a compiler on one core, and three sides in turns
def test_unet() -> None:
    eager = built(UNet, NARROW_BASE, "cpu", torch.float32)
    compiled = twin(eager, NARROW_BASE)
    compile_blocks(compiled)
    theirs, call = diffusers_unet(eager, NARROW_BASE)
    given = inputs_of(NARROW_BASE, 1, LATENT_SIZE, "cpu", torch.float32)
    sides = {"ours": (eager, eager), "ours compiled": (compiled, compiled), "diffusers": (theirs, call)}

    def backward(run: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: run(*given).square().mean().backward()  # into gradients that are there already

    with torch.no_grad():
        for _, run in sides.values():
            same_answer(run(*given), call(*given), torch.float32)
        forward = {name: lambda run=run: run(*given) for name, (_, run) in sides.items()}
        show("U-Net forward", forward)
    training = {name: backward(run) for name, (_, run) in sides.items()}
    show("U-Net forward and backward", training)
    del training["ours compiled"]
    eager.activation_checkpointing = True
    theirs.enable_gradient_checkpointing()
    show("U-Net forward and backward, checkpointed", training)


def test_vae() -> None:
    ours = built(VAE, VAE_CONFIG, "cpu", torch.float32).eval()
    theirs = diffusers_vae(ours, VAE_CONFIG)
    image = torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE) * 2 - 1
    side = IMAGE_SIZE // VAE_CONFIG.downsample
    latents = torch.randn(1, 4, side, side)
    with torch.no_grad():
        encode = {"ours": lambda: ours.encode(image).mean, "diffusers": lambda: theirs.encode(image).latent_dist.mean}
        decode = {"ours": lambda: ours.decode(latents), "diffusers": lambda: theirs.decode(latents).sample}
        for title, sides in (("VAE encode", encode), ("VAE decode", decode)):
            same_answer(*(run() for run in sides.values()), torch.float32)
            show(title, sides)


def test_unet_in_bfloat16() -> None:
    ours = built(UNet, NARROW_BASE, "cpu", torch.bfloat16)
    _, call = diffusers_unet(ours, NARROW_BASE)
    given = inputs_of(NARROW_BASE, 1, LATENT_SIZE, "cpu", torch.bfloat16)
    sides = {"ours": ours, "diffusers": call}
    with torch.no_grad():
        same_answer(*(run(*given) for run in sides.values()), torch.bfloat16)
    training = {name: lambda run=run: run(*given).square().mean().backward() for name, run in sides.items()}
    show("U-Net forward and backward, bfloat16", training)


def test_text_encoders() -> None:
    sides = text_sides(TEXT, 4, "cpu", torch.float32)
    same_answer(*(run() for run in sides.values()), torch.float32)
    show("text encoders, four prompts", sides)
