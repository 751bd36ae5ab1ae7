"""The learned perceptual distance of two images (LPIPS, arXiv 1801.03924) on VGG16, version 0.1 of its heads.

Both images run through VGG's convolutions; at five depths the features of each pixel are brought to length 1, and
their squared differences are weighted by channel and averaged over the pixels. The distance is the sum of the five.

Parameters are named as published: `features.N` of torchvision's vgg16, `linK.model.1` of the package lpips.

B batch, H W image height and width, h w height and width of a level's features, C their channels
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import LPIPSConfig

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""What the published package takes off images in [-1, 1], and divides them by, before the first convolution."""


class LPIPS(nn.Module):
    """The distance per sample, in fp32: features in bfloat16 put the distance of a close reconstruction too high.

    Noise of 0.005 on an image in [-1, 1] came out 1.6 times as far in bfloat16, and the gradient's cosine with that of
    fp32 was 0.84; at 0.05 they were 1.01 and 0.98 (random weights in the trunk, 64 x 64 pixels).

    The network is frozen: gradients flow to the images alone, and only to those that ask for them. Set
    `activation_checkpointing` to keep only what enters each level for the backward pass.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, config: LPIPSConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.features = nn.Sequential()
        self._ends: list[int] = []  # one past the last layer of each level
        channels = 3
        for level, (width, convolutions) in enumerate(zip(config.channels, config.convolutions, strict=True)):
            if level:
                self.features.append(nn.MaxPool2d(2))
            for _ in range(convolutions):
                self.features.extend([nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)])
                channels = width
            self._ends.append(len(self.features))
            self.add_module(f"lin{level}", Head(width))
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Distance [B] of two images [B,3,H,W] in [-1, 1]. Raises ValueError for shapes that differ or are too small.

        The same image is at distance 0, and exchanging the two changes nothing.
        """
        if image.shape != other.shape or image.shape[1] != 3:
            raise ValueError(f"images {tuple(image.shape)} and {tuple(other.shape)}: expected [B,3,H,W] twice")
        if min(image.shape[2:]) < self.config.least_side:
            raise ValueError(f"images {tuple(image.shape)}: sides must have {self.config.least_side} pixels or more")
        checkpointing = self.activation_checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, self._level, use_reentrant=False) if checkpointing else self._level
        one, two = self._scaled(image), self._scaled(other)  # [B,3,H,W]
        total = torch.zeros(len(image), device=image.device)  # [B]
        for level in range(len(self._ends)):
            one, two, distance = run(level, one, two)  # [B,C,h,w] twice, [B]
            total = total + distance
        return total

    def _level(self, level: int, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The level's features of both images, and the distance that it adds."""
        layers = self.features[self._ends[level - 1] if level else 0 : self._ends[level]]
        one, two = layers(one), layers(two)  # [B,C,h,w]
        difference = (_unit(one) - _unit(two)).square()  # [B,C,h,w]
        return one, two, self.get_submodule(f"lin{level}")(difference).flatten(1).mean(1)

    def _scaled(self, image: Tensor) -> Tensor:
        return (image.float() - self.shift) / self.scale


class Head(nn.Module):
    """One weight per channel, none negative, as a 1 x 1 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The layout counts a dropout before it, which trained the heads.
        weigh = nn.Conv2d(channels, 1, 1, bias=False)
        nn.init.uniform_(weigh.weight)
        self.model = nn.Sequential(nn.Identity(), weigh)

    def forward(self, difference: Tensor) -> Tensor:
        """[B,C,h,w] to [B,1,h,w]."""
        return self.model(difference)


def load_lpips(
    trunk: str | os.PathLike[str], heads: str | os.PathLike[str], config: LPIPSConfig, *, allow_pickle: bool = False
) -> LPIPS:
    """The network with the weights of torchvision's vgg16 and of the package's heads, each .safetensors or a pickle.

    The trunk's classifier is left out. Pickles are read only with `allow_pickle`, and only tensors are taken from
    them. Raises ValueError naming the file and every key that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in LPIPS(config).named_parameters()}
    state: dict[str, Tensor] = {}
    for path, prefix in ((trunk, "features."), (heads, "lin")):
        found = {
            name: weight
            for name, weight in _read(path, allow_pickle).items()
            if prefix == "lin" or not name.startswith("classifier.")
        }
        wanted = {name: shape for name, shape in expected.items() if name.startswith(prefix)}
        wrong = [f"{name} is missing" for name in wanted if name not in found]
        wrong += [f"{name} is unexpected" for name in found if name not in wanted]
        wrong += [
            f"{name} {tuple(found[name].shape)}: expected {shape}"
            for name, shape in wanted.items()
            if name in found and found[name].shape != shape
        ]
        if wrong:
            raise ValueError(f"{path}: {'; '.join(wrong)}")
        state |= found
    network = LPIPS(config)
    network.load_state_dict(state)
    return network


def _read(path: str | os.PathLike[str], allow_pickle: bool) -> Mapping[str, Tensor]:
    if os.fspath(path).endswith(".safetensors"):
        return load_file(path)
    if not allow_pickle:
        raise ValueError(f"{path} is no .safetensors file; set allow_pickle to read a pickle's tensors")
    return torch.load(path, map_location="cpu", weights_only=True)


def _unit(features: Tensor) -> Tensor:
    """Each pixel's features brought to length 1; features that are all 0 stay so, and have no gradient."""
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
