"""Pictures of many prompts through Ray Data: each a PNG of its own, made once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from model.config import Conditioning
from model.diffusion import Diffusion, gaussian
from model.text import TextFeatures, tokenize
from model.vae import unscale
from pipelines import networks
from pipelines.config import GenerateConfig, PromptsConfig, Size
from pipelines.pictures import contact_sheet, to_pixels
from pipelines.progress import progress
from pipelines.sampling import base_denoiser, generate, refiner_denoiser
from pipelines.schema import Column, digest, kept_rows, require_manifest
from pipelines.stages import actors, dataset_of
from pipelines.storage import Storage, StorageOptions

MANIFEST, SHEET = "manifest.json", "contact_sheet.png"
SHEET_PICTURES, SHEET_COLUMNS, SHEET_SIDE = 64, 8, 128


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One picture to make."""

    number: int
    """Its place among the prompts; picks its noise."""
    text: str
    """The prompt."""
    size: Size
    """(height, width) of the picture in pixels."""
    original_size: Size
    """(height, width) that the base is told as the original's, pixels."""
    path: str | None = None
    """The image whose caption it is, below the source, where it comes from an index."""


def read_prompts(config: PromptsConfig, options: StorageOptions) -> list[Prompt]:
    """The prompts of a config. Raises ValueError where there is none."""
    if config.index is not None:
        index = Storage(config.index, options)
        rows = kept_rows(index, require_manifest(index, "index")).sort_by(Column.PATH).to_pylist()[: config.count]
        found = [
            Prompt(
                number=number,
                text=row[Column.CAPTION],
                size=tuple(row[Column.BUCKET]),
                original_size=tuple(row[Column.ORIGINAL_SIZE]),
                path=row[Column.PATH],
            )
            for number, row in enumerate(rows)
        ]
    else:
        texts: Sequence[str] = config.texts
        if config.file is not None:
            folder, _, name = config.file.rpartition("/")
            lines = Storage(folder or ".", options).read(name).decode("utf-8").splitlines()
            texts = [line.strip() for line in lines if line.strip()]
        found = [
            Prompt(number=number, text=text, size=config.size, original_size=config.size)
            for number, text in enumerate(texts[: config.count])
        ]
    if not found:
        raise ValueError("prompts: there is none")
    return found


def generate_pictures(config: GenerateConfig, output: Storage) -> dict[str, Any]:
    """Make every picture that is not there yet; gives the manifest, which is also written, with a contact sheet."""
    output.remove_incomplete()
    config = _with_diffusion(config, output.options)
    prompts = read_prompts(config.prompts, output.options)
    made_by = _fingerprint(config, output.options)
    there = {file.name for file in output.list("pictures")}
    names = {prompt.number: picture_name(prompt, config, made_by) for prompt in prompts}
    todo = [prompt for prompt in prompts if names[prompt.number] not in there]
    if todo:
        pictures = dataset_of(_batches(todo, names, config.batch)).map_batches(
            Generator, fn_constructor_args=(config, output), **actors(config.resources)
        )
        with progress("generate", len(todo)) as bar:
            for _ in pictures.iter_rows():
                bar.update(1)
    manifest = {
        "made_by": made_by,
        "pictures": [{"file": names[prompt.number], **asdict(prompt)} for prompt in prompts],
        "made": len(todo),
    }
    output.write(SHEET, _sheet(prompts[:SHEET_PICTURES], names, output))
    output.write_json(MANIFEST, manifest)
    return manifest


def picture_name(prompt: Prompt, config: GenerateConfig, made_by: dict[str, Any]) -> str:
    """The file of a picture: another name for anything that would make another picture."""
    return f"pictures/{prompt.number:06}-{digest([asdict(prompt), config.prompts.seed, made_by])[:12]}.png"


