"""The text encoders' weights: where they come from, and their names in both public layouts.

Both towers go by open_clip's names, as bigG does in the published single files, where CLIP-L goes by transformers'.
transformers has three matrices where open_clip has one for queries, keys and values, and transposes the projection.
Both ways are exact to the bit.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from model.config import CONTEXT_LENGTH, END_OF_TEXT, START_OF_TEXT, VOCABULARY, TextTowerConfig
from model.tensors import (
    PICKLES,
    SAFETENSORS,
    State,
    Stored,
    below,
    joined,
    read_file,
    read_folder,
)
from model.weights import CONFIG, component, part_of_file

TEXT_MODEL = "text_model."  # before the keys of transformers, in public files and in some of its classes
CLIP_L_PREFIX = "conditioner.embedders.0.transformer."  # in a single file of the base, before "text_model."
BIGG_PREFIXES = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.")  # in the base's, the refiner's
LOGIT_SCALE = "logit_scale"  # bigG's, which no picture depends on; it is handed on where a file holds it
LAYERS, THEIR_LAYERS = "transformer.resblocks.", "encoder.layers."
PROJECTION, THEIR_PROJECTION = "text_projection", "text_projection.weight"
OTHERS = ("vision_model.", "visual_projection.", "visual.")  # the image tower of a whole CLIP model

LAYER_NAMES = {  # of a layer, as its keys begin: open_clip's and transformers'
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.in_proj_": "self_attn.in_proj_",  # which is q_proj, k_proj and v_proj in transformers
    "attn.out_proj.": "self_attn.out_proj.",
}
OUTER_NAMES = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def read_clip_l(tower: TextTowerConfig, source: str, allow_pickle: bool = False) -> dict[str, Stored]:
    """CLIP-L's weights in open_clip's names. `source`: a single file of the base, a folder of a pipeline or of a
    CLIP model, or the name of one on the hub. Raises ValueError where a config.json does not fit `tower`.
    """
    if _is_file(source):
        state = read_file(source, allow_pickle)
        if any(key.startswith(BIGG_PREFIXES[1]) for key in state):
            raise ValueError(f"{source} is a refiner's file, which holds no CLIP-L; name a base's")
        if any(key.startswith(CLIP_L_PREFIX) for key in state):
            state = part_of_file(source, state, CLIP_L_PREFIX)
        return clip_l_from_transformers(state)
    return clip_l_from_transformers(_read_transformers(tower, source, "text_encoder", allow_pickle))


def read_bigg(tower: TextTowerConfig, source: str, allow_pickle: bool = False) -> dict[str, Stored]:
    """bigG's text weights in open_clip's names, with `logit_scale` where the source holds it.

    `source`: a single file of base or refiner, an open_clip file or "model:tag", a file or folder of a
    CLIPTextModelWithProjection, a pipeline's folder, or the name of one on the hub. As `read_clip_l`.
    """
    if not os.path.exists(source) and ":" in source:
        source = _open_clip_file(source)
    if _is_file(source):
        state = read_file(source, allow_pickle)
        for prefix in BIGG_PREFIXES:
            if any(key.startswith(prefix) for key in state):
                return part_of_file(source, state, prefix)
        if any(key.startswith(TEXT_MODEL) for key in state):
            return from_transformers(state)
        return {
            key.removeprefix("module.").removeprefix("text."): value
            for key, value in below(state, "").items()
            if not key.removeprefix("module.").startswith(OTHERS) and not key.endswith("attn_mask")
        }
    return from_transformers(_read_transformers(tower, source, "text_encoder_2", allow_pickle))


def clip_l_from_transformers(state: State) -> dict[str, Stored]:
    """The text transformer of a CLIP model of transformers, without what belongs to images or to both."""
    return from_transformers(
        {key: value for key, value in state.items() if not key.startswith((LOGIT_SCALE, "text_projection."))}
    )


def from_transformers(state: State) -> dict[str, Stored]:
    """A text tower of transformers in open_clip's names. A key that is none of its own stays as it is."""
    state = {
        key.removeprefix(TEXT_MODEL): value for key, value in below(state, "").items() if not key.startswith(OTHERS)
    }
    for key in [key for key in state if ".q_proj." in key]:
        parts = [key.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in state for part in parts):
            state[key.replace(".q_proj.", ".in_proj_")] = joined([state.pop(part) for part in parts])
    if THEIR_PROJECTION in state:
        state[PROJECTION] = state.pop(THEIR_PROJECTION).T
    return {_own_name(key): value for key, value in state.items()}


