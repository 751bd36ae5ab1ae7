"""What the curves show: means over workers, rates, and the share of time that training waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pipelines.config import Size
from pipelines.train.config import BatchConfig
from pipelines.train.engine import Engine
from pipelines.train.tasks import Loss, mean_over_workers


class Means:
    """Means over samples and workers of what was added since it was last read."""

    def __init__(self) -> None:
        self._sums: dict[str, list[torch.Tensor]] = {}

    def add(self, name: str, values: torch.Tensor, members: torch.Tensor) -> None:
        """Take in the values of a micro-batch that are `members`: their sum and number stay on their device."""
        kept = torch.where(members, values.detach().float(), 0.0)
        self._sums.setdefault(name, []).append(torch.stack([kept.sum(), members.float().sum()]))

    def read(self) -> dict[str, float]:
        """The means by name; a name that had no member has none. All workers call it together, with the same names."""
        names = list(self._sums)
        sums = mean_over_workers(torch.stack([torch.stack(self._sums[name]).sum(dim=0) for name in names]))  # [N,2]
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}


class Meter:
    """The training curves' points."""

    def __init__(self, operations: Callable[[Size], float] | None = None, peak_tflops: float | None = None) -> None:
        """`operations` of one image of a bucket; without them, or a peak, there is no curve "mfu"."""
        self._means = Means()
        self._operations, self._peak_tflops, self._done = operations, peak_tflops, 0.0
        self._read_at, self._images, self._waited = time.perf_counter(), 0, 0.0

    def saw(self, images: int, bucket: Size) -> None:
        """Take in that this worker has trained on images of a bucket."""
        if self._operations is not None:
            self._done += images * self._operations(bucket)

    def add(self, loss: Loss, weight: float) -> None:
        """Take in a micro-batch's loss; of weight 0, which is run for nothing, it does not count."""
        for name, value in {f"loss_{loss.engine}": loss.per_sample, **loss.terms}.items():
            self._means.add(name, value, torch.full_like(value, bool(weight), dtype=torch.bool))
        for name, (value, members) in loss.shares.items():
            self._means.add(name, value, members & bool(weight))

    def read(
        self, engines: dict[str, Engine], batch: BatchConfig, images_seen: int, waited_seconds: float
    ) -> dict[str, float]:
        """The curves' next point. All workers call it together."""
        numbers = self._means.read()  # a quarter of the timesteps that no sample was in has none
        now = time.perf_counter()
        seconds = now - self._read_at
        for name, engine in engines.items():
            numbers[f"refused_steps_{name}"] = float(engine.guard.refused)
            if f"loss_{name}" in numbers:
                numbers[f"learning_rate_{name}"] = engine.learning_rate(images_seen)
                numbers[f"gradient_norm_{name}"] = engine.gradient_norm()
        if self._images:  # the first interval of an attempt is mostly start-up
            numbers["images_per_second"] = (images_seen - self._images) / seconds
            numbers["data_wait_share"] = (waited_seconds - self._waited) / seconds
            if self._peak_tflops and self._done:
                numbers["mfu"] = self._done / seconds / (self._peak_tflops * 1e12)
        self._done = 0.0
        self._read_at, self._images, self._waited = now, images_seen, waited_seconds
        return numbers
