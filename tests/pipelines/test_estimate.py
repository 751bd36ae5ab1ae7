import pytest

from pipelines.estimate import Memory, memory_by_stage, memory_per_worker, parameters
from pipelines.train.config import WorkersConfig
from pipelines.train.sharded import GATHERED_VALUES


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


N = 10**6


def memory(networks: dict[str, int] | None = None, **workers) -> Memory:
    return memory_per_worker(networks or {"unet": N}, WorkersConfig(**workers))


def device(networks: dict[str, int] | None = None, **workers) -> float:
    """Bytes per parameter on the device."""
    return sum(memory(networks, **workers).device.values()) / N


@pytest.mark.parametrize("count", [1, 2, 8])
def test_each_stage_shards_what_it_is_known_for(count):
    seen = 4 + 4  # the averaged network, and the line that it is gathered in
    assert device(count=count, zero_stage=0) == 4 + 4 + 8 + 4 + 4 + seen
    assert device(count=count, zero_stage=1) == pytest.approx(4 + 4 + 8 + (4 + 8 + 4) / count + seen)
    assert device(count=count, zero_stage=2) == pytest.approx(4 + 8 + (4 + 4 + 8 + 4) / count + seen)
    assert device(count=count, zero_stage=3) == pytest.approx(4 + 4 + (4 + 4 + 8 + 4) / count + seen)
    half, seen = {"count": count, "dtype": "bfloat16"}, 2 + 4
    assert device(zero_stage=0, **half) == 2 + 6 + 4 + 8 + 4 + 4 + seen
    assert device(zero_stage=1, **half) == pytest.approx(2 + 6 + 4 + (4 + 8 + 4) / count + seen)
    assert device(zero_stage=2, **half) == pytest.approx(2 + (2 + 2 + 4) + (4 + 4 + 8 + 4) / count + seen)
    assert device(zero_stage=3, **half) == pytest.approx(2 + (2 + 4) + (2 + 4 + 4 + 8 + 4) / count + seen)


def test_what_is_offloaded_lies_in_the_host():
    for stage, left in ((2, 2 + 8 + 4 / 4 + 6), (3, 2 + 6 + 2 / 4 + 6)):
        found = memory(count=4, zero_stage=stage, dtype="bfloat16", offload_optimizer=True)
        assert sum(found.device.values()) / N == pytest.approx(left)
        assert sum(found.host.values()) / N == pytest.approx((4 + 8 + 4 + 4) / 4 + 16 / 4)


def test_only_the_first_network_is_averaged():
    both = memory({"vae": 2 * N, "discriminator": N}, zero_stage=0)
    assert sum(both.device.values()) / N == 3 * (4 + 4 + 8 + 4) + 2 * (4 + 4 + 4)


def test_pinned_memory_is_rounded_up_and_8_bits_are_written_as_values():
    exact = memory(count=3, zero_stage=1)
    assert exact.host["checkpoint's copy"] == pytest.approx(16 * N / 3)
    pinned = memory(count=3, zero_stage=1, gpu=True).host["checkpoint's copy"]
    assert pinned == 4 * 2**21  # the power of two above 4 * N / 3 bytes
    host = memory_per_worker({"unet": N}, WorkersConfig(count=2), moment_bytes=2.0).host
    assert sum(host.values()) == (16 + 8) * N / 2


def test_more_than_a_bucket_of_values_is_never_sent_or_gathered_at_a_time():
    found = memory({"unet": 4 * 10**9}, zero_stage=3, count=8).device
    assert (found["communication"], found["weights gathered at a time"]) == (4 * 5 * 10**8, 4 * 10**9)
    assert found["averaged network at times"] == 4 * 4 * 10**9 + 4 * GATHERED_VALUES


def test_every_stage_is_told_with_the_gpu_that_it_fits():
    base = {"unet": parameters("unet", "base")}
    told = memory_by_stage(base, WorkersConfig(count=8, dtype="bfloat16"), (0, 1, 2, 3))
    assert {name: found.fits for name, found in told.items()} == {
        "stage 0": 80,
        "stage 1": 40,
        "stage 2": 24,
        "stage 2, offloaded": 24,
        "stage 3": 24,
        "stage 3, offloaded": 16,
    }
    assert memory_by_stage({"unet": 10**11}, WorkersConfig(), (0,))["stage 0"].fits is None
