import pytest

from pipelines.estimate import memory_per_worker, parameters
from pipelines.train.config import WorkersConfig


@pytest.mark.parametrize(
    ("network", "preset", "count"),
    [
        ("unet", "base", 2_567_463_684),
        ("unet", "refiner", 2_259_526_660),
        ("vae", "sdxl", 83_653_863),
        ("text", "sdxl", 123_060_480 + 694_659_840),  # CLIP ViT-L, and OpenCLIP ViT-bigG's text tower and projection
    ],
)
def test_presets_have_the_published_parameters(network, preset, count):
    assert parameters(network, preset) == count


def memory(networks: dict[str, int] | None = None, **workers) -> dict[str, float]:
    return memory_per_worker(networks or {"unet": 100}, WorkersConfig(**workers))


def test_one_worker_holds_it_all():
    assert sum(memory().values()) == 100 * (4 + 4 + 4 + 8 + 4)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_first_stage_shards_optimizer_and_average(count):
    found = memory(count=count, zero_stage=1)
    assert sum(found.values()) == pytest.approx(100 * (4 + 4) + 100 * (4 + 8 + 4) / count)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_the_second_stage_shards_gradients_too(count):
    found = memory(count=count, zero_stage=2)
    assert sum(found.values()) == pytest.approx(100 * 4 + 100 * (4 + 4 + 8 + 4) / count)


def test_half_precision_halves_weights_and_gradients_only():
    full, half = memory(), memory(dtype="bfloat16")
    changed = {name: half[name] / full[name] for name in full if half[name] != full[name]}
    assert changed == {"weights": 0.5, "gradients": 0.5}


def test_only_the_first_network_is_averaged():
    both = memory({"vae": 100, "discriminator": 50})
    assert sum(both.values()) == 150 * (4 + 4 + 4 + 8) + 100 * 4
