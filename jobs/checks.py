"""Checks that several jobs make of their settings. Each raises ValueError that opens with the setting's dotted path."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from model.config import (
    LPIPS_PRESETS,
    TEXT_PRESETS,
    UNET_PRESETS,
    VAE_PRESETS,
    Conditioning,
    DenoiserLossConfig,
    DiffusionConfig,
    UNetConfig,
)
from pipelines.config import (
    DEFAULT_SCORE,
    OVERLAPS_PER_TILE,
    SINGLE_FILES,
    CropConfig,
    LPIPSWeightsConfig,
    SamplingConfig,
    SourceConfig,
    TextWeightsConfig,
    all_sources,
)
from pipelines.evaluate.config import GenerateConfig
from pipelines.preprocess.config import EncodeConfig, ScoreLimits, ScoringConfig

SIMILARITY = "clip_similarity"  # the score that is computed of image and caption
LOCAL_MODEL, SAFETENSORS = "local-dir:", ".safetensors"


def check_preset(key: str, name: str, presets: Iterable[str]) -> None:
    """The preset exists."""
    if name not in presets:
        raise ValueError(f"{key}: there is no preset {name!r}; there are {', '.join(presets)}")


def check_sources(prefix: str, source: SourceConfig | None, sources: Sequence[SourceConfig]) -> None:
    """There is one source or several, and each has a name of its own; weights of captions have captions."""
    if (source is None) != bool(sources):
        raise ValueError(f"{prefix}source: give a source, or {prefix}sources with several")
    names = [one.name for one in all_sources(source, tuple(sources))]
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"{prefix}sources: {names.count(name)} have the name {name!r}; each needs its own")
    for columns in (one.columns for one in all_sources(source, tuple(sources))):
        if columns.caption_weights is not None and not (columns.caption and isinstance(columns.caption, str)):
            raise ValueError(
                f"{prefix}source.columns.caption_weights: weighs the captions of one column, and caption is "
                f"{columns.caption!r}; give each of several columns its weight there"
            )


def check_outputs(outputs: Mapping[str, str | None], sources: Sequence[SourceConfig]) -> None:
    """No two outputs are one folder, and none lies in a source, which would be found to hold it the next time."""
    places = {key: _place(path) for key, path in outputs.items() if path is not None}
    for key, place in places.items():
        if same := [other for other in places if other != key and places[other] == place]:
            raise ValueError(f"{key}: {outputs[key]} is {same[0]} as well; give each its own folder")
        for source in sources:
            if not source.path.endswith(SINGLE_FILES) and f"{place}/".startswith(f"{_place(source.path)}/"):
                raise ValueError(
                    f"{key}: {outputs[key]} lies in the source {source.path}, which would be found to hold it the next "
                    "time; choose a folder beside it"
                )


def _place(path: str) -> str:
    return path.rstrip("/") if path.startswith("s3://") else os.path.abspath(path).rstrip("/")


def check_scores(
    key: str, limits: Mapping[str, ScoreLimits], sources: Sequence[SourceConfig], computed: bool = False
) -> None:
    """Limits are set on scores that a source has or that are computed, and leave something between them."""
    named = [name for source in sources for name in source.columns.scores]
    if DEFAULT_SCORE in named:
        raise ValueError(f"source.columns.scores.{DEFAULT_SCORE}: set source.columns.{DEFAULT_SCORE} instead")
    if SIMILARITY in named:
        raise ValueError(f"source.columns.scores.{SIMILARITY}: is the name of the computed score; give it another")
    there = [DEFAULT_SCORE, *([SIMILARITY] if computed else []), *dict.fromkeys(named)]
    for name, limit in limits.items():
        if name == SIMILARITY and not computed:
            raise ValueError(f"{key}.{name}: is computed where scoring names a CLIP model, and it names none")
        if name not in there:
            raise ValueError(f"{key}.{name}: source.columns names no such score; there is {', '.join(there)}")
        if limit.min is not None and limit.max is not None and limit.min > limit.max:
            raise ValueError(f"{key}.{name}: nothing lies between min {limit.min} and max {limit.max}")


def check_encode(encode: EncodeConfig, crop: CropConfig, down: int) -> None:
    """Passes of the VAE can be full, crops of an image can differ, tiles fit the VAE's reduction `down`, and there is a
    number of actors.
    """
    check_tile("encode.tile", encode.tile, down)
    if encode.rows_per_file > encode.batch and encode.rows_per_file % encode.batch:
        raise ValueError(
            f"encode.rows_per_file: {encode.rows_per_file} is not a multiple of encode.batch, {encode.batch}: passes "
            "of the VAE would not be full"
        )
    if encode.crops > 1 and crop.placement == "center" and not 0 < crop.flip_chance < 1:
        raise ValueError(
            f"encode.crops: {encode.crops} crops of an image are all alike where crop.placement is center and "
            f"crop.flip_chance {crop.flip_chance:g}"
        )
    fewest, most = encode.resources.workers
    if fewest > most:
        raise ValueError(f"encode.resources.workers: at least {fewest} and at most {most}")


def check_tile(key: str, tile: int | None, down: int) -> None:
    """What tiles share is a multiple of the VAE's reduction `down`."""
    if tile is not None and tile % (OVERLAPS_PER_TILE * down):
        raise ValueError(
            f"{key}: {tile} is not a multiple of {OVERLAPS_PER_TILE * down}, so that a quarter of it is one of the "
            "VAE's reduction"
        )


