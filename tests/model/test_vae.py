import pytest
import torch
import torch.nn.functional as F

from model.config import DISCRIMINATOR_PRESETS, VAE_PRESETS
from model.finite import NotFiniteError
from model.layouts import diffusers_config, to_diffusers
from model.vae import VAE, MapAttention, Posterior, scale, unscale
from model.vae_loss import (
    PatchDiscriminator,
    adaptive_weight,
    adversarial_loss,
    divergence_loss,
    hinge_loss,
    last_layer_gradients,
    perceptual_loss,
    reconstruction_loss,
)


def image(batch=2, height=32, width=48):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_vae_equals_diffusers(vae_config, randomized, relative_error):
    from diffusers import AutoencoderKL

    vae = randomized(VAE(vae_config))
    theirs = AutoencoderKL.from_config(diffusers_config(vae_config))
    theirs.load_state_dict(to_diffusers(vae.state_dict(), vae_config))
    with torch.no_grad():
        posterior = vae.encode(image())
        expected = theirs.encode(image()).latent_dist
        assert relative_error(posterior.mean, expected.mean) < 1e-5
        assert relative_error(posterior.std, expected.std) < 1e-5
        assert relative_error(posterior.kl(), expected.kl()) < 1e-5
        latents = torch.randn(posterior.mean.shape)
        assert relative_error(vae.decode(latents), theirs.decode(latents).sample) < 1e-5


def test_odd_maps_and_other_types_are_as_near_to_exact_as_diffusers(vae_config, randomized, relative_error):
    from diffusers import AutoencoderKL

    vae = randomized(VAE(vae_config))
    theirs = AutoencoderKL.from_config(diffusers_config(vae_config))
    theirs.load_state_dict(to_diffusers(vae.state_dict(), vae_config))
    side = vae_config.downsample
    pixels = image(batch=3, height=5 * side, width=7 * side)
    latents = torch.randn(3, 4, 5, 7, generator=torch.Generator().manual_seed(3))

    def both(dtype):
        with torch.no_grad():
            ours = vae.to(dtype).encode(pixels).mean, vae.decode(latents)
            encoded = theirs.to(dtype).encode(pixels.to(dtype)).latent_dist.mean
            return zip(ours, (encoded, theirs.decode(latents.to(dtype)).sample), strict=True)

    exact = []
    for found, expected in both(torch.float64):
        assert relative_error(found, expected) < 1e-6  # posteriors are fp32
        exact.append(expected)
    for (found, rounded), expected in zip(both(torch.bfloat16), exact, strict=True):
        assert relative_error(found, expected) < 1.2 * relative_error(rounded, expected) < 0.05


def test_posterior_is_a_gaussian_with_bounded_spread():
    vae = VAE(VAE_PRESETS["tiny"])
    with torch.no_grad():
        vae.quant_conv.bias[4:] = torch.tensor([-1e3, 1e3, 0.0, 0.0])
        std = vae.encode(image()).std
    torch.testing.assert_close(std[:, 0], torch.full_like(std[:, 0], torch.tensor(-15.0).exp()))
    torch.testing.assert_close(std[:, 1], torch.full_like(std[:, 1], torch.tensor(10.0).exp()))


def test_divergence_is_zero_for_the_unit_gaussian_and_equals_torch():
    mean, std = torch.randn(3, 4, 2, 2), torch.rand(3, 4, 2, 2) + 0.1
    unit = Posterior(torch.zeros_like(mean), torch.ones_like(std))
    assert unit.kl().tolist() == [0.0] * 3
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean, std).kl(), expected)


def test_unscale_undoes_scale():
    mean, std, noise = torch.randn(3, 2, 4, 4, 4)
    factor = VAE_PRESETS["sdxl"].scaling_factor
    torch.testing.assert_close(unscale(scale(mean, std, noise, factor), factor), Posterior(mean, std).sample(noise))


