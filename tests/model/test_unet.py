import dataclasses
import gc
import hashlib
from collections import Counter

import pytest
import torch
from torch import nn

from model.conditioning import conditioning_vector
from model.config import UNET_PRESETS, VAE_PRESETS
from model.layers import fourier
from model.layouts import diffusers_config, to_diffusers
from model.unet import UNet
from model.vae import VAE

# parameters, tensors, and sha256 over the sorted "key:shape" lines of the published files
PUBLISHED = {
    "base": (2_567_463_684, 1680, "5cff19f14ae3f345d989121a490321ac728561618192821b2d74e9c6c1ee3b5e"),
    "refiner": (2_259_526_660, 1220, "a0f7684c8211ade6a67d3973d064435ab70a20f6cebb6576ca7ef19bc9fea0ed"),
    "vae": (83_653_863, 248, "912d28210541806fa32aad199aa6e3be3585bebd50bc59dfeb7eaf911aaab760"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_networks_have_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        module = VAE(VAE_PRESETS["sdxl"]) if name == "vae" else UNet(UNET_PRESETS[name])
    state = module.state_dict()
    lines = "\n".join(f"{key}:{'x'.join(map(str, value.shape))}" for key, value in sorted(state.items()))
    count = sum(value.numel() for value in state.values())
    assert (count, len(state), hashlib.sha256(lines.encode()).hexdigest()) == PUBLISHED[name]


def test_fourier_features_have_the_published_values():
    features = fourier(torch.tensor([1024.0]), 256)[0]
    first = torch.tensor([0.98735362, -0.53761721, 0.68345720, -0.49192682])
    middle = torch.tensor([-0.15853338, -0.84318900, 0.72999060, 0.87063658])
    torch.testing.assert_close(features[:4], first, atol=2e-4, rtol=0)  # 1024 radians in fp32: about 1e-4
    torch.testing.assert_close(features[128:132], middle, atol=2e-4, rtol=0)
    assert fourier(torch.zeros(2, 3), 8).tolist() == [[[1.0] * 4 + [0.0] * 4] * 3] * 2
    with pytest.raises(ValueError, match="odd"):
        fourier(torch.zeros(1), 7)


def inputs(config, batch=2, height=16, width=8):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.latent_channels, height, width, generator=generator)
    timesteps = torch.randint(0, 1000, (batch,), generator=generator)
    context = torch.randn(batch, 77, config.context_dim, generator=generator)
    pooled = torch.randn(batch, config.pooled_dim, generator=generator)
    conditions = {
        name: torch.randint(0, 1024, (batch, name.scalars), generator=generator) for name in config.conditioning
    }
    return latents, timesteps, context, pooled, conditions


def test_unet_equals_diffusers(unet_config, randomized, relative_error):
    from diffusers import UNet2DConditionModel

    unet = randomized(UNet(unet_config))
    theirs = UNet2DConditionModel.from_config(diffusers_config(unet_config))
    theirs.load_state_dict(to_diffusers(unet.state_dict(), unet_config))
    latents, timesteps, context, pooled, conditions = inputs(unet_config)
    time_ids = torch.cat([conditions[name] for name in unet_config.conditioning], dim=1)
    with torch.no_grad():
        found = unet(latents, timesteps, context, conditioning_vector(pooled, conditions, unet_config))
        expected = theirs(
            latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
    assert found.std() > 0.1
    assert relative_error(found, expected) < 1e-5


def test_odd_maps_and_other_types_are_as_near_to_exact_as_diffusers(unet_config, randomized, relative_error):
    from diffusers import UNet2DConditionModel

    unet = randomized(UNet(unet_config))
    theirs = UNet2DConditionModel.from_config(diffusers_config(unet_config))
    theirs.load_state_dict(to_diffusers(unet.state_dict(), unet_config))
    side = unet_config.downsample
    latents, timesteps, context, pooled, conditions = inputs(unet_config, batch=3, height=5 * side, width=7 * side)
    time_ids = torch.cat([conditions[name] for name in unet_config.conditioning], dim=1)
    vector = conditioning_vector(pooled, conditions, unet_config)

    def both(dtype):
        told = {"text_embeds": pooled.to(dtype), "time_ids": time_ids}
        with torch.no_grad():
            found = unet.to(dtype)(latents, timesteps, context, vector)
            expected = theirs.to(dtype)(latents.to(dtype), timesteps, context.to(dtype), added_cond_kwargs=told).sample
        assert found.dtype == expected.dtype == dtype
        return found, expected

    found, exact = both(torch.float64)
    assert relative_error(found, exact) < 1e-6  # Fourier features are of fp32 on both sides
    found, rounded = both(torch.bfloat16)
    assert relative_error(found, exact) < 1.2 * relative_error(rounded, exact) < 0.05


def test_norms_have_diffusers_epsilons(unet_config, vae_config):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    def epsilons(module):
        return Counter(part.eps for part in module.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm))

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(diffusers_config(unet_config))
        vae = AutoencoderKL.from_config(diffusers_config(vae_config))
        assert epsilons(UNet(unet_config)) == epsilons(unet)
        assert epsilons(VAE(vae_config)) == epsilons(vae)


def test_a_new_unet_predicts_zero(unet_config):
    latents, timesteps, context, pooled, conditions = inputs(unet_config)
    vector = conditioning_vector(pooled, conditions, unet_config)
    assert not UNet(unet_config)(latents, timesteps, context, vector).any()


@pytest.mark.parametrize("preset", ["tiny-base", "tiny-refiner"])
def test_activation_checkpointing_changes_no_gradient(preset, randomized):
    config = UNET_PRESETS[preset]
    unet = randomized(UNet(config))
    latents, timesteps, context, pooled, conditions = inputs(config, height=8)
    vector = conditioning_vector(pooled, conditions, config)
    gradients = []
    for unet.activation_checkpointing in (False, True):
        unet.zero_grad()
        unet(latents, timesteps, context, vector).square().mean().backward()
        gradients.append([weight.grad for weight in unet.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


def test_the_prediction_has_the_weights_dtype_and_depends_on_every_input(randomized):
    config = UNET_PRESETS["tiny-base"]
    unet = randomized(UNet(config))
    latents, timesteps, context, pooled, conditions = inputs(config, height=8)
    given = [latents, timesteps, context, conditioning_vector(pooled, conditions, config)]
    with torch.no_grad():
        prediction = unet(*given)
        for index in range(4):
            changed = [value + 1 if i == index else value for i, value in enumerate(given)]
            assert not torch.allclose(unet(*changed), prediction, atol=1e-4)
        assert torch.allclose(unet(latents, timesteps.double(), *given[2:]), prediction)
        assert unet.bfloat16()(*given).dtype == torch.bfloat16


def test_inputs_that_do_not_fit_are_refused():
    config = UNET_PRESETS["tiny-base"]
    unet = UNet(config)
    latents, timesteps, context, pooled, conditions = inputs(config)
    vector = conditioning_vector(pooled, conditions, config)
    with pytest.raises(ValueError, match="multiples of 2"):
        unet(latents[..., :7], timesteps, context, vector)
    with pytest.raises(ValueError, match="context"):
        unet(latents, timesteps, context[..., 1:], vector)
    with pytest.raises(ValueError, match="vector"):
        unet(latents, timesteps, context, vector[:, 1:])
    with pytest.raises(ValueError, match="timesteps"):
        unet(latents, timesteps[:1], context, vector)


def test_channels_that_do_not_divide_into_heads_are_refused():
    with pytest.raises(ValueError, match="128 channels do not divide into heads of 48"):
        dataclasses.replace(UNET_PRESETS["tiny-base"], head_channels=48)


@pytest.mark.full_width
@pytest.mark.parametrize("preset", ["base", "refiner"])
def test_a_unet_of_published_size_equals_diffusers(preset, relative_error):
    """Both networks hold the same storages, so this takes the weights' 10 GiB once."""
    from diffusers import UNet2DConditionModel

    config = UNET_PRESETS[preset]
    with torch.device("meta"):
        unet = UNet(config)
        theirs = UNet2DConditionModel.from_config(diffusers_config(config))
    unet.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for weight in unet.parameters():
        bound = max(weight[0].numel(), 8) ** -0.5
        weight.uniform_(-bound, bound, generator=generator).add_(0.5 * (weight.ndim == 1))
    theirs.load_state_dict(to_diffusers(unet.state_dict(), config), assign=True)
    latents, timesteps, context, pooled, conditions = inputs(config, batch=1, height=16, width=24)
    time_ids = torch.cat([conditions[name] for name in config.conditioning], dim=1)
    with torch.no_grad():
        found = unet(latents, timesteps, context, conditioning_vector(pooled, conditions, config))
        expected = theirs(
            latents, timesteps, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample
    assert found.std() > 0.01
    assert relative_error(found, expected) < 1e-5
    del unet, theirs, weight
    gc.collect()
