"""The export job as a person meets it: what is written is whole, exact and read by diffusers, or there is nothing."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from jobs import export
from jobs.cli import FAILURE, USAGE_ERROR, WORKER_ENVIRONMENT, main
from jobs.config import ExportJob
from model.config import DiffusionConfig, PredictionType
from model.text import read_text
from model.weights import fingerprint, load_unet, load_vae, save_weights
from pipelines import networks
from pipelines.checkpoints import AVERAGE, FORMAT, PROGRESS, Run, shard_file, write_shard
from pipelines.config import TextWeightsConfig, WeightsConfig
from pipelines.storage import Storage, StorageOptions

ROOT = Path(__file__).parents[2]
OPTIONS = StorageOptions()
V = DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True)
JOB = """
output = "out/model"
layout = "diffusers"
resolution = 32
unet = {preset = "tiny-base", path = "runs/base"}
vae = {preset = "tiny", path = "runs/vae"}
text = {preset = "tiny", seed = 0}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs' output folders."""
    folder = tmp_path_factory.mktemp("runs")
    for name, preset in (("base", "tiny-base"), ("refiner", "tiny-refiner"), ("vae", "tiny")):
        load = networks.vae if name == "vae" else networks.unet
        module = load(WeightsConfig(preset=preset), OPTIONS)
        (folder / name).mkdir()
        extra = {"scaling_images": 4} if name == "vae" else asdict(V)
        kind = "vae" if name == "vae" else "unet"
        save_weights(folder / name / networks.WEIGHTS_FILE, module.state_dict(), kind, module.config, extra)
    return folder


@pytest.fixture
def folder(tmp_path, runs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in WORKER_ENVIRONMENT:  # main sets them for good
        monkeypatch.setenv(name, os.environ.get(name, ""))
    (tmp_path / "export.toml").write_text(JOB)
    (tmp_path / "runs").symlink_to(runs)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def ended(*overrides: str) -> int:
    with pytest.raises(SystemExit) as ending:
        main(ExportJob, export.run, export.plan, ["export.toml", *overrides], needs_ray=False)
    return ending.value.code


SINGLE = ("layout=single_file", "output=out/model.safetensors")
REFINER = ("unet.preset=tiny-refiner", "unet.path=runs/refiner")


@pytest.mark.parametrize("network", ["base", "refiner"])
@pytest.mark.parametrize("layout", ["diffusers", "single_file"])
def test_an_export_holds_every_network_to_the_bit(folder, capsys, layout, network):
    settings = (*(SINGLE if layout == "single_file" else ()), *(REFINER if network == "refiner" else ()))
    assert ended(*settings) == 0
    path = folder / ("out/model.safetensors" if layout == "single_file" else "out/model")
    assert os.listdir(folder / "out") == [path.name]
    source = WeightsConfig(preset=f"tiny-{network}", path=f"{folder}/runs/{network}")
    unet = networks.unet(source, OPTIONS)
    assert fingerprint(load_unet(path, unet.config)) == fingerprint(unet)
    vae = networks.vae(WeightsConfig(preset="tiny", path=f"{folder}/runs/vae"), OPTIONS)
    again = load_vae(path, vae.config)
    assert fingerprint(again) == fingerprint(vae)
    assert again.config == vae.config
    text = networks.text_encoders(TextWeightsConfig(preset="tiny", seed=0))
    states = read_text(text.config, str(path) if network == "base" else None, str(path))
    assert fingerprint(states["bigg"]) == fingerprint(text.bigg)
    written = WeightsConfig(preset=f"tiny-{network}", path=str(path))
    assert networks.trained_diffusion(written, OPTIONS) == V
    printed = capsys.readouterr().out
    count = sum(weight.numel() for weight in unet.parameters())
    assert f"unet: {count:,} parameters" in printed
    assert f"in {path}" in printed
    assert ("warning: the VAE's scaling factor is 1.0" in printed) == (layout == "single_file")


def test_diffusers_loads_the_folder_in_half_precision_with_its_schedule(folder):
    from diffusers import StableDiffusionXLPipeline

    assert ended("dtype=float16") == 0
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "out/model", torch_dtype=torch.float16)
    assert pipeline.unet.dtype == pipeline.text_encoder_2.dtype == torch.float16
    scheduler = pipeline.scheduler.config
    assert (scheduler.prediction_type, scheduler.rescale_betas_zero_snr) == ("v_prediction", True)
    assert scheduler.timestep_spacing == "trailing"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_dry_run_names_every_part_and_writes_nothing(folder, capsys):
    before = files(folder)
    assert ended("--dry-run", "dtype=bfloat16") == 0
    assert files(folder) == before
    printed = capsys.readouterr().out
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert f"\n{part}: " in printed
    assert f"would write a diffusers folder of bfloat16 to {folder}/out/model" in printed


@pytest.mark.parametrize("settings", [(), SINGLE])
def test_what_is_there_is_not_replaced(folder, capsys, settings):
    assert ended(*settings) == 0
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert ended(*settings) == FAILURE
    assert "is there already, and an export replaces nothing" in capsys.readouterr().err
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before


@pytest.mark.parametrize("settings", [(), SINGLE])
def test_weights_that_overflow_are_named_and_nothing_is_written(folder, capsys, settings):
    network = networks.unet(WeightsConfig(preset="tiny-base", path=f"{folder}/runs/base"), OPTIONS)
    state = network.state_dict()
    state["out.0.bias"][3], state["time_embed.0.bias"][0] = 1e5, -7e4
    large = folder / "large.safetensors"
    save_weights(large, state, "unet", network.config, asdict(V))
    assert ended("unet.path=large.safetensors", "dtype=float16", *settings) == FAILURE
    error = capsys.readouterr().err
    assert "not finite in torch.float16; nothing was written: unet out.0.bias, unet time_embed.0.bias" in error
    assert os.listdir(folder / "out") == []
    assert ended("unet.path=large.safetensors", "dtype=bfloat16", *settings) == 0