def to_transformers(state: State) -> dict[str, Stored]:
    """open_clip's text weights as those of a CLIPTextModel, with its projection where it has one, and no logit_scale.

    The keys are those of the published folders, and of CLIP-L in the published single files.
    """
    out: dict[str, Stored] = {}
    for key, value in state.items():
        if key == PROJECTION:
            out[THEIR_PROJECTION] = value.T
        elif ".in_proj_" in key:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                out[_their_name(key).replace(".in_proj_", f".{part}_proj.")] = chunk
        elif key != LOGIT_SCALE:
            out[_their_name(key)] = value
    return out


def transformers_config(tower: TextTowerConfig) -> dict[str, Any]:
    """The config.json of a tower as transformers has it."""
    projected = tower.projection_dim is not None
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **_decisive(tower),
        "projection_dim": tower.projection_dim or tower.width,
        "bos_token_id": START_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": tower.pad_token,
    }


def _own_name(key: str) -> str:
    """open_clip's name of a key of transformers, and of any other key the key."""
    outer = {theirs: own for own, theirs in OUTER_NAMES.items()}
    layer, _, rest = key.removeprefix(THEIR_LAYERS).partition(".")
    for own, theirs in LAYER_NAMES.items():
        if key.startswith(THEIR_LAYERS) and rest.startswith(theirs):
            return f"{LAYERS}{layer}.{own}{rest.removeprefix(theirs)}"
    return outer.get(key, key)


def _their_name(key: str) -> str:
    """transformers' name of a key of open_clip."""
    if key in OUTER_NAMES:
        return TEXT_MODEL + OUTER_NAMES[key]
    layer, _, rest = key.removeprefix(LAYERS).partition(".")
    own = next(own for own in LAYER_NAMES if rest.startswith(own))
    return f"{TEXT_MODEL}{THEIR_LAYERS}{layer}.{LAYER_NAMES[own]}{rest.removeprefix(own)}"


def _decisive(tower: TextTowerConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT_LENGTH,
        "layer_norm_eps": 1e-5,
    }


def _is_file(source: str) -> bool:
    return source.endswith((SAFETENSORS, *PICKLES)) or os.path.isfile(source)


def _read_transformers(tower: TextTowerConfig, source: str, part: str, allow_pickle: bool) -> dict[str, Stored]:
    from transformers import CLIPTextConfig

    if not os.path.isdir(source) and (os.path.isabs(source) or source.startswith(".")):
        raise FileNotFoundError(f"no weights at {source}: there is no such folder")
    folder = component(source, part) if os.path.isdir(source) else _hub_folder(source, allow_pickle)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: expected the folder of a text encoder, or of a pipeline")
    found = CLIPTextConfig.from_pretrained(folder)  # which finds the part of a whole CLIP model's, too
    expected = _decisive(tower)
    wrong = {key: (getattr(found, key), value) for key, value in expected.items() if getattr(found, key) != value}
    if wrong:
        raise ValueError(f"{source}: config.json of {part} (found, expected): {wrong}")
    return read_folder(folder, allow_pickle)


def _hub_folder(name: str, allow_pickle: bool) -> Path:
    """A model of the hub, or of its cache on this machine: its config and one form of its weights."""
    from huggingface_hub import snapshot_download

    patterns = ["config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
    folder = Path(snapshot_download(name, allow_patterns=patterns))
    if allow_pickle and not any(folder.glob("model*.safetensors")):
        snapshot_download(
            name, allow_patterns=["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]
        )
    return folder


def _open_clip_file(source: str) -> str:
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    model, tag = source.split(":", 1)
    published = get_pretrained_cfg(model, tag)
    if not published:
        raise ValueError(f"open_clip knows no weights {tag!r} of {model!r}")
    return download_pretrained(published)
