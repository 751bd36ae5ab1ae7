"""A whole model in the public layouts: one single file, or a diffusers pipeline's folder, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model.config import (
    CONTEXT_LENGTH,
    END_OF_TEXT,
    START_OF_TEXT,
    VOCABULARY,
    Conditioning,
    DiffusionConfig,
    PredictionType,
    TextConfig,
    TextTowerConfig,
    UNetConfig,
    VAEConfig,
)
from model.layouts import diffusers_config, to_diffusers
from model.tensors import State, Stored, write_file
from model.text import open_clip_tokenizer
from model.text_weights import (
    BIGG_PREFIXES,
    CLIP_L_PREFIX,
    to_transformers,
    transformers_config,
)
from model.weights import CONFIG, PIPELINE, PREFIXES, SCALING_FACTOR, Kind

DIFFUSION = "diffusion"  # in the metadata of a single file
SCHEDULER = "scheduler/scheduler_config.json"
PREDICTIONS = {PredictionType.EPSILON: "epsilon", PredictionType.V: "v_prediction"}  # diffusers' names
SPECIAL_TOKENS = {START_OF_TEXT: "<|startoftext|>", END_OF_TEXT: "<|endoftext|>"}


@dataclass(frozen=True, kw_only=True)
class Model:
    """Networks that work together, and the schedule they were trained with."""

    unet: UNetConfig
    vae: VAEConfig
    text: TextConfig
    diffusion: DiffusionConfig
    states: Mapping[str, State]
    """Weights in our names: unet, vae, bigg, and clip_l where the U-Net reads it."""

    def __post_init__(self) -> None:
        expected = {"unet", "vae", "bigg"} | (set() if is_refiner(self.unet) else {"clip_l"})
        if self.states.keys() != expected:
            raise ValueError(f"a model of {sorted(self.states)}; expected {sorted(expected)}")


def is_refiner(config: UNetConfig) -> bool:
    """Whether a U-Net is the refiner, which reads bigG's text alone and is told an aesthetic score."""
    return Conditioning.AESTHETIC_SCORE in config.conditioning


def single_file_parts(model: Model) -> dict[str, dict[str, Stored]]:
    """What a single file holds of each network, by the file's keys."""
    refiner = is_refiner(model.unet)
    named = {
        "unet": (PREFIXES[Kind.UNET], model.states["unet"]),
        "vae": (PREFIXES[Kind.VAE], model.states["vae"]),
        "bigg": (BIGG_PREFIXES[refiner], model.states["bigg"]),
    }
    if not refiner:
        named["clip_l"] = (CLIP_L_PREFIX, to_transformers(model.states["clip_l"]))
    return {part: {prefix + key: value for key, value in state.items()} for part, (prefix, state) in named.items()}


def write_single_file(path: Path, model: Model, wrote: Callable[[str], None] = lambda part: None) -> None:
    """Write everything into one safetensors file; `wrote` is told the part after each of its tensors.

    The scaling factor and the schedule have no place in this layout: they go into the metadata, which we read back.
    """
    parts = single_file_parts(model)
    part_of = {key: part for part, state in parts.items() for key in state}
    tensors = {key: value for state in parts.values() for key, value in state.items()}
    metadata = {
        "format": "pt",
        SCALING_FACTOR: repr(model.vae.scaling_factor),
        DIFFUSION: json.dumps(asdict(model.diffusion), sort_keys=True),
    }
    write_file(path, tensors, metadata, lambda key: wrote(part_of[key]))


def pipeline_parts(model: Model) -> dict[str, dict[str, Stored]]:
    """What a diffusers folder holds of each network, by the keys of diffusers and transformers."""
    states = model.states
    parts = {
        "unet": to_diffusers(states["unet"], model.unet),
        "vae": to_diffusers(states["vae"], model.vae),
        "text_encoder_2": to_transformers(states["bigg"]),
    }
    if "clip_l" in states:
        parts["text_encoder"] = to_transformers(states["clip_l"])
    return parts


