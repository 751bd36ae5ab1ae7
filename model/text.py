"""The two frozen text encoders of SDXL (SDXL 2.1): captions to tokens, tokens to context and pooled text.

The context is the output of each tower's last but one layer, without the final norm, side by side: [CLIP-L | bigG].
The pooled text is bigG's last layer, normalised, at the first end of text, projected. No mask hides the padding, and
the towers pad differently, so the pad token is a part of the model.

B batch, T tokens (77), D width of both towers together, P width of the pooled text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from model.config import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, VOCABULARY, TextConfig, TextTowerConfig
from model.tensors import State, Stored, check_keys, fill, shapes, stored
from model.text_weights import LOGIT_SCALE, TEXT_MODEL, read_bigg, read_clip_l

# open_clip and transformers take seconds to import, so the functions that need them import them.


@dataclass(frozen=True)
class Tokens:
    """Token ids of each tower, int64 [B,T]; they differ in their padding alone."""

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
        self.clip_l: Any = _build_clip_l(config.clip_l)
        self.bigg: Any = _build_bigg(config.bigg)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, tokens: Tokens) -> TextFeatures:
        """Context [B,T,D] and pooled text [B,P], in the weights' dtype, of tokens on the weights' device."""
        clip_l = self.clip_l(tokens.clip_l, output_hidden_states=True).hidden_states[-2]  # [B,T,Dl]
        bigg = self.bigg.forward_intermediates(tokens.bigg, indices=2, output_fmt="NLC")
        penultimate = bigg["text_intermediates"][0]  # [B,T,Dg]
        return TextFeatures(context=torch.cat([clip_l, penultimate], dim=-1), pooled=bigg["text_features"])


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
    fill(encoders.clip_l, _named_as(encoders.clip_l, states["clip_l"]), f"CLIP-L of {clip_l!r}", dtype, device)
    fill(encoders.bigg, states["bigg"], f"bigG of {bigg!r}", dtype, device)
    # Buffers that no file holds, so they are still on the meta device.
    encoders.bigg.attn_mask = encoders.bigg.build_causal_mask().to(device, dtype)
    for module in encoders.clip_l.modules():
        if "position_ids" in module._buffers:
            module.position_ids = torch.arange(CONTEXT_LENGTH, device=device)[None]
    assert not any(buffer.is_meta for buffer in encoders.buffers())
    return encoders.eval().requires_grad_(False)


def read_text(
    config: TextConfig, clip_l: str | None, bigg: str, allow_pickle: bool = False
) -> dict[str, dict[str, Stored]]:
    """Weights of clip_l, where it is named, and of bigg, which may hold a logit_scale; they are not read yet.

    Sources and errors are those of `load_text_encoders`.
    """
    expected = text_states(_on_meta(config))
    states = {"bigg": read_bigg(config.bigg, bigg, allow_pickle)}
    check_keys(
        f"bigG of {bigg!r}", shapes(states["bigg"]) | {LOGIT_SCALE: ()}, shapes(expected["bigg"]) | {LOGIT_SCALE: ()}
    )
    if clip_l is not None:
        states["clip_l"] = read_clip_l(config.clip_l, clip_l, allow_pickle)
        check_keys(f"CLIP-L of {clip_l!r}", shapes(states["clip_l"]), shapes(expected["clip_l"]))
    return states


def text_states(encoders: TextEncoders) -> dict[str, dict[str, Stored]]:
    """Weights of encoders that are there, as `read_text` gives them."""
    clip_l = {key.removeprefix(TEXT_MODEL): value for key, value in encoders.clip_l.state_dict().items()}
    return {"clip_l": stored(clip_l), "bigg": stored(encoders.bigg.state_dict())}


def _on_meta(config: TextConfig) -> TextEncoders:
    with torch.device("meta"):
        return TextEncoders(config)


def _named_as(module: nn.Module, state: State) -> dict[str, Stored]:
    """CLIP-L's weights by the names of transformers' class: some versions have "text_model." before them."""
    prefix = TEXT_MODEL if any(name.startswith(TEXT_MODEL) for name, _ in module.named_parameters()) else ""
    return {prefix + key: value for key, value in state.items()}


@lru_cache(maxsize=1)
def open_clip_tokenizer() -> Any:
    """CLIP's byte pairs."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer(context_length=CONTEXT_LENGTH)
    found = (tokenizer.vocab_size, tokenizer.sot_token_id, tokenizer.eot_token_id)
    expected = (VOCABULARY, START_OF_TEXT, END_OF_TEXT)
    if found != expected:
        raise ValueError(f"open_clip's tokenizer has (entries, start, end) {found}; CLIP's has {expected}")
    return tokenizer


def _build_clip_l(tower: TextTowerConfig) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=tower.width,
            intermediate_size=4 * tower.width,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            hidden_act=tower.activation,
            max_position_embeddings=CONTEXT_LENGTH,
            bos_token_id=START_OF_TEXT,
            eos_token_id=END_OF_TEXT,
            pad_token_id=tower.pad_token,
        )
    )


def _build_bigg(tower: TextTowerConfig) -> nn.Module:
    """open_clip's text transformer alone, so that the image tower of 1.8 billion parameters is never built."""
    from open_clip.transformer import QuickGELU, TextTransformer

    return TextTransformer(
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCABULARY,
        width=tower.width,
        heads=tower.heads,
        layers=tower.layers,
        output_dim=tower.projection_dim,
        act_layer={"gelu": nn.GELU, "quick_gelu": QuickGELU}[tower.activation],
        pool_type="argmax",  # the end of text is the largest id, so this finds the first one
    )
