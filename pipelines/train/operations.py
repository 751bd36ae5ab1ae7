"""How many floating-point operations training costs, counted on the networks, and what a GPU could do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model.config import UNetConfig, VAEConfig
from model.text import CONTEXT_LENGTH
from model.unet import UNet
from model.vae import VAE
from pipelines.config import Size

PEAK_TFLOPS = {  # dense bf16, NVIDIA's data sheets; by how the device calls itself, the first that fits
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
}
COUNTED_SIDES = (2, 4, 6)  # of square latents, in units of the network's reduction


class Operations:
    """Operations of one image's forward and backward pass, 2 for a multiply-add; recomputed activations do not count.

    Convolutions and projections grow with the area, attention within an image with its square, and time and text cost
    the same for all. So three small counts, on the meta device, say it for every bucket.
    """

    def __init__(self, config: UNetConfig | VAEConfig, latent_pixels: int) -> None:
        """`latent_pixels` is the side, in pixels, of what one latent stands for; 1 for a VAE, which takes images."""
        self._config, self._latent_pixels = config, latent_pixels

    def __call__(self, bucket: Size) -> float:
        """Operations for an image of the bucket, (height, width) in pixels."""
        area = bucket[0] * bucket[1] / self._latent_pixels**2
        return float(np.polyval(self._polynomial, area))

    @cached_property
    def _polynomial(self) -> np.ndarray:
        config = self._config
        with torch.device("meta"):
            run = _unet_pass(config) if isinstance(config, UNetConfig) else _vae_pass(config)
        sides = [side * config.downsample for side in COUNTED_SIDES]
        counts = []
        for side in sides:
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                run(side).sum().backward()
            counts.append(counter.get_total_flops())
        return np.polyfit([side**2 for side in sides], counts, 2)


def peak_tflops(configured: float | None, device: torch.device, dtype: str) -> float | None:
    """What the device could do, TFLOP/s: as configured, or as known of the GPU in bf16; None where nothing is known."""
    if configured is not None or device.type != "cuda" or dtype != "bfloat16":
        return configured
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def _unet_pass(config: UNetConfig) -> Callable[[int], Tensor]:
    network = UNet(config)
    inputs = torch.empty(1), torch.empty(1, CONTEXT_LENGTH, config.context_dim), torch.empty(1, config.vector_dim)
    return lambda side: network(torch.empty(1, config.latent_channels, side, side), *inputs)


def _vae_pass(config: VAEConfig) -> Callable[[int], Tensor]:
    network = VAE(config)
    latents = (1, config.latent_channels)

    def run(side: int) -> Tensor:
        small = side // config.downsample
        reconstruction, _ = network(torch.empty(1, 3, side, side), torch.empty(*latents, small, small))
        return reconstruction

    return run
