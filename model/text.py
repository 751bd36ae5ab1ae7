"""The two frozen text encoders of SDXL (SDXL 2.1): captions to tokens, tokens to context and pooled text.

The context is the output of each tower's last but one layer, without the final norm, side by side: [CLIP-L | bigG].
The pooled text is bigG's last layer, normalised, at the first end of text, projected. No mask hides the padding, and
the towers pad differently, so the pad token is a part of the model.

B batch, T tokens (77), D width of both towers together, P width of the pooled text
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model.config import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, VOCABULARY, TextConfig, TextTowerConfig
from model.weights import check_keys, shapes

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
    tokenizer = _tokenizer()
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
    config: TextConfig, clip_l: str, bigg: str, allow_pickle: bool = False, dtype: torch.dtype = torch.float32
) -> TextEncoders:
    """The published encoders, in `dtype`.

    `clip_l`: a transformers folder or hub name of a CLIP text model, e.g. "openai/clip-vit-large-patch14".
    `bigg`: an open_clip weights file; or "model:tag" of open_clip, e.g. "ViT-bigG-14:laion2b_s39b_b160k"; or a
    transformers folder or hub name of a CLIPTextModelWithProjection. Only safetensors are read, unless `allow_pickle`,
    and then without code (weights_only). Raises ValueError where weights and config disagree.
    """
    with torch.device("meta"):
        encoders = TextEncoders(config)
    encoders.clip_l = _load_clip_l(config.clip_l, clip_l, allow_pickle)
    state = _load_bigg_state(bigg, allow_pickle)
    check_keys(f"bigG weights {bigg!r}", shapes(state), shapes(encoders.bigg.state_dict()))
    encoders.bigg.load_state_dict(state, assign=True)
    encoders.bigg.attn_mask = encoders.bigg.build_causal_mask()  # not in the state dict, so still on the meta device
    return encoders.to(dtype).eval().requires_grad_(False)


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
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


def _load_clip_l(tower: TextTowerConfig, source: str, allow_pickle: bool) -> nn.Module:
    from transformers import CLIPTextModel

    loaded: Any = CLIPTextModel.from_pretrained(
        source, use_safetensors=None if allow_pickle else True, output_loading_info=True
    )
    module, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{source!r} lacks {sorted(report['missing_keys'])}, differs in {report['mismatched_keys']}")
    found = module.config
    given = (found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.hidden_act, found.vocab_size)
    expected = (tower.width, tower.layers, tower.heads, tower.activation, VOCABULARY)
    if given != expected:
        raise ValueError(f"{source!r} has (width, layers, heads, activation, vocabulary) {given}, not {expected}")
    return module


def _load_bigg_state(source: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The text weights in open_clip's names."""
    if Path(source).is_file():
        return _open_clip_text(source, allow_pickle)
    if not os.path.isdir(source) and ":" in source:
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg

        model, tag = source.split(":", 1)
        published = get_pretrained_cfg(model, tag)
        if not published:
            raise ValueError(f"open_clip knows no weights {tag!r} of {model!r}")
        return _open_clip_text(download_pretrained(published), allow_pickle)

    from transformers import CLIPTextModelWithProjection

    module = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=None if allow_pickle else True)
    return bigg_from_transformers(module.state_dict())


def _open_clip_text(file: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The text transformer's entries of an open_clip file, which holds an image tower as well."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            keys = [key for key in list(tensors.keys()) if _is_text(key)]
            return {_text_key(key): tensors.get_tensor(key) for key in keys}
    if not allow_pickle:
        raise ValueError(f"{file} is not a safetensors file; pass allow_pickle=True to read it without running code")
    state = torch.load(file, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {_text_key(key): value for key, value in state.items() if _is_text(key)}


def _is_text(key: str) -> bool:
    return not key.removeprefix("module.").startswith("visual.") and not key.endswith(("logit_scale", "attn_mask"))


def _text_key(key: str) -> str:
    return key.removeprefix("module.").removeprefix("text.")


def bigg_from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIPTextModelWithProjection in open_clip's names: one matrix for queries, keys and values."""
    state = {key.removeprefix("text_model."): value for key, value in state.items() if "position_ids" not in key}
    out = {
        "positional_embedding": state.pop("embeddings.position_embedding.weight"),
        "token_embedding.weight": state.pop("embeddings.token_embedding.weight"),
        "ln_final.weight": state.pop("final_layer_norm.weight"),
        "ln_final.bias": state.pop("final_layer_norm.bias"),
        "text_projection": state.pop("text_projection.weight").T.contiguous(),
    }
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for key, value in state.items():
        _, _, layer, rest = key.split(".", 3)  # encoder.layers.N.<rest>
        module, kind = rest.rsplit(".", 1)
        prefix = f"transformer.resblocks.{layer}"
        if module == "self_attn.q_proj":
            parts = [state[f"encoder.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            out[f"{prefix}.attn.in_proj_{kind}"] = torch.cat(parts)
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            out[f"{prefix}.{names[module]}.{kind}"] = value
    return out
