"""What a worker tells of its machine."""

import torch

from pipelines.train.machine import Machine

CPU = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
}


def test_what_the_driver_of_a_gpu_does_not_tell_is_said_once_and_ends_nothing(monkeypatch, capsys):
    asked = []

    def refused(_):
        asked.append("power")
        raise RuntimeError("Not Supported")

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 50)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda _: 3_000_000)
    monkeypatch.setattr(torch.cuda, "power_draw", refused)
    machine = Machine(torch.device("cuda"))
    for _ in range(3):
        numbers = machine.metrics()
        assert numbers.keys() - CPU == {
            "system/gpu_0_utilization_percentage",
            "system/gpu_0_memory_usage_megabytes",
            "gpu_memory_peak_gib",
        }
        assert (numbers["gpu_memory_peak_gib"], numbers["system/gpu_0_memory_usage_megabytes"]) == (1.0, 3.0)
    assert asked == ["power"]
    assert capsys.readouterr().out.count("system/gpu_0_power_usage_watts has no curve from here on") == 1
    assert Machine(torch.device("cpu")).metrics().keys() == CPU
