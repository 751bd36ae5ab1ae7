"""The networks that measure pictures, from weights that a person names: Inception for the FID, CLIP for its score."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.evaluate.config import CLIPConfig, InceptionConfig
from pipelines.sources import local_copy
from pipelines.storage import StorageOptions

INCEPTION_SIDE = 299  # pixels
NVIDIA = "return_features"  # the argument by which NVIDIA's file is known: it takes bytes, and normalises them itself


class Inception:
    """Features of pictures for the FID, [N,2048] with the published weights."""

    def __init__(self, config: InceptionConfig, options: StorageOptions, device: torch.device) -> None:
        """Raises FileNotFoundError where there is no file, ValueError where it is not TorchScript."""
        self._device = device
        with local_copy(config.path, options) as path:
            try:
                self._network = torch.jit.load(path, map_location=device).eval()
            except RuntimeError as error:
                raise ValueError(f"{config.path} cannot be read as TorchScript: {error}") from error
        arguments = self._network.forward.schema.arguments
        self._takes_bytes = NVIDIA in {argument.name for argument in arguments}

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """Features [N,D] in fp32, on the CPU, of pictures uint8 [H,W,3] of any sizes.

        Each is brought to 299 x 299, whatever its aspect, by an antialiased bicubic filter (arXiv 2104.11222).
        """
        batch = torch.cat([self._resized(picture) for picture in pictures])  # [N,3,299,299] in [0, 255]
        if self._takes_bytes:
            features = self._network(batch.round().byte(), return_features=True)
        else:
            features = self._network(batch / 127.5 - 1)
        return features.float().flatten(1).cpu()

    def _resized(self, picture: np.ndarray) -> Tensor:
        image = torch.from_numpy(np.ascontiguousarray(picture)).to(self._device).permute(2, 0, 1)[None].float()
        size = (INCEPTION_SIDE, INCEPTION_SIDE)
        return F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 255)


class CLIPScore:
    """How well pictures fit their captions."""

    def __init__(self, config: CLIPConfig, options: StorageOptions, device: torch.device) -> None:
        """Raises RuntimeError or ValueError, naming the model, where open_clip finds no such model or no weights."""
        import open_clip

        self._device = device
        is_file = config.weights is not None and ("/" in config.weights or os.path.exists(config.weights))
        with local_copy(config.weights or "", options) if is_file else nullcontext(config.weights) as weights:
            self._model, self._prepare = open_clip.create_model_from_pretrained(
                config.model, pretrained=weights, device=device
            )
        self._model.eval()
        self._tokenize = open_clip.get_tokenizer(config.model)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Tensor:
        """100 x the cosine [N] of the features of pictures uint8 [H,W,3] and captions, 0 where it is negative.

        Hessel et al. (arXiv 2104.08718) write 2.5 for 100. Pictures are resized and cropped as the model's own
        settings say.
        """
        images = torch.stack([self._prepare(Image.fromarray(picture)) for picture in pictures]).to(self._device)
        image = F.normalize(self._model.encode_image(images).float(), dim=-1)  # [N,D]
        text = F.normalize(self._model.encode_text(self._tokenize(list(captions)).to(self._device)).float(), dim=-1)
        return 100 * (image * text).sum(-1).clamp(min=0).cpu()
