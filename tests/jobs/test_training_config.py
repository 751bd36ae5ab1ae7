"""What the training jobs may be told."""

import pytest

from jobs.cli import JobError
from jobs.training_config import TrainBaseJob, TrainRefinerJob, TrainVAEJob
from tests.jobs.settings import LINE, toml, wrong

OFFLOADED = "workers.offload_optimizer=true"


def test_a_batch_that_does_not_divide_names_both_keys(make):
    message = wrong(make, TrainBaseJob, "batch.global_size=12")
    assert "batch.global_size" in message
    assert "batch.micro_size x workers.count = 4 x 2" in message
    assert make(TrainBaseJob, "batch.global_size=24").batch.global_size == 24


@pytest.mark.parametrize("timesteps", ["[0, 1001]", "[-1, 200]", "[200, 200]", "[300, 200]"])
@pytest.mark.parametrize("kind", [TrainBaseJob, TrainRefinerJob])
def test_timesteps_outside_the_schedule_are_refused(make, kind, timesteps):
    assert "task.loss.timesteps" in wrong(make, kind, f"task.loss.timesteps={timesteps}")


def test_a_shorter_schedule_bounds_the_timesteps(make):
    assert make(TrainRefinerJob, "task.diffusion.num_timesteps=200").task.loss.timesteps == (0, 200)
    assert "schedule's 100" in wrong(make, TrainRefinerJob, "task.diffusion.num_timesteps=100")


@pytest.mark.parametrize(
    "setting",
    [
        "batch.seed=-1",
        "optimizer.betas=[0.9]",
        "optimizer.betas=[0.9, 1.0]",
        "optimizer.betas=[-0.1, 0.9]",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "optimizer.weight_decay=-1",
        "optimizer.clip_norm=-1",
        "ema.rampup=0",
        "task.loss.text_dropout=1.5",
        "task.loss.caption_dropout=-0.1",
        "task.loss.min_snr_gamma=0",
        "task.loss.timestep_bias.multiplier=0",
        "task.loss.timestep_bias.portion=0",
        "task.loss.timestep_bias.strategy=sometimes",
        "task.loss.size_dropout=-0.5",
        "task.loss.offset_noise=-1",
        "task.diffusion.prediction_type=velocity",
        "workers.zero_stage=4",
        "workers.offload_optimizer=true",
        "workers.dtype=float16",
        "optimizer.decay_shape=step",
        "optimizer.final_lr_share=1.5",
        "optimizer.guard.action=shrug",
        "workers.count=two",
        "workers.min_count=0",
        "workers.min_count=3",
        "workers.grow_seconds=0",
    ],
)
def test_training_is_refused_with(make, setting):
    assert setting.partition("=")[0] in wrong(make, TrainBaseJob, setting)


def test_biased_timesteps_lie_among_those_that_are_drawn(make):
    strategy = "task.loss.timestep_bias.strategy"
    assert make(TrainRefinerJob, f"{strategy}=later").task.loss.biased_timesteps == (150, 200)
    assert make(TrainBaseJob, f"{strategy}=earlier").task.loss.biased_timesteps == (0, 250)
    bounds = "task.loss.timestep_bias.range=[100, 300]"
    assert make(TrainBaseJob, f"{strategy}=range", bounds).task.loss.biased_timesteps == (100, 300)
    assert "[100, 300], which are none or not all" in wrong(make, TrainRefinerJob, f"{strategy}=range", bounds)
    assert "timestep_bias: range is None with the strategy 'range'" in wrong(make, TrainBaseJob, f"{strategy}=range")
    assert "timestep_bias: range is (100, 300) with the strategy 'none'" in wrong(make, TrainBaseJob, bounds)
    few = "task.loss.timestep_bias.portion=0.001"
    assert "[200, 200], which are none" in wrong(make, TrainRefinerJob, f"{strategy}=later", few)


def test_a_schedule_that_ends_without_a_signal_needs_v(make):
    zero, v = "task.diffusion.zero_terminal_snr=true", "task.diffusion.prediction_type=v"
    message = wrong(make, TrainBaseJob, zero)
    assert "task.diffusion" in message
    assert "zero_terminal_snr needs prediction_type 'v'" in message
    assert make(TrainBaseJob, zero, v).task.diffusion.zero_terminal_snr


