"""The two public layouts of U-Net and VAE: a single file with prefixes, and a diffusers folder with its config.json.

Our own names are the single file's. The diffusers layout names the same tensors otherwise; only the VAE's attention
has other shapes there, a matrix [C,C] for a 1 x 1 convolution [C,C,1,1]. Both ways are exact to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from model.config import UNetConfig, VAEConfig
from model.tensors import Stored, check_keys, shapes
from model.unet import UNet
from model.vae import VAE

T = TypeVar("T", Tensor, Stored)

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."  # in a single file

UNET_SWITCHES = {  # entries of config.json that change what is computed, and that ours cannot say otherwise
    "num_attention_heads": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "mid_block_scale_factor": 1,
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "attention_type": "default",
    "cross_attention_norm": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}

# diffusers names of the VAE's attention before its version 0.13, which older folders still hold
OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def to_diffusers(state: Mapping[str, T], config: UNetConfig | VAEConfig) -> dict[str, T]:
    """A state dict of ours in diffusers' names and shapes. Raises ValueError for keys that do not fit `config`."""
    check_keys("the state dict", shapes(state), shapes(on_meta(config).state_dict()))
    return {
        _renamed(key, config): value.reshape(*value.shape[:2]) if _is_matrix(key) else value
        for key, value in state.items()
    }


def from_diffusers(
    state: Mapping[str, T], config: UNetConfig | VAEConfig, what: str = "the diffusers weights"
) -> dict[str, T]:
    """A diffusers state dict in our names and shapes. Raises ValueError for keys of `what` that do not fit `config`."""
    if isinstance(config, VAEConfig):
        state = {_modern(key): value for key, value in state.items()}
    own = on_meta(config).state_dict()
    check_keys(what, shapes(state), shapes(to_diffusers(own, config)))
    tensors = {key: state[_renamed(key, config)] for key in own}
    return {key: value.reshape(*value.shape, 1, 1) if _is_matrix(key) else value for key, value in tensors.items()}


def diffusers_config(config: UNetConfig | VAEConfig) -> dict[str, Any]:
    """The config.json of a diffusers folder."""
    if isinstance(config, VAEConfig):
        return {"_class_name": "AutoencoderKL", **_decisive(config), "act_fn": "silu", "force_upcast": True}
    return {
        "_class_name": "UNet2DConditionModel",
        **_decisive(config),
        "addition_embed_type": "text_time",
        "use_linear_projection": True,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    }


def agreed_config(found: Mapping[str, Any], config: UNetConfig | VAEConfig, what: str) -> UNetConfig | VAEConfig:
    """`config` where a diffusers config.json says the same; a VAE's scaling factor is the one found there.

    Raises ValueError that names every entry of `what` that says otherwise, and those of the shape that are missing,
    for which diffusers has defaults that are not SDXL's.
    """
    expected = diffusers_config(config)
    expected.pop("transformer_layers_per_block", None)  # unused at levels without attention; the keys tell the depths
    if isinstance(config, VAEConfig):
        if "scaling_factor" not in found:
            raise ValueError(f"{what} has no scaling_factor")
        config = replace(config, scaling_factor=found["scaling_factor"])
        del expected["scaling_factor"]
        required = _decisive(config).keys() & expected.keys()
        del expected["force_upcast"]  # about fp16, not about what is computed
        expected |= {"shift_factor": None, "latents_mean": None, "latents_std": None}
    else:
        required = _decisive(config).keys() & expected.keys()
        expected |= UNET_SWITCHES
    wrong = {key: ("missing", expected[key]) for key in sorted(required - found.keys())} | {
        key: (found[key], value)
        for key, value in expected.items()
        if key in found and _spread(found[key], value) != value
    }
    if wrong:
        raise ValueError(f"{what} (found, expected): {wrong}")
    return config


def _spread(found: Any, expected: Any) -> Any:
    """A value as a list or as a number, as `expected` is: diffusers takes both, one number for all levels."""
    if isinstance(expected, list) and not isinstance(found, list | tuple):
        return [found] * len(expected)
    if not isinstance(expected, list) and isinstance(found, list | tuple) and len(set(found)) == 1:
        return found[0]
    return list(found) if isinstance(found, tuple) else found


