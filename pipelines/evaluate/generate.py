"""Pictures of many prompts through Ray Data: each a PNG of its own, made once."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model.conditioning import drop
from model.config import UNET_PRESETS, VAE_PRESETS, Conditioning
from model.diffusion import Diffusion, gaussian
from model.sampler import StepNoise, starts_at_sigma, step_noise
from model.text import TextFeatures, tokenize
from model.tiling import decode_tiled
from model.vae import unscale
from pipelines import networks
from pipelines.config import OVERLAPS_PER_TILE
from pipelines.evaluate.config import GenerateConfig
from pipelines.evaluate.prompts import Prompt, batches, read_prompts
from pipelines.lease import Lease
from pipelines.pictures import contact_sheet, to_pixels
from pipelines.progress import progress
from pipelines.sampling import Conditions, Told, base_denoiser, generate, refiner_denoiser
from pipelines.stages import actors, dataset_of
from pipelines.storage import Storage, StorageOptions

MANIFEST = "manifest.json"
SHEET_PICTURES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 128


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a run of the job has done."""

    pictures: list[dict[str, Any]]
    """Every prompt with its file, in the prompts' order."""
    made: int
    """Pictures that were not there before."""
    sheets: list[str]
    """Files of the contact sheets."""


def generate_pictures(
    config: GenerateConfig,
    output: Storage,
    held: Lease,
    begin: Callable[[], object] | None = None,
    pinned: str | None = None,
) -> Made:
    """Make every picture that is not there yet, then write the contact sheets and, last, the manifest.

    `held` is the right to write `output`, or a folder above it. `begin` is called before the first use of Ray, if there
    is work for it. `pinned` is the version of the index whose captions are the prompts; None is the current one.
    """
    output.remove_incomplete()
    config = with_diffusion(config, output.options)
    prompts = checked_prompts(config, output.options, pinned)
    made_by = _fingerprint(config, output.options)
    names = [prompt.picture_name(made_by) for prompt in prompts]
    there = {file.name for file in output.list("pictures")}
    todo = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in there}
    if todo:
        if begin is not None:
            begin()
        blocks = batches(list(todo.values()), list(todo), config.batch)
        pictures = dataset_of(blocks).map_batches(
            Generator, fn_constructor_args=(config, made_by, output), **actors(config.resources)
        )
        with progress("generate", len(todo)) as bar:
            for _ in pictures.iter_rows():
                bar.update(1)
    listed = [{"file": name, **asdict(prompt)} for name, prompt in zip(names, prompts, strict=True)]
    sheets = _write_sheets(listed[: config.sheets * SHEET_PICTURES], output)
    held.check()
    output.write_json(MANIFEST, {"made_by": made_by, "pictures": listed, "contact_sheets": sheets})
    return Made(pictures=listed, made=len(todo), sheets=sheets)


def checked_prompts(config: GenerateConfig, options: StorageOptions, pinned: str | None = None) -> list[Prompt]:
    """The prompts; ValueError where the networks cannot make a picture of a prompt's size."""
    prompts = read_prompts(config.prompts, options, pinned)
    side = VAE_PRESETS[config.vae.preset].downsample * max(
        UNET_PRESETS[weights.preset].downsample for weights in (config.base, config.refiner) if weights is not None
    )
    wrong = Counter(prompt.size for prompt in prompts if any(s <= 0 or s % side for s in prompt.size))
    if wrong:
        sizes = ", ".join(f"{h} x {w} ({count} prompts)" for (h, w), count in sorted(wrong.items()))
        raise ValueError(f"prompts: sides must be multiples of {side}, the networks' reduction: {sizes}")
    return prompts


