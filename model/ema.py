"""A moving average of the weights, over plain tensors: whole parameters, or one worker's shard of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class EMA:
    """Exponential average of fp32 tensors whose half-life is counted in images, as in EDM2's training recipe.

    `halflife_images` is the number of images after which a weight's share has halved; while the run is young it is
    limited to `rampup` times the images seen, so that the start is forgotten soon. A half-life in images means the
    same at every batch size.
    """

    def __init__(self, tensors: Sequence[Tensor], halflife_images: float, rampup: float = 0.05) -> None:
        """Starts from copies of `tensors`; TypeError where one is not fp32, whose digits a slow average needs."""
        for index, tensor in enumerate(tensors):
            if tensor.dtype != torch.float32:
                raise TypeError(f"tensor {index} is {tensor.dtype}; the average is kept in torch.float32")
        self.halflife_images = float(halflife_images)
        self.rampup = rampup
        self.shadow = [tensor.detach().clone() for tensor in tensors]

    def decay(self, images_seen: int, batch_images: int) -> float:
        """The share of the old average that a step of `batch_images` images keeps."""
        halflife = min(self.halflife_images, self.rampup * images_seen)
        return 0.5 ** (batch_images / halflife) if halflife > 0 else 0.0

    @torch.no_grad()
    def update(self, tensors: Sequence[Tensor], images_seen: int, batch_images: int) -> None:
        """Take in the weights after a step; `images_seen` counts over all workers, this step's `batch_images` included.

        Raises ValueError where number or shapes differ from those at the start.
        """
        self._check(tensors)
        weight = 1.0 - self.decay(images_seen, batch_images)
        for average, tensor in zip(self.shadow, tensors, strict=True):
            average.lerp_(tensor.to(average.device, average.dtype), weight)

    def state_dict(self) -> dict[str, Any]:
        """The average and its settings; the tensors are the live ones, not copies."""
        return {"shadow": list(self.shadow), "halflife_images": self.halflife_images, "rampup": self.rampup}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved average in place.

        Raises ValueError where number, shapes or settings differ: another half-life is another run.
        """
        self._check(state["shadow"])
        saved = (state["halflife_images"], state["rampup"])
        if saved != (self.halflife_images, self.rampup):
            raise ValueError(f"saved (halflife_images, rampup) {saved} != {(self.halflife_images, self.rampup)}")
        for average, tensor in zip(self.shadow, state["shadow"], strict=True):
            average.copy_(tensor)

    def _check(self, tensors: Sequence[Tensor]) -> None:
        given, own = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in self.shadow]
        if given != own:
            wrong = [f"{i}: {g} for {o}" for i, (g, o) in enumerate(zip(given, own, strict=False)) if g != o]
            raise ValueError(f"{len(given)} tensors for an average of {len(own)}; shapes that differ: {wrong}")