def check_scoring(key: str, scoring: ScoringConfig | None) -> None:
    """Weights are named by a path, and none is a pickle that nobody asked for."""
    if scoring is None:
        return
    in_folder = scoring.model.startswith(LOCAL_MODEL)
    if in_folder == (scoring.weights is not None):
        raise ValueError(
            f"{key}.weights: name the file of the weights, or {LOCAL_MODEL}FOLDER as {key}.model, and not both"
        )
    if scoring.weights is not None and not scoring.weights.endswith(SAFETENSORS) and not scoring.allow_pickle:
        raise ValueError(
            f"{key}.weights: {scoring.weights!r} is no {SAFETENSORS} file; set {key}.allow_pickle to take a pickle's "
            "tensors"
        )
    if scoring.aesthetic_head is not None and not scoring.aesthetic_head.endswith(SAFETENSORS):
        raise ValueError(f"{key}.aesthetic_head: {scoring.aesthetic_head!r} is no {SAFETENSORS} file; convert it first")
    fewest, most = scoring.resources.workers
    if fewest > most:
        raise ValueError(f"{key}.resources.workers: at least {fewest} and at most {most}")


def check_text(key: str, text: TextWeightsConfig) -> None:
    """Both text encoders are named, or a seed in their place."""
    check_preset(f"{key}.preset", text.preset, TEXT_PRESETS)
    named = [text.clip_l is not None, text.bigg is not None]
    if (text.seed is None and not all(named)) or (text.seed is not None and any(named)):
        raise ValueError(f"{key}: name both clip_l and bigg, or give a seed for random weights")


def check_sampling(key: str, sampling: SamplingConfig, diffusion: DiffusionConfig) -> None:
    """Steps, hand-over and strength lie inside the schedule."""
    if sampling.steps > diffusion.num_timesteps:
        raise ValueError(f"{key}.steps: {sampling.steps} of {diffusion.num_timesteps} timesteps")
    if sampling.handover > diffusion.num_timesteps:
        raise ValueError(f"{key}.handover: {sampling.handover} of {diffusion.num_timesteps} timesteps")
    if sampling.refiner == "sdedit" and int(sampling.steps * sampling.strength) < 1:
        raise ValueError(f"{key}.strength: {sampling.strength} of {sampling.steps} steps leaves none")


def check_timesteps(key: str, timesteps: tuple[int, int], diffusion: DiffusionConfig) -> None:
    """The range of timesteps lies inside the schedule."""
    first, end = timesteps
    if not 0 <= first < end <= diffusion.num_timesteps:
        raise ValueError(f"{key}: [{first}, {end}] does not lie inside the schedule's {diffusion.num_timesteps}")