class Generator:
    """One actor: all networks on one device."""

    def __init__(self, config: GenerateConfig, made_by: dict[str, Any], output: Storage) -> None:
        self.config, self.made_by, self.output = config, made_by, output
        options = output.options
        self.device = torch.device("cuda" if config.resources.gpus else "cpu")
        if not config.resources.gpus:
            torch.set_num_threads(max(1, int(config.resources.cpus)))
        dtype = getattr(torch, config.dtype)
        self.base = networks.unet(config.base, options, dtype, self.device).eval()
        self.refiner = networks.unet(config.refiner, options, dtype, self.device).eval() if config.refiner else None
        self.vae = networks.vae(config.vae, options, device=self.device).eval()
        self.text = networks.text_encoders(config.text, options, device=self.device)
        assert config.diffusion is not None  # resolved by generate_pictures
        self.diffusion = Diffusion(config.diffusion, self.device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Make and store one batch of prompts of one size; gives the names of the pictures."""
        names = rows.column("name").to_pylist()
        prompts = [_prompt(row) for row in rows.drop_columns(["name"]).to_pylist()]
        for name, prompt, image in zip(names, prompts, self.pictures(prompts), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", pnginfo=picture_text(prompt, self.made_by))
            self.output.write(name, buffer.getvalue())
        return rows.select(["name"])

    @torch.no_grad()
    def pictures(self, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """uint8 [H, W, 3] of each prompt; all are of one size."""
        vae, config = self.vae.config, self.config.sampling
        height, width = prompts[0].size
        shape = (vae.latent_channels, height // vae.downsample, width // vae.downsample)
        noise = torch.cat([gaussian(p.seed, p.noise_index, 1, shape, self.device) for p in prompts])
        text = self._encode([prompt.text for prompt in prompts])
        conditions = {
            Conditioning.ORIGINAL_SIZE: self._column([prompt.original_size for prompt in prompts]),
            Conditioning.CROP_TOP_LEFT: self._column([prompt.crop_top_left for prompt in prompts]),
            Conditioning.TARGET_SIZE: self._column([(height, width)] * len(prompts)),
        }
        positive, away = Told(text, conditions), self._away_from(prompts, conditions)
        no_text = torch.tensor([prompt.negative is None for prompt in prompts], device=self.device)
        zeroed = TextFeatures(drop(away.text.context, ~no_text), drop(away.text.pooled, ~no_text))
        base = base_denoiser(self.base, self.diffusion, positive, Told(zeroed, away.conditions), config)
        refiner = None
        if self.refiner is not None:
            refiner = refiner_denoiser(self.refiner, self.diffusion, positive, away, config)
        latents = generate(base, refiner, noise, self.diffusion, config, self._step_noise(prompts, shape))
        # One picture at a time: decoding takes the most memory, and all of a batch at once is no faster.
        return [to_pixels(self._decode(unscale(latent, vae.scaling_factor)))[0] for latent in latents.float().split(1)]

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        tile = self.config.decode_tile
        return decode_tiled(self.vae, latents, tile, tile // OVERLAPS_PER_TILE) if tile else self.vae.decode(latents)

    def _away_from(self, prompts: Sequence[Prompt], conditions: Conditions) -> Told:
        """The negative prompts, or the empty one; the base takes zeros in place of the empty one, as in training."""
        size = self.config.prompts.negative_original_size
        if size is not None:
            conditions = {**conditions, Conditioning.ORIGINAL_SIZE: self._column([size] * len(prompts))}
        return Told(self._encode([prompt.negative or "" for prompt in prompts]), conditions)

    def _step_noise(self, prompts: Sequence[Prompt], shape: tuple[int, ...]) -> StepNoise:
        return step_noise([(prompt.seed, prompt.noise_index) for prompt in prompts], shape, self.device)

    def _encode(self, captions: list[str]) -> TextFeatures:
        return self.text(tokenize(captions, self.text.config).to(self.device))

    def _column(self, pairs: list[tuple[int, int]]) -> torch.Tensor:
        return torch.tensor(pairs, dtype=torch.float32, device=self.device)


def picture_text(prompt: Prompt, made_by: dict[str, Any]) -> PngInfo:
    """What a picture's file says of it: prompt and seed by themselves, and everything that it depends on as JSON."""
    text = PngInfo()
    text.add_itxt("prompt", prompt.text)
    if prompt.negative is not None:
        text.add_itxt("negative_prompt", prompt.negative)
    text.add_text("seed", str(prompt.seed))
    text.add_itxt("settings", json.dumps(asdict(prompt) | made_by, ensure_ascii=False, sort_keys=True))
    return text


def with_diffusion(config: GenerateConfig, options: StorageOptions) -> GenerateConfig:
    """The config with the noise schedule that the networks were trained with. ValueError where they differ in it."""
    if config.diffusion is not None:
        return config
    base = networks.trained_diffusion(config.base, options)
    if config.refiner is not None and (refiner := networks.trained_diffusion(config.refiner, options)) != base:
        raise ValueError(f"the base was trained with {base}, and the refiner with {refiner}; set diffusion to choose")
    return replace(config, diffusion=base)


def _fingerprint(config: GenerateConfig, options: StorageOptions) -> dict[str, Any]:
    """All that a picture depends on besides its prompt."""
    weights = networks.fingerprint(config.vae, config.text, options)
    weights["base"] = networks.unet_fingerprint(config.base, options)
    if config.refiner:
        weights["refiner"] = networks.unet_fingerprint(config.refiner, options)
    assert config.diffusion is not None
    at_sigma = starts_at_sigma(config.sampling.sampler, config.sampling.spacing)
    return {
        "weights": weights,
        "diffusion": asdict(config.diffusion),
        "sampling": asdict(config.sampling),
        "dtype": config.dtype,
        "negative_original_size": config.prompts.negative_original_size,
        # Only where it is set: so pictures that were decoded whole keep their names.
        **({"decode_tile": config.decode_tile} if config.decode_tile else {}),
        # An earlier version started elsewhere there: its pictures are others.
        **({"start": "sigma"} if at_sigma else {}),
    }


def _prompt(row: dict[str, Any]) -> Prompt:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return Prompt(**values)


def _write_sheets(pictures: Sequence[dict[str, Any]], output: Storage) -> list[str]:
    """Contact sheets of the pictures, in order; gives their names."""
    names = []
    for start in range(0, len(pictures), SHEET_PICTURES):
        cells = [
            (row["text"], [Image.open(io.BytesIO(output.read(row["file"])))])
            for row in pictures[start : start + SHEET_PICTURES]
        ]
        buffer = io.BytesIO()
        contact_sheet(cells, SHEET_COLUMNS, SHEET_SIDE).save(buffer, "PNG")
        names.append(f"contact_sheets/{start // SHEET_PICTURES:04}.png")
        output.write(names[-1], buffer.getvalue())
    return names
