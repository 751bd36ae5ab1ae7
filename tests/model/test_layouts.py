"""A whole model in the public layouts: there and back to the bit, and diffusers and transformers compute the same."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import (
    END_OF_TEXT,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    DiffusionConfig,
    PredictionType,
    TextConfig,
    TextTowerConfig,
)
from model.diffusion import Diffusion
from model.layers import fourier
from model.layouts import agreed_config, diffusers_config, from_diffusers, to_diffusers
from model.publish import (
    Model,
    pipeline_parts,
    read_scheduler,
    scheduler_config,
    single_file_parts,
    write_pipeline,
    write_single_file,
)
from model.tensors import shapes, stored
from model.text import TextEncoders, load_text_encoders, random_text_encoders, read_text, text_states, tokenize
from model.text_weights import clip_l_from_transformers, from_transformers, to_transformers, transformers_config
from model.unet import UNet
from model.vae import VAE
from model.weights import fingerprint, load_unet, load_vae

TEXT = TextConfig(  # diffusers tells a base's single file by the tenth layer of bigG
    clip_l=TextTowerConfig(width=32, layers=2, heads=2, activation="quick_gelu", pad_token=END_OF_TEXT),
    bigg=TextTowerConfig(width=64, layers=10, heads=2, activation="gelu", pad_token=0, projection_dim=64),
)
CAPTIONS = ["a photo of a cat", "", "word " * 100, "a naïve café's 3 dogs, <b>"]
FACTOR = 0.7125


@pytest.fixture(scope="module")
def networks():
    """(U-Net, VAE, text encoders) of the base and of the refiner; every weight counts."""
    generator = torch.Generator().manual_seed(0)
    vae_config = dataclasses.replace(VAE_PRESETS["tiny"], scaling_factor=FACTOR)
    unets = {name: UNet(UNET_PRESETS[f"tiny-{name}"]) for name in ("base", "refiner")}
    vae, text = VAE(vae_config).eval(), random_text_encoders(TEXT, 0)
    for module in (*unets.values(), vae):
        for weight in module.parameters():
            fan_in = max(weight[0].numel(), 8)
            weight.data.normal_(float(weight.ndim == 1) * 0.5, fan_in**-0.5, generator=generator)
    return {name: (unet.eval(), vae, text) for name, unet in unets.items()}


@pytest.fixture(scope="module")
def published(networks, tmp_path_factory):
    """Folder with pipeline folder and single file of base and refiner."""
    folder = tmp_path_factory.mktemp("published")
    for name, (unet, vae, text) in networks.items():
        (folder / name).mkdir()
        model = model_of(unet, vae, text)
        write_pipeline(folder / name, model, 256)
        write_single_file(folder / f"{name}.safetensors", model)
    return folder


def model_of(unet, vae, text, diffusion: DiffusionConfig | None = None) -> Model:
    states = {"unet": stored(unet.state_dict()), "vae": stored(vae.state_dict()), **text_states(text)}
    if "aesthetic_score" in unet.config.conditioning:
        del states["clip_l"]
    return Model(
        unet=unet.config, vae=vae.config, text=text.config, diffusion=diffusion or DiffusionConfig(), states=states
    )


def on_meta(name: str) -> Model:
    with torch.device("meta"):
        return model_of(UNet(UNET_PRESETS[name]), VAE(VAE_PRESETS["sdxl"]), TextEncoders(TEXT_PRESETS["sdxl"]))


def equal(state, other):
    return state.keys() == other.keys() and all(
        torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state
    )


@pytest.mark.parametrize("name", ["base", "refiner"])
def test_full_size_files_have_the_published_keys_and_parameters(name):
    model = on_meta(name)
    parts = single_file_parts(model)
    counts = {part: sum(math.prod(value.shape) for value in state.values()) for part, state in parts.items()}
    expected = {"unet": {"base": 2_567_463_684, "refiner": 2_259_526_660}[name], "vae": 83_653_863, "bigg": 694_659_840}
    assert counts == expected | ({"clip_l": 123_060_480} if name == "base" else {})
    keys = {key for state in parts.values() for key in state}
    number = 1 if name == "base" else 0
    assert f"conditioner.embedders.{number}.model.transformer.resblocks.31.attn.in_proj_weight" in keys
    clip_l = "conditioner.embedders.0.transformer.text_model.encoder.layers.11.layer_norm2.bias"
    assert (clip_l in keys) == (name == "base")
    official = Path(__file__).parents[3] / "shared/sdxl/official_keys.json"
    if not official.exists():
        pytest.skip("no list of the published keys beside this checkout")
    published = json.loads(official.read_text())
    for part, prefix, listed in (("unet", "model.diffusion_model.", name), ("vae", "first_stage_model.", "vae")):
        assert shapes(parts[part]) == {prefix + key: tuple(shape) for key, shape in published[listed].items()}


def test_full_size_text_encoders_have_transformers_keys_and_shapes():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    parts = pipeline_parts(on_meta("base"))
    for part, tower, kind in (
        ("text_encoder", TEXT_PRESETS["sdxl"].clip_l, CLIPTextModel),
        ("text_encoder_2", TEXT_PRESETS["sdxl"].bigg, CLIPTextModelWithProjection),
    ):
        with torch.device("meta"):
            theirs = kind(CLIPTextConfig(**transformers_config(tower)))
        found = {key.removeprefix("text_model."): shape for key, shape in shapes(parts[part]).items()}
        assert found == {key.removeprefix("text_model."): shape for key, shape in shapes(theirs.state_dict()).items()}
        assert all(key.startswith(("text_model.", "text_projection.")) for key in parts[part])


@pytest.mark.parametrize("config", [*UNET_PRESETS.values(), *VAE_PRESETS.values()])
def test_the_diffusers_layout_has_diffusers_keys_and_shapes(config):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    is_vae = config in VAE_PRESETS.values()
    with torch.device("meta"):
        own = (VAE if is_vae else UNet)(config)
        theirs = (AutoencoderKL if is_vae else UNet2DConditionModel).from_config(diffusers_config(config))
    assert shapes(to_diffusers(own.state_dict(), config)) == shapes(theirs.state_dict())


def test_names_go_there_and_back_to_the_bit(networks):
    unet, vae, text = networks["base"]
    for module in (unet, vae):
        there = to_diffusers(module.state_dict(), module.config)
        assert equal(from_diffusers(there, module.config), module.state_dict())
    states = text_states(text)
    for back, tower in ((from_transformers, "bigg"), (clip_l_from_transformers, "clip_l")):
        assert fingerprint(back(to_transformers(states[tower]))) == fingerprint(states[tower])


@pytest.mark.parametrize("name", ["base", "refiner"])
@pytest.mark.parametrize("layout", ["folder", "component", "single file"])
def test_what_is_written_comes_back_to_the_bit(networks, published, name, layout):
    unet, vae, text = networks[name]
    root = published / (f"{name}.safetensors" if layout == "single file" else name)
    below = (lambda part: root / part) if layout == "component" else lambda part: root
    found = load_unet(below("unet"), unet.config)
    assert equal(found.state_dict(), unet.state_dict())
    assert all(weight.requires_grad for weight in found.parameters())
    again = load_vae(below("vae"), VAE_PRESETS["tiny"])  # whose scaling factor is another
    assert equal(again.state_dict(), vae.state_dict())
    assert again.config.scaling_factor == FACTOR
    states = text_states(text)
    clip_l = str(below("text_encoder")) if name == "base" else None
    encoders = read_text(TEXT, clip_l, str(below("text_encoder_2")))
    for tower, state in encoders.items():
        assert fingerprint(state) == fingerprint(states[tower])


def test_diffusers_computes_what_we_compute(networks, published, relative_error):
    from diffusers import StableDiffusionXLPipeline

    unet, vae, text = networks["base"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(published / "base")
    generator = torch.Generator().manual_seed(1)
    latents, image = (torch.randn(2, c, 16, 16, generator=generator) for c in (4, 3))
    context, pooled = torch.randn(2, 77, 96, generator=generator), torch.randn(2, 64, generator=generator)
    sizes = torch.tensor([[64.0, 48.0, 3.0, 5.0, 32.0, 16.0]] * 2)
    timesteps = torch.tensor([7, 800])
    vector = torch.cat([pooled, *(fourier(column, 256) for column in sizes.T)], dim=1)
    tokens = tokenize(CAPTIONS, TEXT)
    with torch.no_grad():
        theirs = pipeline.unet(
            latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}
        ).sample
        assert relative_error(unet(latents, timesteps, context, vector), theirs) < 1e-5
        assert relative_error(vae.encode(image).mean, pipeline.vae.encode(image).latent_dist.mean) < 1e-5
        assert relative_error(vae.decode(latents), pipeline.vae.decode(latents).sample) < 1e-5
        features = text(tokens)
        left = pipeline.text_encoder(tokens.clip_l, output_hidden_states=True).hidden_states[-2]
        right = pipeline.text_encoder_2(tokens.bigg, output_hidden_states=True)
    assert relative_error(features.context, torch.cat([left, right.hidden_states[-2]], dim=-1)) < 1e-5
    assert relative_error(features.pooled, right.text_embeds) < 1e-5
    for tokenizer, expected in ((pipeline.tokenizer, tokens.clip_l), (pipeline.tokenizer_2, tokens.bigg)):
        found = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(found, expected)
        assert len(tokenizer) == 49_408
    assert (pipeline.tokenizer.pad_token, pipeline.tokenizer_2.pad_token) == ("<|endoftext|>", "!")
    assert pipeline.config.force_zeros_for_empty_prompt is True
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 256
    assert pipeline.vae.config.scaling_factor == FACTOR


def test_diffusers_reads_our_refiner(networks, published):
    from diffusers import StableDiffusionXLImg2ImgPipeline

    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(published / "refiner")
    assert (pipeline.text_encoder, pipeline.tokenizer) == (None, None)
    assert pipeline.config.requires_aesthetics_score is True
    assert pipeline.config.force_zeros_for_empty_prompt is False
    unet, *_ = networks["refiner"]
    assert equal(from_diffusers(pipeline.unet.state_dict(), unet.config), unet.state_dict())


def test_diffusers_reads_our_single_file(published):
    from diffusers import StableDiffusionXLPipeline

    expected = StableDiffusionXLPipeline.from_pretrained(published / "base")
    found = StableDiffusionXLPipeline.from_single_file(
        str(published / "base.safetensors"), config=str(published / "base"), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert equal(getattr(found, part).state_dict(), getattr(expected, part).state_dict())


@pytest.mark.parametrize("form", ["whole", "sharded", "fp16"])
def test_we_read_what_diffusers_saves(networks, published, tmp_path, form):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(published / "base")
    dtype = torch.float32
    if form == "fp16":
        dtype = torch.float16
        pipeline.to(dtype).save_pretrained(tmp_path, variant="fp16")
    else:
        pipeline.save_pretrained(tmp_path, max_shard_size="1MB" if form == "sharded" else "1GB")
    indices = [path.parent.name for path in tmp_path.rglob("*.safetensors.index.json")]
    assert sorted(indices) == (["text_encoder", "text_encoder_2", "unet", "vae"] if form == "sharded" else [])
    unet, vae, text = networks["base"]
    in_dtype = {key: value.to(dtype) for key, value in unet.state_dict().items()}
    assert equal(load_unet(tmp_path, unet.config).state_dict(), in_dtype)
    assert fingerprint(load_vae(tmp_path / "vae", vae.config)) == fingerprint(stored_as(vae, dtype))
    encoders = load_text_encoders(TEXT, str(tmp_path), str(tmp_path / "text_encoder_2"), dtype=dtype)
    assert fingerprint(encoders) == fingerprint(stored_as(text, dtype))


def stored_as(module, dtype):
    return {key: value.to(dtype) for key, value in module.state_dict().items()}


def test_a_published_file_may_hold_what_no_network_reads(networks, published, tmp_path):
    unet, vae, text = networks["base"]
    tensors = load_file(published / "base.safetensors")
    tensors["first_stage_model.model_ema.decay"] = torch.zeros(())
    tensors["model_ema.diffusion_modelout2bias"] = torch.zeros(4)
    tensors["denoiser.sigmas"] = torch.zeros(1000)
    tensors["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    path = tmp_path / "sdxl.safetensors"
    save_file(tensors, path)
    assert equal(load_unet(path, unet.config).state_dict(), unet.state_dict())
    assert equal(load_vae(path, vae.config).state_dict(), vae.state_dict())
    assert fingerprint(load_text_encoders(TEXT, str(path), str(path))) == fingerprint(text)
    states = read_text(TEXT, str(path), str(path))
    model = dataclasses.replace(model_of(unet, vae, text), states=model_of(unet, vae, text).states | states)
    write_single_file(tmp_path / "again.safetensors", model)
    again = load_file(tmp_path / "again.safetensors")
    assert again["conditioner.embedders.1.model.logit_scale"] == torch.tensor(4.6)
    assert again.keys() == {
        key for key in tensors if not any(word in key for word in ("model_ema", "position_ids", "denoiser"))
    }
    assert "logit_scale" not in pipeline_parts(model)["text_encoder_2"]


@pytest.mark.parametrize(
    ("key", "load"),
    [
        ("model.diffusion_model.out.2.bias", lambda path: load_unet(path, UNET_PRESETS["tiny-base"])),
        ("first_stage_model.quant_conv.bias", lambda path: load_vae(path, VAE_PRESETS["tiny"])),
        (
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            lambda path: load_text_encoders(TEXT, str(path), str(path)),
        ),
        ("conditioner.embedders.1.model.ln_final.bias", lambda path: load_text_encoders(TEXT, str(path), str(path))),
    ],
)
def test_keys_of_a_published_file_that_do_not_fit_are_listed(published, tmp_path, key, load):
    tensors = load_file(published / "base.safetensors")
    surplus = key.rpartition(".")[0] + ".surplus"
    tensors[surplus] = tensors.pop(key)
    save_file(tensors, tmp_path / "sdxl.safetensors")
    with pytest.raises(
        ValueError, match=r"missing: \['[a-z0-9_.]*bias'\]\nunexpected: \['[a-z0-9_.]*surplus'\]"
    ) as raised:
        load(tmp_path / "sdxl.safetensors")
    ours = key.replace("final_layer_norm", "ln_final")  # CLIP-L goes by open_clip's names here
    assert ours.endswith(str(raised.value).split("missing: ['")[1].split("']")[0])


def test_keys_that_belong_to_no_network_are_listed_by_whatever_network_is_loaded(published, tmp_path):
    path = tmp_path / "sdxl.safetensors"
    save_file(load_file(published / "base.safetensors") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    for load in (
        lambda: load_unet(path, UNET_PRESETS["tiny-base"]),
        lambda: load_vae(path, VAE_PRESETS["tiny"]),
        lambda: load_text_encoders(TEXT, str(path), str(published / "base")),
        lambda: load_text_encoders(TEXT, str(published / "base"), str(path)),
    ):
        with pytest.raises(
            ValueError, match=r"sdxl.*belong to no network of SDXL[^\n]*\nunexpected: \['v_pred', 'ztsnr'\]"
        ):
            load()


def test_clip_l_is_not_in_a_refiners_file(published):
    with pytest.raises(ValueError, match="holds no CLIP-L"):
        load_text_encoders(TEXT, str(published / "refiner.safetensors"), str(published / "refiner.safetensors"))


def test_the_published_configs_are_understood_as_lists_and_as_numbers():
    refiner = UNET_PRESETS["refiner"]
    found = diffusers_config(refiner) | {"transformer_layers_per_block": 4, "cross_attention_dim": [1280] * 4}
    assert agreed_config(found | {"layers_per_block": [2] * 4}, refiner, "config.json") == refiner
    for key, value in (("attention_head_dim", 8), ("cross_attention_dim", 2048), ("flip_sin_to_cos", False)):
        with pytest.raises(ValueError, match=key):
            agreed_config(found | {key: value}, refiner, "config.json")
    vae = VAE_PRESETS["sdxl"]
    assert agreed_config(diffusers_config(vae) | {"scaling_factor": 0.5}, vae, "config.json").scaling_factor == 0.5
    with pytest.raises(ValueError, match="shift_factor"):
        agreed_config(diffusers_config(vae) | {"shift_factor": 0.1}, vae, "config.json")
    with pytest.raises(ValueError, match="no scaling_factor"):
        agreed_config({}, vae, "config.json")


@pytest.mark.parametrize(
    "entry",
    [{"center_input_sample": True}, {"mid_block_scale_factor": 2}, {"timestep_post_act": "silu"}, "attention_head_dim"],
)
def test_what_a_config_says_otherwise_or_not_at_all_is_refused(entry):
    config = UNET_PRESETS["base"]
    found = diffusers_config(config)
    found = found | entry if isinstance(entry, dict) else {key: found[key] for key in found if key != entry}
    with pytest.raises(ValueError, match=entry if isinstance(entry, str) else next(iter(entry))):
        agreed_config(found, config, "config.json")


def test_a_first_level_of_another_width_is_refused():
    for config in (UNET_PRESETS["tiny-base"], VAE_PRESETS["tiny"]):
        with pytest.raises(ValueError, match="has to begin with 1"):
            dataclasses.replace(config, channel_mult=(2, *config.channel_mult[1:]))


def test_a_vaes_old_attention_names_are_understood(networks):
    _, vae, _ = networks["base"]
    state = to_diffusers(vae.state_dict(), vae.config)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = state
    for new, name in names.items():
        old = {key.replace(new, name): value for key, value in old.items()}
    assert old.keys() != state.keys()
    assert equal(from_diffusers(old, vae.config), vae.state_dict())


def test_a_depth_that_diffusers_cannot_say_is_refused():
    with pytest.raises(ValueError, match="middle block"):
        diffusers_config(dataclasses.replace(UNET_PRESETS["tiny-base"], middle_depth=2))


@pytest.mark.parametrize(
    ("config", "spacing"),
    [
        (DiffusionConfig(), "leading"),
        (DiffusionConfig(prediction_type=PredictionType.V), "leading"),
        (DiffusionConfig(prediction_type=PredictionType.V, zero_terminal_snr=True), "trailing"),
        (DiffusionConfig(num_timesteps=500, beta_start=0.001, beta_end=0.02), "leading"),
    ],
)
def test_a_schedule_is_diffusers_schedule_and_comes_back(config, spacing):
    from diffusers import EulerDiscreteScheduler

    values = scheduler_config(config)
    assert read_scheduler(values, "scheduler_config.json") == config
    theirs = EulerDiscreteScheduler.from_config(values)
    assert theirs.config.timestep_spacing == spacing
    ours = Diffusion(config).alphas_cumprod.float()
    assert torch.allclose(
        theirs.alphas_cumprod[:-1], ours[:-1], rtol=1e-4
    )  # diffusers moves a zero at the end to 2^-24
    theirs.set_timesteps(10)
    last = config.num_timesteps - 1
    assert (int(theirs.timesteps[0]) == last) == config.zero_terminal_snr


@pytest.mark.parametrize(
    "wrong", [{"beta_schedule": "linear"}, {"prediction_type": "sample"}, {"trained_betas": [0.1]}]
)
def test_a_schedule_that_is_none_of_ours_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^scheduler_config"):
        read_scheduler(scheduler_config(DiffusionConfig()) | wrong, "scheduler_config.json")


def test_a_model_names_what_it_lacks(networks):
    unet, vae, text = networks["base"]
    model = model_of(unet, vae, text)
    states = {part: state for part, state in model.states.items() if part != "clip_l"}
    with pytest.raises(ValueError, match=r"expected .*clip_l"):
        dataclasses.replace(model, states=states)


def test_clip_l_keeps_the_published_prefix(networks):
    *_, text = networks["base"]
    assert all(key.startswith("text_model.") for key in to_transformers(text_states(text)["clip_l"]))