def _decisive(config: UNetConfig | VAEConfig) -> dict[str, Any]:
    """The entries of config.json that follow from ours."""
    if isinstance(config, VAEConfig):
        levels = len(config.channel_mult)
        return {
            "block_out_channels": [config.channels * mult for mult in config.channel_mult],
            "layers_per_block": config.num_res_blocks,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "latent_channels": config.latent_channels,
            "norm_num_groups": config.norm_groups,
            "scaling_factor": config.scaling_factor,
        }
    if config.transformer_depth[-1] not in (0, config.middle_depth):
        raise ValueError(
            f"diffusers gives the middle block the last level's depth {config.transformer_depth[-1]}, "
            f"not {config.middle_depth}"
        )
    channels = [config.model_channels * mult for mult in config.channel_mult]
    attends = [depth > 0 for depth in config.transformer_depth]
    return {
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "block_out_channels": channels,
        "layers_per_block": config.num_res_blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        # A level without attention has no use for its entry, but the last entry is the middle block's depth as well.
        "transformer_layers_per_block": [*(d or 1 for d in config.transformer_depth[:-1]), config.middle_depth],
        "attention_head_dim": [c // config.head_channels for c in channels],  # the number of heads, despite its name
        "cross_attention_dim": config.context_dim,
        "addition_time_embed_dim": config.conditioning_embed_dim,
        "projection_class_embeddings_input_dim": config.vector_dim,
        "norm_num_groups": config.norm_groups,
    }


UNET_RENAMES = (  # first match wins; i counts blocks, {b} the level and {l} the layer within it
    (r"time_embed\.0\.", "time_embedding.linear_1."),
    (r"time_embed\.2\.", "time_embedding.linear_2."),
    (r"label_emb\.0\.0\.", "add_embedding.linear_1."),
    (r"label_emb\.0\.2\.", "add_embedding.linear_2."),
    (r"input_blocks\.0\.0\.", "conv_in."),
    (r"out\.0\.", "conv_norm_out."),
    (r"out\.2\.", "conv_out."),
    (r"input_blocks\.(?P<i>\d+)\.0\.op\.", "down_blocks.{b}.downsamplers.0.conv."),
    (r"input_blocks\.(?P<i>\d+)\.0\.", "down_blocks.{b}.resnets.{l}."),
    (r"input_blocks\.(?P<i>\d+)\.1\.", "down_blocks.{b}.attentions.{l}."),
    (r"middle_block\.0\.", "mid_block.resnets.0."),
    (r"middle_block\.1\.", "mid_block.attentions.0."),
    (r"middle_block\.2\.", "mid_block.resnets.1."),
    (r"output_blocks\.(?P<i>\d+)\.[12]\.conv\.", "up_blocks.{b}.upsamplers.0.conv."),
    (r"output_blocks\.(?P<i>\d+)\.0\.", "up_blocks.{b}.resnets.{l}."),
    (r"output_blocks\.(?P<i>\d+)\.1\.", "up_blocks.{b}.attentions.{l}."),
)
RESNET_RENAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
VAE_RENAMES = (  # all that match, in this order; {i} counts levels as the file does, {r} from the other end
    (r"encoder\.down\.(?P<i>\d+)\.block\.", "encoder.down_blocks.{i}.resnets."),
    (r"encoder\.down\.(?P<i>\d+)\.downsample\.", "encoder.down_blocks.{i}.downsamplers.0."),
    (r"decoder\.up\.(?P<i>\d+)\.block\.", "decoder.up_blocks.{r}.resnets."),
    (r"decoder\.up\.(?P<i>\d+)\.upsample\.", "decoder.up_blocks.{r}.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.(?P<i>[qkv])\.", ".mid_block.attentions.0.to_{i}."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def _renamed(key: str, config: UNetConfig | VAEConfig) -> str:
    """The diffusers name of one of our keys."""
    if isinstance(config, VAEConfig):
        for pattern, name in VAE_RENAMES:
            if found := re.search(pattern, key):
                index = found.groupdict().get("i", "")
                mirrored = len(config.channel_mult) - 1 - int(index) if index.isdigit() else ""
                key = key.replace(found[0], name.format(i=index, r=mirrored))
        return key
    for pattern, name in UNET_RENAMES:
        if found := re.match(pattern, key):
            index = int(found.groupdict().get("i", 0)) - key.startswith("input_blocks")  # the first is conv_in alone
            level, layer = divmod(index, config.num_res_blocks + 1)
            rest = key[found.end() :]
            if ".resnets." in name:
                part, kind = rest.rsplit(".", 1)
                rest = f"{RESNET_RENAMES[part]}.{kind}"
            return name.format(b=level, l=layer) + rest
    raise KeyError(f"{key!r} is no key of a U-Net")


def _is_matrix(key: str) -> bool:
    """Whether diffusers holds this 1 x 1 convolution of ours as a matrix."""
    return ".attn_1." in key and ".norm." not in key and key.endswith("weight")


def _modern(key: str) -> str:
    if ".attentions." in key:
        for old, new in OLD_ATTENTION.items():
            key = key.replace(old, new)
    return key


def on_meta(config: UNetConfig | VAEConfig) -> UNet | VAE:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return VAE(config) if isinstance(config, VAEConfig) else UNet(config)