def check_denoiser_loss(key: str, loss: DenoiserLossConfig) -> None:
    """Chances, weights and the bias of the loss are in range."""
    infinite, bias = float("inf"), loss.timestep_bias
    for name in ("caption_dropout", "text_dropout", "size_dropout"):
        if not 0 <= getattr(loss, name) <= 1:
            raise ValueError(f"{key}.{name}: {getattr(loss, name)} is no chance between 0 and 1")
    if not 0 <= loss.offset_noise < infinite:
        raise ValueError(f"{key}.offset_noise: {loss.offset_noise} is negative or not finite")
    if loss.min_snr_gamma is not None and not 0 < loss.min_snr_gamma < infinite:
        raise ValueError(f"{key}.min_snr_gamma: {loss.min_snr_gamma} is not positive and finite")
    if not 0 < bias.multiplier < infinite:
        raise ValueError(f"{key}.timestep_bias.multiplier: {bias.multiplier} is not positive and finite")
    if not 0 < bias.portion <= 1:
        raise ValueError(f"{key}.timestep_bias.portion: {bias.portion} is no share above 0 and up to 1")
    if loss.biased_timesteps is not None:
        (first, end), (lowest, highest) = loss.biased_timesteps, loss.timesteps
        if not lowest <= first < end <= highest:
            raise ValueError(
                f"{key}.timestep_bias: biases the timesteps [{first}, {end}], which are none or not all among those "
                f"that are drawn, [{lowest}, {highest}]"
            )


def check_fits_text(key: str, unet: UNetConfig, text: TextWeightsConfig) -> None:
    """The U-Net reads what the text encoders give."""
    config = TEXT_PRESETS[text.preset]
    if unet.context_offset + unet.context_dim > config.context_dim or unet.pooled_dim != config.pooled_dim:
        raise ValueError(
            f"{key}: reads text of {unet.context_offset} + {unet.context_dim} channels, pooled {unet.pooled_dim}, "
            f"and the text encoders {text.preset!r} give {config.context_dim}, pooled {config.pooled_dim}"
        )


def check_lpips(key: str, lpips: LPIPSWeightsConfig) -> None:
    """The preset exists, and pickles are asked for where they are named."""
    check_preset(f"{key}.preset", lpips.preset, LPIPS_PRESETS)
    for name in ("trunk", "heads"):
        path = getattr(lpips, name)
        if not path.endswith(".safetensors") and not lpips.allow_pickle:
            raise ValueError(
                f"{key}.{name}: {path!r} is no .safetensors file; set {key}.allow_pickle to take a pickle's tensors"
            )


def check_generate(key: str, config: GenerateConfig) -> None:
    """The networks fit each other and the prompts' size, and their weights are named."""
    check_preset(f"{key}.vae.preset", config.vae.preset, VAE_PRESETS)
    check_text(f"{key}.text", config.text)
    down = VAE_PRESETS[config.vae.preset].downsample
    for name, weights in (("base", config.base), ("refiner", config.refiner)):
        if weights is None:
            continue
        check_preset(f"{key}.{name}.preset", weights.preset, UNET_PRESETS)
        unet = UNET_PRESETS[weights.preset]
        check_fits_text(f"{key}.{name}.preset", unet, config.text)
        condition = Conditioning.TARGET_SIZE if name == "base" else Conditioning.AESTHETIC_SCORE
        if condition not in unet.conditioning:
            raise ValueError(
                f"{key}.{name}.preset: {weights.preset!r} is not conditioned on {condition}, as the {name} is"
            )
        for side in config.prompts.size:
            if side % (down * unet.downsample) and config.prompts.index is None:
                raise ValueError(
                    f"{key}.prompts.size: {side} is not a multiple of {down * unet.downsample}, "
                    f"the reduction of VAE and {name}"
                )
    check_tile(f"{key}.decode_tile", config.decode_tile, down)
    prompts = config.prompts
    named = [bool(prompts.texts), *(p is not None for p in (prompts.file, prompts.parquet, prompts.index))]
    if sum(named) != 1:
        raise ValueError(f"{key}.prompts: give exactly one of texts, file, parquet and index")
    diffusion = config.diffusion or DiffusionConfig()
    check_sampling(f"{key}.sampling", config.sampling, diffusion)
    if config.sampling.refiner == "ensemble" and config.sampling.handover == diffusion.num_timesteps:
        raise ValueError(f"{key}.sampling.handover: {config.sampling.handover} leaves no timestep to the base")
    for name, weights in (("base", config.base), ("refiner", config.refiner), ("vae", config.vae)):
        if weights is not None and weights.path is None:
            raise ValueError(f"{key}.{name}.path: is missing; pictures need trained weights")
