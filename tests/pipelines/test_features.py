"""What measures pictures, on tiny networks of random weights."""

from __future__ import annotations

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines.evaluate.config import CLIPConfig, InceptionConfig
from pipelines.evaluate.features import CLIPScore, Inception
from pipelines.storage import StorageOptions

CPU, OPTIONS = torch.device("cpu"), StorageOptions()
CLIP_SHAPE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


class Pooled(nn.Module):
    """Stands for the FID's network: colours and corners of images in [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1:] == (3, 299, 299)
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


class Bytes(nn.Module):
    """Stands for NVIDIA's file."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8
        assert return_features
        return torch.nn.functional.adaptive_avg_pool2d(img.float() / 127.5 - 1, 2).flatten(1)


def pictures() -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [draws.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((40, 64), (64, 40), (299, 299))]


def test_inception_sees_each_picture_whole_as_pillow_resizes_it(tmp_path):
    for name, network in (("plain", Pooled()), ("nvidia", Bytes())):
        torch.jit.script(network).save(tmp_path / f"{name}.pt")
    plain, nvidia = (
        Inception(InceptionConfig(path=f"{tmp_path}/{name}.pt"), OPTIONS, CPU)(pictures())
        for name in ("plain", "nvidia")
    )
    expected = []
    for picture in pictures():
        resized = np.asarray(Image.fromarray(picture).resize((299, 299), Image.Resampling.BICUBIC))
        expected.append(Pooled()(torch.from_numpy(resized.copy()).permute(2, 0, 1)[None] / 127.5 - 1)[0])
    torch.testing.assert_close(plain, torch.stack(expected), atol=0.01, rtol=0)
    torch.testing.assert_close(nvidia, plain, atol=0.01, rtol=0)


def test_a_file_that_is_no_torchscript_is_named(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"no program")
    with pytest.raises(ValueError, match=r"weights\.pt cannot be read as TorchScript"):
        Inception(InceptionConfig(path=f"{tmp_path}/weights.pt"), OPTIONS, CPU)


def test_the_clip_score_is_the_cosine_of_picture_and_caption(tmp_path):
    torch.manual_seed(2)
    model = open_clip.CLIP(**CLIP_SHAPE)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP_SHAPE}))
    config = CLIPConfig(model=f"local-dir:{tmp_path}")
    with pytest.raises(RuntimeError):
        CLIPScore(config, OPTIONS, CPU)  # no weights: random ones would give a score as well
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    measure = CLIPScore(config, OPTIONS, CPU)
    captions = ["a red fox", "two boats", "a red fox"]
    scores = measure([*pictures()[:2], pictures()[0]], captions)
    assert scores.shape == (3,)
    assert scores[0] == scores[2]
    assert scores.max() > 1
    with torch.no_grad():
        image = model.encode_image(measure._prepare(Image.fromarray(pictures()[1]))[None])
        text = model.encode_text(open_clip.get_tokenizer("")(["two boats"]))
    cosine = torch.nn.functional.cosine_similarity(image, text)
    torch.testing.assert_close(scores[1:2], 100 * cosine.clamp(min=0))
