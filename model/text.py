"""The two frozen text encoders of SDXL (SDXL 2.1): captions to tokens, tokens to context and pooled text.

The context is the output of each tower's penultimate layer, without the final norm, side by side: [CLIP-L | bigG].
The pooled text is bigG's last layer, normalised, at the first end of text, projected. No mask hides the padding, and
the towers pad differently, so the pad token is a part of the model.

B batch, T tokens (77), D width of a tower or of both together, K heads, P width of the pooled text
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, VOCABULARY, TextConfig, TextTowerConfig
from model.tensors import Stored, check_keys, fill, shapes, stored
from model.text_weights import LOGIT_SCALE, read_bigg, read_clip_l


@dataclass(frozen=True)
class Tokens:
    """Token ids of each tower, int64 [B,T]; ours differ in their padding alone."""

    clip_l: Tensor
    bigg: Tensor

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on another device."""
        return Tokens(clip_l=self.clip_l.to(device), bigg=self.bigg.to(device))


@dataclass(frozen=True)
class TextFeatures:
    """What the U-Net reads of a caption."""

    context: Tensor  # [B,T,D]
    pooled: Tensor  # [B,P]


def tokenize(captions: Sequence[str], config: TextConfig) -> Tokens:
    """Tokens of captions: start, byte pairs, end, then the tower's pad token up to 77.

    A longer caption is cut, and its last token is the end of text.

    The text is cleaned as for CLIP's training (ftfy, HTML entities, white space), as open_clip does and the published
    SDXL did. transformers' CLIPTokenizer, in a diffusers pipeline, does not clean it, and takes bigG's pad token "!"
    for one wherever it stands: a curly apostrophe, "&amp;" or "!" gives other tokens there, and another picture.
    """
    if isinstance(captions, str):
        raise TypeError("captions is one string; expected a sequence of them")
    tokenizer = open_clip_tokenizer()
    clip_l = torch.full((len(captions), CONTEXT_LENGTH), config.clip_l.pad_token, dtype=torch.int64)
    bigg = torch.full((len(captions), CONTEXT_LENGTH), config.bigg.pad_token, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids = [START_OF_TEXT, *tokenizer.encode(caption)[: CONTEXT_LENGTH - 2], END_OF_TEXT]
        clip_l[row, : len(ids)] = bigg[row, : len(ids)] = torch.tensor(ids)
    return Tokens(clip_l=clip_l, bigg=bigg)


class TextEncoders(nn.Module):
    """Both towers, frozen: no parameter asks for a gradient, and the forward pass records none."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.clip_l = TextTower(config.clip_l)
        self.bigg = TextTower(config.bigg)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> TextFeatures:
        """Context [B,T,D] and pooled text [B,P], in the weights' dtype, of tokens on the weights' device."""
        clip_l, _ = self.clip_l(tokens.clip_l)  # [B,T,Dl]
        bigg, pooled = self.bigg(tokens.bigg)  # [B,T,Dg], [B,P]
        return TextFeatures(context=torch.cat([clip_l, bigg], dim=-1), pooled=pooled)


class TextTower(nn.Module):
    """A causal text transformer of CLIP (arXiv 2103.00020, 2.4). Its keys are those of open_clip, for both towers.

    Fill it before use: embeddings are zeros, since a normal draw on the meta device imports a compiler.
    """

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        width, projected = config.width, config.projection_dim
        self.token_embedding = nn.Embedding(VOCABULARY, width, _weight=torch.zeros(VOCABULARY, width))
        self.positional_embedding = nn.Parameter(torch.zeros(CONTEXT_LENGTH, width))
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList(TextBlock(config) for _ in range(config.layers))})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.zeros(width, projected)) if projected else None

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B,T] to the penultimate layer's output [B,T,D], and the pooled text [B,P] of a tower that projects.

        Without a projection the last layer is not run.
        """
        *blocks, last = cast(nn.ModuleList, self.transformer["resblocks"])
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # [B,T,D]
        for block in blocks:
            x = block(x)  # [B,T,D]
        if self.text_projection is None:
            return x, None
        ends = (tokens == END_OF_TEXT).int().argmax(dim=1)  # [B], the first of each
        end = last(x)[torch.arange(len(x), device=x.device), ends]  # [B,D]
        return x, self.ln_final(end) @ self.text_projection  # [B,P]


class TextBlock(nn.Module):
    """Attention to the tokens before, then a pointwise network; each normalised before and added to its input."""

    def __init__(self, config: TextTowerConfig) -> None:
        super().__init__()
        width = config.width
        self.activation = ACTIVATIONS[config.activation]
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] to [B,T,D]."""
        x = x + self.attn(self.ln_1(x))  # [B,T,D]
        return x + self.mlp["c_proj"](self.activation(self.mlp["c_fc"](self.ln_2(x))))  # [B,T,D]


class CausalAttention(nn.Module):
    """Softmax attention of each token to itself and those before; one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,D] to [B,T,D]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B,T,3D]
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B,K,T,D/K]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B,K,T,D/K]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B,T,D]


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's approximation of the GELU, which its CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def random_text_encoders(config: TextConfig, seed: int) -> TextEncoders:
    """Encoders with random weights that depend on the seed alone, for models that are trained with no other.

    Frozen random features still tell captions apart if each token keeps its own direction and the end of text gathers
    the others. So token embeddings have unit variance, except those of the end of text and of padding, which are small
    beside what attention adds to them; and attention's output is enlarged, against its averaging over tokens. Context
    and pooled text come out with about unit variance, and words can be read from either by a linear map.
    """
    encoders = TextEncoders(config)
    generator = torch.Generator().manual_seed(seed)
    quiet = {"clip_l": [END_OF_TEXT, config.clip_l.pad_token], "bigg": [END_OF_TEXT, config.bigg.pad_token]}
    with torch.no_grad():
        for name, weight in sorted(encoders.named_parameters()):
            tower, _, kind = name.partition(".")
            if "token_embedding" in kind:
                weight.normal_(generator=generator)
                weight[quiet[tower]] *= 0.1
            elif "position" in kind:
                weight.normal_(std=0.2, generator=generator)
            elif weight.ndim == 1:  # norms and biases
                weight.fill_(1.0 if kind.endswith("weight") else 0.0)
            else:
                fan_in = weight.shape[0] if kind == "text_projection" else weight.shape[1]
                gain = 2.0 if "out_proj" in kind else 0.5 if "mlp" in kind else 1.0
                weight.normal_(std=gain * fan_in**-0.5, generator=generator)
    return encoders