def test_the_perceptual_loss_is_left_out_or_named_in_full(make, tmp_path):
    trunk, heads = "task.lpips.trunk=vgg16.safetensors", "task.lpips.heads=heads.safetensors"
    assert make(TrainVAEJob).task.lpips is None
    assert make(TrainVAEJob, trunk, heads).task.lpips.trunk == f"{tmp_path}/vgg16.safetensors"
    assert "task.lpips.heads: is missing" in wrong(make, TrainVAEJob, trunk)
    assert "task.lpips.trunk: is missing" in wrong(make, TrainVAEJob, heads)
    assert "there is no preset 'vgg'" in wrong(make, TrainVAEJob, trunk, heads, "task.lpips.preset=vgg")
    pickled = "task.lpips.trunk=vgg16.pth"
    assert "set task.lpips.allow_pickle" in wrong(make, TrainVAEJob, pickled, heads)
    assert make(TrainVAEJob, pickled, heads, "task.lpips.allow_pickle=true")


@pytest.mark.parametrize("name", ["perceptual_weight", "kl_weight", "adversarial_weight", "adversarial_start_images"])
def test_weights_of_the_vaes_loss_are_not_negative(make, name):
    assert f"task.loss.{name}" in wrong(make, TrainVAEJob, f"task.loss.{name}=-1")


def test_a_denoiser_names_the_vae_that_made_its_latents(make):
    text = LINE.join(line for line in toml(TrainBaseJob).splitlines() if not line.startswith("task.vae.path"))
    with pytest.raises(JobError, match=r"task.vae.path: name the VAE"):
        make(TrainBaseJob, text=text)


def test_the_base_is_no_refiner_and_the_refiner_no_base(make):
    assert "'tiny-refiner' is not conditioned on target_size" in wrong(
        make, TrainBaseJob, "task.unet.preset=tiny-refiner"
    )
    message = wrong(make, TrainRefinerJob, "task.unet.preset=tiny-base")
    assert "'tiny-base' is not conditioned on aesthetic_score" in message


def test_a_refiners_samples_need_a_timestep_below_the_hand_over(make):
    message = wrong(make, TrainRefinerJob, "schedule.sample_images=80", "task.samples.handover=0")
    assert "task.samples.handover" in message


def test_stages_are_refused_where_they_cannot_work(make):
    for settings in (["workers.zero_stage=3"], ["workers.zero_stage=0"], ["workers.zero_stage=2", OFFLOADED]):
        make(TrainBaseJob, *settings)
    message = wrong(make, TrainBaseJob, "workers.zero_stage=1", OFFLOADED)
    assert "workers.offload_optimizer: stage 1 does not offload; take 2 or 3" in message
    message = wrong(make, TrainBaseJob, "workers.zero_stage=0", "workers.dtype=bfloat16")
    assert "workers.zero_stage: stage 0 adds up 2 passes in bfloat16" in message
    make(TrainBaseJob, "workers.zero_stage=0", "workers.dtype=bfloat16", "batch.micro_size=8")
    make(TrainVAEJob, "workers.zero_stage=3")
    make(TrainBaseJob, "workers.zero_stage=2", "workers.compile=true", "optimizer.implementation=8bit")
    message = wrong(make, TrainBaseJob, "workers.zero_stage=3", "optimizer.implementation=8bit")
    assert 'optimizer.implementation: "8bit" works under stages 0 to 2' in message
    message = wrong(make, TrainBaseJob, "workers.zero_stage=3", "workers.compile=true")
    assert "workers.compile: blocks are compiled whole, and stage 3 gathers weights within them" in message


def test_validation_needs_rows_that_are_held_out(make):
    message = wrong(make, TrainBaseJob, "schedule.validation_images=16")
    assert "schedule.validation_images" in message
    assert "batch.validation_share is 0" in message
    job = make(TrainBaseJob, "schedule.validation_images=16", "batch.validation_share=0.1")
    assert job.batch.validation_share == 0.1