class Generator:
    """One actor: all networks on one device."""

    def __init__(self, config: GenerateConfig, output: Storage) -> None:
        self.config, self.output = config, output
        options = output.options
        self.device = torch.device("cuda" if config.resources.gpus else "cpu")
        if not config.resources.gpus:
            torch.set_num_threads(max(1, int(config.resources.cpus)))
        dtype = getattr(torch, config.dtype)
        self.base = networks.unet(config.base, options).to(self.device, dtype).eval()
        self.refiner = networks.unet(config.refiner, options).to(self.device, dtype).eval() if config.refiner else None
        self.vae = networks.vae(config.vae, options).to(self.device).eval()
        self.text = networks.text_encoders(config.text).to(self.device)
        assert config.diffusion is not None  # resolved by generate_pictures
        self.diffusion = Diffusion(config.diffusion, self.device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Make and store one batch of prompts of one size; gives the names of the pictures."""
        prompts = rows.to_pylist()
        images = self.pictures(prompts)
        for prompt, image in zip(prompts, images, strict=True):
            text = PngInfo()
            text.add_itxt("prompt", prompt["text"])
            text.add_text("number", str(prompt["number"]))
            text.add_text("seed", str(self.config.prompts.seed))
            text.add_text("guidance", repr(self.config.guidance))
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
            self.output.write(prompt["name"], buffer.getvalue())
        return rows.select(["name"])

    @torch.no_grad()
    def pictures(self, prompts: list[dict[str, Any]]) -> Any:
        """uint8 [B, H, W, 3] of prompts of one size."""
        config, vae = self.config, self.vae.config
        height, width = prompts[0]["size"]
        shape = (vae.latent_channels, height // vae.downsample, width // vae.downsample)
        noise = torch.cat([gaussian(config.prompts.seed, p["number"], 1, shape, self.device) for p in prompts])
        text = self._encode([prompt["text"] for prompt in prompts])
        conditions = {
            Conditioning.ORIGINAL_SIZE: self._column([prompt["original_size"] for prompt in prompts]),
            Conditioning.CROP_TOP_LEFT: self._column([(0, 0)] * len(prompts)),
            Conditioning.TARGET_SIZE: self._column([(height, width)] * len(prompts)),
        }
        base = base_denoiser(self.base, self.diffusion, text, conditions, config.guidance)
        refiner = None
        if self.refiner is not None:
            empty = self._encode([""] * len(prompts))
            refiner = refiner_denoiser(
                self.refiner, self.diffusion, text=text, empty=empty, conditions=conditions, config=config.guidance
            )
        latents = generate(base, refiner, noise, self.diffusion, config.guidance)
        return to_pixels(self.vae.decode(unscale(latents, vae.scaling_factor)))

    def _encode(self, captions: list[str]) -> TextFeatures:
        return self.text(tokenize(captions, self.text.config).to(self.device))

    def _column(self, pairs: list[Size]) -> torch.Tensor:
        return torch.tensor(pairs, dtype=torch.float32, device=self.device)


def _batches(prompts: Sequence[Prompt], names: dict[int, str], size: int) -> list[pa.Table]:
    """Tables of at most `size` prompts, all of one picture size."""
    groups: dict[Size, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.size, []).append(prompt)
    return [
        pa.Table.from_pylist(
            [asdict(prompt) | {"name": names[prompt.number]} for prompt in group[start : start + size]]
        )
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def _with_diffusion(config: GenerateConfig, options: StorageOptions) -> GenerateConfig:
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
    settings = {"diffusion": asdict(config.diffusion), "guidance": asdict(config.guidance), "dtype": config.dtype}
    return weights | settings


def _sheet(prompts: Sequence[Prompt], names: dict[int, str], output: Storage) -> bytes:
    cells = [(prompt.text, [Image.open(io.BytesIO(output.read(names[prompt.number])))]) for prompt in prompts]
    buffer = io.BytesIO()
    contact_sheet(cells, SHEET_COLUMNS, SHEET_SIDE).save(buffer, "PNG")
    return buffer.getvalue()