def write_pipeline(
    folder: Path, model: Model, resolution: int, wrote: Callable[[str], None] = lambda part: None
) -> None:
    """Write a diffusers pipeline's folder; model_index.json, without which it is none, comes last.

    `resolution` is the side of the pictures, in pixels, that the pipeline makes where none is asked for. `wrote` is
    told the part after each of its tensors.
    """
    towers = {"text_encoder": model.text.clip_l, "text_encoder_2": model.text.bigg}
    configs = {
        "unet": diffusers_config(model.unet) | {"sample_size": resolution // model.vae.downsample},
        "vae": diffusers_config(model.vae) | {"sample_size": resolution},
        **{part: transformers_config(tower) for part, tower in towers.items()},
    }

    def told(part: str, key: str) -> None:
        wrote(part)

    for part, state in pipeline_parts(model).items():
        (folder / part).mkdir(parents=True)
        name = "model.safetensors" if part in towers else "diffusion_pytorch_model.safetensors"
        write_file(folder / part / name, state, {"format": "pt"}, partial(told, part))
        write_json(folder / part / CONFIG, configs[part])
        if part in towers:
            write_tokenizer(folder / part.replace("text_encoder", "tokenizer"), towers[part])
    (folder / SCHEDULER).parent.mkdir()
    write_json(folder / SCHEDULER, scheduler_config(model.diffusion))
    write_json(folder / PIPELINE, model_index(model.unet))


def model_index(config: UNetConfig) -> dict[str, Any]:
    """A pipeline's components and switches, as published for base and refiner."""
    refiner = is_refiner(config)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLImg2ImgPipeline" if refiner else "StableDiffusionXLPipeline",
        "_diffusers_version": "0.19.0",  # the first with both classes
        "force_zeros_for_empty_prompt": not refiner,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": [None, None] if refiner else ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": [None, None] if refiner else ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return index | ({"requires_aesthetics_score": True} if refiner else {})


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """The noise schedule as diffusers' scheduler_config.json."""
    return {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": config.num_timesteps,
        "beta_start": config.beta_start,
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "prediction_type": PREDICTIONS[config.prediction_type],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        # Leading leaves out the noisiest timestep; a schedule that ends without a signal has to begin there.
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
        "steps_offset": 1,
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        # For who puts another scheduler in its place, with this file: latents leave [-1, 1], and DDIM would clip them;
        # and without the second, which the published file sets to false, it would stop before the noise is gone.
        "clip_sample": False,
        "set_alpha_to_one": True,
        "skip_prk_steps": True,
    }


def read_scheduler(values: Mapping[str, Any], what: str) -> DiffusionConfig:
    """The noise schedule of a scheduler_config.json. Raises ValueError for one that ours cannot say."""
    predictions = {name: own for own, name in PREDICTIONS.items()}
    if absent := sorted({"num_train_timesteps", "beta_start", "beta_end"} - values.keys()):
        raise ValueError(f"{what} does not say {absent}")
    prediction = values.get("prediction_type", "epsilon")
    schedule = values.get("beta_schedule", "linear")
    if prediction not in predictions or schedule != "scaled_linear" or values.get("trained_betas") is not None:
        raise ValueError(
            f"{what}: a schedule of {schedule!r} betas that predicts {prediction!r}; ours are 'scaled_linear', not "
            f"trained, and predict one of {', '.join(predictions)}"
        )
    return DiffusionConfig(
        num_timesteps=values["num_train_timesteps"],
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        prediction_type=predictions[prediction],
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
    )


def write_tokenizer(folder: Path, tower: TextTowerConfig) -> None:
    """CLIP's tokenizer as transformers reads it, padding with the tower's token.

    It gives our tokens but for what `tokenize` says.
    """
    from transformers import CLIPTokenizer

    source = open_clip_tokenizer()
    vocabulary = {SPECIAL_TOKENS.get(number, token): number for token, number in source.encoder.items()}
    if len(vocabulary) != VOCABULARY:
        raise ValueError(f"the vocabulary has {len(vocabulary)} entries; CLIP's has {VOCABULARY}")
    merges = list(source.bpe_ranks)
    tokens = {number: token for token, number in vocabulary.items()}
    tokenizer = CLIPTokenizer(  # given files instead of these, it takes neither and has no vocabulary
        vocab=vocabulary, merges=merges, pad_token=tokens[tower.pad_token], model_max_length=CONTEXT_LENGTH
    )
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries; CLIP's has {VOCABULARY}")
    tokenizer.save_pretrained(folder)
    # Versions of transformers before 5 read these two in place of tokenizer.json.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a config as the public folders have it."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
