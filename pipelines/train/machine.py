"""What a worker's machine is at, under the names that MLflow's page shows as system metrics."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

MEGABYTE = 1e6


class Machine:
    """A worker's machine. What its driver does not tell (of a part of a GPU, say) is said once, and then left out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._untold: set[str] = set()

    def metrics(self) -> dict[str, float]:
        """Use of the machine's processors since the last call, of its memory and of the worker's GPU, as of now; and
        the most memory that the GPU's tensors have had since the last call."""
        memory, device = psutil.virtual_memory(), self._device
        numbers = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
        }
        if device.type == "cuda":
            numbers["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
            asked: dict[str, Callable[[], float]] = {
                "system/gpu_0_utilization_percentage": lambda: float(torch.cuda.utilization(device)),
                "system/gpu_0_memory_usage_megabytes": lambda: torch.cuda.device_memory_used(device) / MEGABYTE,
                "system/gpu_0_power_usage_watts": lambda: torch.cuda.power_draw(device) / 1000,
            }
            numbers |= self._told(asked)
        return numbers

    def _told(self, asked: dict[str, Callable[[], float]]) -> dict[str, float]:
        numbers = {}
        for name, ask in asked.items():
            if name in self._untold:
                continue
            try:
                numbers[name] = ask()
            except Exception as error:  # NVML's errors have no common base that torch shows
                self._untold.add(name)
                print(f"warning: {name} has no curve from here on: {type(error).__name__}: {error}", flush=True)
        return numbers