def test_forward_decodes_a_sample_and_checkpointing_changes_no_gradient():
    vae = VAE(VAE_PRESETS["tiny"])
    noise = torch.randn(2, 4, 8, 12)
    gradients = []
    for vae.activation_checkpointing in (False, True):
        vae.zero_grad()
        reconstruction, posterior = vae(image(), noise)
        assert torch.equal(reconstruction, vae.decode(posterior.sample(noise)))
        (reconstruction_loss(image(), reconstruction) + posterior.kl()).mean().backward()
        gradients.append([weight.grad for weight in vae.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


def test_an_image_of_odd_sides_is_refused():
    with pytest.raises(ValueError, match="multiples of 4"):
        VAE(VAE_PRESETS["tiny"]).encode(image(height=30))


def test_bfloat16_stays_near_fp32(randomized, relative_error):
    vae = randomized(VAE(VAE_PRESETS["tiny"]))
    noise = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        exact, posterior = vae(image(), noise)
        rounded, rough = vae.bfloat16()(image(), noise)
    assert (rounded.dtype, rough.mean.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(rough.mean, posterior.mean) < 0.05
    assert relative_error(rough.std, posterior.std) < 0.05
    assert relative_error(rounded.float(), exact) < 0.1


def test_float16_that_fits_stays_near_fp32(randomized, relative_error):
    vae = randomized(VAE(VAE_PRESETS["tiny"]))
    noise = torch.randn(2, 4, 8, 12)
    with torch.no_grad():
        assert relative_error(VAE.forward(vae.half(), image(), noise)[0], vae.float()(image(), noise)[0]) < 0.02


def test_float16_that_overflows_names_its_samples_and_the_remedy():
    vae = VAE(VAE_PRESETS["tiny"]).half()
    bright = image(batch=4) * torch.tensor([1.0, 3e4, 1.0, 6e4]).view(4, 1, 1, 1)
    with torch.no_grad():
        vae.encoder.conv_in.weight.fill_(1.0)
        with pytest.raises(NotFiniteError, match=r"encoder overflowed .* samples 1, 3 .* bfloat16 or float32") as error:
            vae.encode(bright)
        assert error.value.samples == (1, 3)
        vae.post_quant_conv.weight.fill_(100.0)
        latents = torch.ones(2, 4, 8, 8)
        with pytest.raises(FloatingPointError, match="decoder overflowed in float16 for samples 0 of"):
            vae.decode(latents * torch.tensor([6e4, 1.0]).view(2, 1, 1, 1))


def test_a_deviation_that_is_clamped_does_not_hide_an_overflow():
    vae = VAE(VAE_PRESETS["tiny"]).half()
    with torch.no_grad():
        vae.quant_conv.bias[4:] = float("inf")  # the log of the variance
        with pytest.raises(NotFiniteError):
            vae.encode(image())


def test_the_perceptual_term_is_latent_diffusions():
    pixels, other, distance = image(), image().flip(0), torch.tensor([0.3, 0.7])
    summed = ((pixels - other).abs() + distance.view(2, 1, 1, 1)).sum((1, 2, 3))  # each element carries the distance
    ours = reconstruction_loss(pixels, other) + perceptual_loss(distance, pixels)
    torch.testing.assert_close(ours * pixels.shape[2] * pixels.shape[3], summed)


def test_reconstruction_and_divergence_keep_latent_diffusions_ratio():
    pixels = image()
    other = image().flip(0)
    posterior = Posterior(torch.randn(2, 4, 8, 12), torch.ones(2, 4, 8, 12))
    ratio = divergence_loss(posterior, pixels) / reconstruction_loss(pixels, other)
    torch.testing.assert_close(ratio, posterior.kl() / (pixels - other).abs().sum((1, 2, 3)))


def test_a_sample_is_judged_apart_from_its_neighbours():
    discriminator = PatchDiscriminator(DISCRIMINATOR_PRESETS["tiny"])
    logits = discriminator(image(batch=3))
    assert logits.shape[:2] == (3, 1)
    torch.testing.assert_close(logits[1:2], discriminator(image(batch=3)[1:2]))


def test_a_full_size_logit_sees_70_pixels():
    discriminator = PatchDiscriminator(DISCRIMINATOR_PRESETS["sdxl"])
    norms = [index for index, layer in enumerate(discriminator.layers) if isinstance(layer, torch.nn.GroupNorm)]
    for index in norms:  # a norm looks at the whole map
        discriminator.layers[index] = torch.nn.Identity()
    pixels = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(pixels)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70


def test_hinge_is_zero_when_both_are_told_apart_with_margin():
    ones = torch.ones(2, 1, 3, 3)
    assert hinge_loss(ones, -ones).tolist() == [0.0, 0.0]
    assert hinge_loss(0 * ones, 0 * ones).tolist() == [1.0, 1.0]
    assert adversarial_loss(2 * ones).tolist() == [-2.0, -2.0]


def test_adaptive_weight_equalizes_gradients_at_the_last_layer_and_is_bounded():
    layer = torch.randn(5, requires_grad=True)
    nll, adversarial = (3.0 * layer).sum(), (0.5 * layer).sum()
    gradients = last_layer_gradients(nll, adversarial, layer)
    weight = adaptive_weight(gradients)
    torch.testing.assert_close(weight, torch.tensor(6.0), rtol=1e-3, atol=0)
    assert not weight.requires_grad
    assert adaptive_weight(last_layer_gradients(1e9 * nll, adversarial, layer)) == 1e4
    assert adaptive_weight(torch.zeros_like(gradients)) == 0.0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_over_a_map_takes_a_fused_kernel(layout, monkeypatch):
    taken = []
    plain = F.scaled_dot_product_attention

    def watched(*qkv):
        taken.append(torch._fused_sdp_choice(*qkv))
        return plain(*qkv)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    MapAttention(32, 8)(torch.randn(1, 32, 8, 12).to(memory_format=layout))
    assert taken
    assert torch.nn.attention.SDPBackend.MATH.value not in taken  # which makes the whole matrix of pixels by pixels
