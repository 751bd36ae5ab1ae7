"""The capacity plan: what is counted is counted right, and the arithmetic is that of the units."""

import dataclasses
import tomllib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from jobs import plan
from jobs.cli import JobError, load
from jobs.config import PlanJob
from model.config import UNET_PRESETS, VAE_PRESETS
from model.unet import UNet
from model.vae import VAE
from pipelines import capacity
from pipelines.capacity import PUBLISHED, SIDES, TFLOP, UNIT_COSTS, latents_row_bytes, plan_capacity, tflop

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "jobs/configs/sdxl/plan.toml")


def counted(work) -> float:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e12


def test_operations_are_those_of_the_networks():
    config = UNET_PRESETS["refiner"]
    with torch.device("meta"):
        unet, vae = UNet(config), VAE(VAE_PRESETS["sdxl"])
        inputs = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, 77, config.context_dim)
        vector, image = torch.empty(1, config.vector_dim), torch.empty(1, 3, 256, 256)
        assert counted(lambda: unet(*inputs, vector).sum().backward()) == pytest.approx(TFLOP["refiner"][0], rel=1e-4)
        with torch.no_grad():
            assert counted(lambda: vae.encode(image)) == pytest.approx(TFLOP["vae_encode"][0], rel=1e-4)


def test_between_the_counted_sizes_operations_grow_as_convolutions_and_attention_do():
    for what, values in TFLOP.items():
        assert [tflop(what, side) for side in SIDES] == pytest.approx(values)
        assert tflop(what, 256) < tflop(what, 384) < tflop(what, 512) < tflop(what, 768) < tflop(what, 1024)
    assert tflop("base", 2048) / tflop("base", 1024) > 4  # attention grows faster than the area


def test_a_row_of_latents_has_the_bytes_that_the_benchmark_saw():
    assert latents_row_bytes(1024) == 580_096  # 110 less than on disk, with all that is no tensor


def test_the_published_run_is_a_third_of_the_peak_at_three_dollars_an_hour():
    assert PUBLISHED.utilization == pytest.approx(0.325, abs=0.001)
    assert PUBLISHED.dollars / PUBLISHED.gpu_hours == pytest.approx(3.0, abs=0.01)


FAST = "store.requests_per_second=1e9"


def planned(*overrides: str):
    job = load(PlanJob, CONFIG, overrides)
    names = ("images", "kept_share", "image_bytes", "image_megapixels", "stages", "cpu", "encode_gpu", "train_gpu")
    return {cost.name: cost for cost in plan_capacity(**{name: getattr(job, name) for name in names}, store=job.store)}


def test_a_stage_of_training_is_operations_over_what_the_gpus_reach():
    cost = planned("train_gpu.count=128", "train_gpu.utilization=0.5", "train_gpu.price=2.0", FAST)["base 256"]
    assert cost.gpu_hours == pytest.approx(1_228_800_000 * 1.23084 * 4 / 3 / (312 * 0.5) / 3600)
    assert cost.hours == pytest.approx(cost.gpu_hours / 128)
    assert cost.compute_price == pytest.approx(cost.gpu_hours * 2)  # they are the limit: none waits
    assert cost.nodes == 16
    assert cost.kept_bytes == pytest.approx(2 * 16 * 2_567_463_684)
    again = planned("train_gpu.count=256", "train_gpu.utilization=0.5", "train_gpu.price=2.0", FAST)["base 256"]
    assert again.hours == pytest.approx(cost.hours / 2)
    assert again.compute_price == pytest.approx(cost.compute_price)


def test_machines_that_wait_are_paid():
    waiting = planned("store.requests_per_second=100")["base 256"]
    assert waiting.limit == "requests"
    assert waiting.compute_price == pytest.approx(waiting.hours * 256 * 3.0)
    both = planned()["latents 256"]
    assert both.compute_price == pytest.approx(both.hours * (4096 * 0.02 + 64 * 3.0))


def test_the_planned_stages_are_those_that_are_shipped():
    shipped = {"vae 256": "train_vae", "base 256": "train_base_256", "base 512": "train_base_512"}
    shipped |= {"base 1024": "train_base", "refiner 1024": "train_refiner"}
    stages = {stage.name: stage for stage in load(PlanJob, CONFIG, []).stages}
    assert {name for name, stage in stages.items() if stage.images_seen} == shipped.keys()
    for name, file in shipped.items():
        settings = tomllib.loads((ROOT / f"jobs/configs/sdxl/{file}.toml").read_text())
        assert stages[name].images_seen == settings["schedule"]["images"], name
        assert stages[name].activation_checkpointing == settings["workers"].get("activation_checkpointing", False), name


def test_encoding_waits_for_whichever_is_slower_cores_or_gpus():
    assert planned("cpu.cores=10")["latents 256"].limit == "cores"
    assert planned("cpu.cores=100000")["latents 256"].limit == "GPUs"
    small, large = planned("image_megapixels=0.25"), planned("image_megapixels=12.0")
    assert small["index"].core_hours == pytest.approx(2e9 * UNIT_COSTS["index_1mp"].value / 1.048576 * 0.25 / 3600)
    assert large["index"].core_hours == pytest.approx(2e9 * UNIT_COSTS["index_12mp"].value / 3600)


def test_every_unit_cost_says_where_it_comes_from():
    assert all(cost.value > 0 and cost.unit and cost.source and cost.date for cost in UNIT_COSTS.values())
    assert all(dataclasses.asdict(capacity.PUBLISHED).values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[]", "stages: name at least one"),
        ('stages=[{kind="base"}]', r"stages\.0\.images_seen: is 0 for 'base'"),
        ('stages=[{kind="index", images_seen=3}]', r"stages\.0\.images_seen: is 3 for 'index'"),
        ('stages=[{kind="latents", resolution=100}]', r"stages\.0\.resolution: 100 is not a multiple of 64"),
        ("train_gpu.utilization=1.5", r"train_gpu\.utilization"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(override, message):
    with pytest.raises(JobError, match=message):
        load(PlanJob, CONFIG, [override])


def test_the_page_on_scaling_shows_what_the_job_prints(capsys):
    plan.run(load(PlanJob, CONFIG, []))
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs/scaling.md").read_text()