@pytest.mark.parametrize("settings", [(), SINGLE])
def test_an_export_that_fails_on_its_way_leaves_nothing(folder, monkeypatch, settings):
    from model import tensors

    written, raw = [], tensors.raw

    def fails(tensor):
        written.append(tensor)
        if len(written) == 200:
            raise OSError("no space left")
        return raw(tensor)

    monkeypatch.setattr(tensors, "raw", fails)
    assert ended(*settings) == FAILURE
    assert os.listdir(folder / "out") == []


def test_a_checkpoint_of_a_run_that_goes_on_is_exported_with_its_average(folder, runs):
    network = networks.unet(WeightsConfig(preset="tiny-base", path=f"{runs}/base"), OPTIONS)
    run = folder / "going"
    checkpoint, file = Storage(f"{run}/checkpoints/checkpoint_1"), shard_file("unet", 0)
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"settings": {"task": {"diffusion": asdict(V)}}}))
    weights = {name: weight.detach() for name, weight in network.named_parameters()}
    held = [Run(name, 0, weight.numel()) for name, weight in weights.items()]
    average = torch.cat([weight.flatten() for weight in weights.values()])
    shapes = {name: weight.shape for name, weight in weights.items()}
    size = write_shard(checkpoint, file, held, shapes, {AVERAGE: average})
    checkpoint.write_json(PROGRESS, {"format": FORMAT, "images_seen": 8, "files": {file: size}})
    assert ended("unet.path=going/checkpoints/checkpoint_1") == 0
    written = WeightsConfig(preset="tiny-base", path=f"{folder}/out/model")
    assert networks.unet_fingerprint(written, OPTIONS) == fingerprint(network)
    assert networks.trained_diffusion(written, OPTIONS) == V


def test_the_text_encoders_that_are_named_are_the_ones_that_are_written(folder):
    assert ended() == 0
    text = f'text = {{preset = "tiny", bigg = "{folder}/out/model"}}\n'
    Path("export.toml").write_text(JOB.replace('text = {preset = "tiny", seed = 0}\n', text))
    assert ended("output=out/refiner", *REFINER) == 0  # which reads bigG alone
    first, second = (folder / "out" / name / "text_encoder_2/model.safetensors" for name in ("model", "refiner"))
    assert first.read_bytes() == second.read_bytes()
    assert not (folder / "out/refiner/text_encoder").exists()


def test_on_s3_the_index_comes_last_and_nothing_is_replaced(folder, s3, monkeypatch, capsys):
    endpoint, output = f"storage.s3_endpoint={s3.endpoint}", f"s3://{s3.bucket}/exports/{folder.name}"
    uploaded = []
    upload = Storage.upload
    monkeypatch.setattr(Storage, "upload", lambda self, name, file: uploaded.append(name) or upload(self, name, file))
    assert ended(endpoint, f"output={output}") == 0
    assert uploaded[-1] == "model_index.json"
    assert ended(endpoint, f"output={output}") == FAILURE
    single = (endpoint, "layout=single_file", f"output={output}.safetensors")
    assert ended(*single) == 0
    assert ended(*single) == FAILURE
    options = StorageOptions(s3_endpoint=s3.endpoint)
    expected = networks.unet_fingerprint(WeightsConfig(preset="tiny-base", path=f"{folder}/runs/base"), OPTIONS)
    for path in (output, f"{output}.safetensors"):
        assert networks.unet_fingerprint(WeightsConfig(preset="tiny-base", path=path), options) == expected
    # The text encoders come from s3:// too.
    text = f'text = {{preset = "tiny", clip_l = "{output}", bigg = "{output}"}}\n'
    Path("export.toml").write_text(JOB.replace('text = {preset = "tiny", seed = 0}\n', text))
    assert ended(endpoint) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("layout=onefile",), "layout: Input should be 'single_file' or 'diffusers'"),
        (("layout=single_file",), "out/model is no name of a .safetensors file"),
        (("output=out/model.safetensors",), "is no name of a folder"),
        (("unet.preset=tiny",), "unet.preset: there is no preset 'tiny'"),
        (("unet.preset=base",), "unet.preset: reads text of 0 + 2048 channels"),
        (("vae={preset='tiny'}",), "vae.path: is missing"),
        (("text={preset='tiny', clip_l='a'}",), "text: name both clip_l and bigg"),
        (("text={preset='tiny'}", *REFINER), "text: name bigg, or give a seed"),
        (("resolution=30",), "resolution: 30 is not a multiple of 8"),
        (("unet.pickle=true",), "unet.pickle: there is no such setting"),
    ],
)
def test_mistakes_are_seen_before_anything_starts(folder, capsys, settings, message):
    assert ended(*settings) == USAGE_ERROR
    assert message in capsys.readouterr().err


def test_the_job_starts_without_ray(folder):
    command = [sys.executable, "-c", CODE, "export.toml"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "export: " in done.stdout
    assert (folder / "out/model/model_index.json").exists()


CODE = """
import sys
sys.modules["ray"] = None  # importing it is an error
from jobs import export
from jobs.cli import main
from jobs.config import ExportJob
main(ExportJob, export.run, export.plan, needs_ray=False)
"""