def load_text_encoders(
    config: TextConfig,
    clip_l: str,
    bigg: str,
    *,
    allow_pickle: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TextEncoders:
    """The published encoders, in `dtype`.

    `clip_l`: a published single file of the base, a diffusers pipeline's folder, a transformers folder or hub name of a
    CLIP text model, e.g. "openai/clip-vit-large-patch14".
    `bigg`: any of these, of base or refiner, and of a CLIPTextModelWithProjection; or an open_clip weights file; or
    "model:tag" of open_clip, e.g. "ViT-bigG-14:laion2b_s39b_b160k". Only safetensors are read, unless `allow_pickle`,
    and then without code (weights_only). Raises ValueError where weights and config disagree.
    """
    states = read_text(config, clip_l, bigg, allow_pickle)
    states["bigg"].pop(LOGIT_SCALE, None)
    encoders = _on_meta(config)
    fill(encoders.clip_l, states["clip_l"], f"CLIP-L of {clip_l!r}", dtype, device)
    fill(encoders.bigg, states["bigg"], f"bigG of {bigg!r}", dtype, device)
    return encoders.eval().requires_grad_(False)


def read_text(
    config: TextConfig, clip_l: str | None, bigg: str, allow_pickle: bool = False
) -> dict[str, dict[str, Stored]]:
    """Weights of clip_l, where it is named, and of bigg, which may hold a logit_scale; they are not read yet.

    Sources and errors are those of `load_text_encoders`.
    """
    expected = text_states(_on_meta(config))
    states = {"bigg": read_bigg(config.bigg, bigg, allow_pickle)}
    read = {key: shape for key, shape in shapes(states["bigg"]).items() if key != LOGIT_SCALE}
    check_keys(f"bigG of {bigg!r}", read, shapes(expected["bigg"]))
    if clip_l is not None:
        states["clip_l"] = read_clip_l(config.clip_l, clip_l, allow_pickle)
        check_keys(f"CLIP-L of {clip_l!r}", shapes(states["clip_l"]), shapes(expected["clip_l"]))
    return states


def text_states(encoders: TextEncoders) -> dict[str, dict[str, Stored]]:
    """Weights of encoders that are there, as `read_text` gives them."""
    return {"clip_l": stored(encoders.clip_l.state_dict()), "bigg": stored(encoders.bigg.state_dict())}


def _on_meta(config: TextConfig) -> TextEncoders:
    with torch.device("meta"):
        return TextEncoders(config)


@lru_cache(maxsize=1)
def open_clip_tokenizer() -> Any:
    """CLIP's byte pairs. The module is loaded by its file: its package imports image models, for six seconds more."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("CLIP's vocabulary comes with open_clip: pip install open_clip_torch")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", Path(package.origin).with_name("tokenizer.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = module.SimpleTokenizer(context_length=CONTEXT_LENGTH)
    found = (tokenizer.vocab_size, tokenizer.sot_token_id, tokenizer.eot_token_id)
    expected = (VOCABULARY, START_OF_TEXT, END_OF_TEXT)
    if found != expected:
        raise ValueError(f"open_clip's tokenizer has (entries, start, end) {found}; CLIP's has {expected}")
    return tokenizer
