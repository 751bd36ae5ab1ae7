"""What a worker's machine is at, under the names that MLflow's page shows as system metrics."""

from __future__ import annotations

import psutil
import torch

MEGABYTE = 1e6


def system_metrics(device: torch.device) -> dict[str, float]:
    """Use of the machine's processors since the last call, of its memory and of the worker's GPU, as of now; and the
    most memory that the GPU's tensors have had since the last call."""
    memory = psutil.virtual_memory()
    numbers = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        numbers["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
        numbers["gpu_memory_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
        numbers["system/gpu_0_memory_usage_megabytes"] = torch.cuda.device_memory_used(device) / MEGABYTE
        numbers["system/gpu_0_power_usage_watts"] = torch.cuda.power_draw(device) / 1000
    return numbers
