"""Tiles that overlap: where they lie, what they weigh, and how far the blend is from the whole."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from model.config import VAEConfig
from model.speed import compile_blocks
from model.tiling import decode_tiled, encode_tiled, norms_held, ramps, small_copy, starts
from model.vae import VAE

LEVEL = 2 / 255  # one 8-bit step of an image in [-1, 1]
SMALL = VAEConfig(channels=8, channel_mult=(1, 1), num_res_blocks=1, norm_groups=4)


def image(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Soft discs over a slope of colour, in [-1, 1]."""
    draws = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height).view(-1, 1)
    x = torch.linspace(0, width / height, width)
    slope = torch.rand(2, batch, 3, 1, 1, generator=draws) * 2 - 1
    result = slope[0] * x + slope[1] * y
    for _ in range(6):
        top, left, size = torch.rand(3, batch, 1, 1, 1, generator=draws)
        size = 0.05 + 0.3 * size
        mask = torch.sigmoid((size - ((y - top) ** 2 + (x - left) ** 2).sqrt()) * 50)
        colour = torch.rand(batch, 3, 1, 1, generator=draws) * 2 - 1
        result = torch.lerp(result, colour.expand_as(result), mask)
    return result.clamp(-1, 1)


@pytest.fixture
def local() -> VAE:
    """A VAE that sees a neighbourhood only: what a tile computes far from its edges is what the whole computes."""
    torch.manual_seed(0)
    vae = VAE(SMALL)
    for part in (vae.encoder, vae.decoder):
        part.mid.attn_1 = nn.Identity()
        for module in list(part.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, nn.Identity())
    return vae


@pytest.mark.parametrize(("tile", "overlap"), [(8, 2), (8, 4), (7, 3), (32, 16)])
def test_tiles_cover_everything_and_overlap_enough(tile, overlap):
    for length in range(1, 120):
        begins = starts(length, tile, overlap)
        size = min(tile, length)
        assert begins[0] == 0
        assert begins[-1] + size == length
        assert all(left + size - right >= overlap for left, right in itertools.pairwise(begins))
        weights = torch.zeros(length * 2)
        for begin, ramp in zip(begins, ramps(begins, size, 2), strict=True):
            assert ramp.min() >= 0
            weights[begin * 2 : (begin + size) * 2] += ramp
        torch.testing.assert_close(weights, torch.ones(length * 2))


def test_a_tile_weighs_nothing_next_to_an_edge_that_another_covers():
    first, second = ramps([0, 48], 64, 1)
    assert first[:48].tolist() == [1.0] * 48
    assert first[-4:].tolist() == second[:4].tolist() == [0.0] * 4
    assert (first[52:60].diff() < 0).all()
    torch.testing.assert_close(first[52:60].diff(), torch.full((7,), -0.125))


def test_one_tile_is_the_whole(local):
    pixels, latents = image(2, 32, 48), torch.randn(2, 4, 16, 24)
    with torch.no_grad():
        whole, tiled = local.encode(pixels), encode_tiled(local, pixels, tile=48, overlap=16)
        assert torch.equal(whole.mean, tiled.mean)
        assert torch.equal(whole.std, tiled.std)
        assert torch.equal(local.decode(latents), decode_tiled(local, latents, tile=48, overlap=16))


@pytest.mark.parametrize(("height", "width"), [(250, 194), (96, 322)])
def test_what_sees_a_neighbourhood_only_is_tiled_without_a_difference(local, height, width):
    pixels, latents = image(2, height, width), torch.randn(2, 4, height // 2, width // 2)
    with torch.no_grad():
        whole, tiled = local.encode(pixels), encode_tiled(local, pixels, tile=208, overlap=104)
        torch.testing.assert_close(tiled.mean, whole.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiled.std, whole.std, rtol=1e-4, atol=1e-5)
        found = decode_tiled(local, latents, tile=208, overlap=104)
        torch.testing.assert_close(found, local.decode(latents), rtol=1e-4, atol=1e-5)


def test_tiles_keep_the_type_of_the_vae(local):
    latents = torch.randn(1, 4, 40, 20)
    assert decode_tiled(local.bfloat16(), latents, tile=32, overlap=16).dtype == torch.bfloat16


@pytest.mark.parametrize(("tile", "overlap"), [(63, 16), (64, 15), (64, 34), (64, 0), (0, 0)])
def test_tiles_that_do_not_fit_are_refused(local, tile, overlap):
    with pytest.raises(ValueError, match=f"tile {tile}, overlap {overlap}"):
        decode_tiled(local, torch.zeros(1, 4, 40, 40), tile, overlap)
    with pytest.raises(ValueError, match=f"tile {tile}, overlap {overlap}"):
        encode_tiled(local, torch.zeros(1, 3, 80, 80), tile, overlap)


def test_an_image_of_odd_sides_is_refused(local):
    with pytest.raises(ValueError, match="multiples of 2"):
        encode_tiled(local, torch.zeros(1, 3, 81, 80), 64, 16)


def test_norms_held_at_the_whole_make_any_part_of_it_what_it_was(randomized):
    """With the statistics of the whole, a VAE without attention is a local function again."""
    vae = randomized(VAE(SMALL))
    vae.decoder.mid.attn_1 = nn.Identity()
    latents = torch.randn(2, 4, 60, 60) * torch.linspace(0.1, 3, 60)
    with torch.no_grad():
        whole = vae.decode(latents)
        apart = vae.decode(latents[..., :40])
        with norms_held(vae.decoder, lambda: vae.decode(latents)):
            held = vae.decode(latents[..., :40])
        inside = (..., slice(0, 48))  # away from the edge at 80
        torch.testing.assert_close(held[inside], whole[inside], rtol=1e-4, atol=1e-4)
        assert (apart[inside] - whole[inside]).abs().max() > 0.05
        assert torch.equal(vae.decode(latents), whole)  # nothing is held any more


def test_compiled_blocks_are_tiled_alike(randomized):
    vae = randomized(VAE(SMALL))
    latents = torch.randn(1, 4, 24, 48)
    plain = decode_tiled(vae, latents, tile=48, overlap=16)
    compile_blocks(vae, backend="eager")
    with torch.no_grad():
        vae.decode(latents)
    assert torch.equal(decode_tiled(vae, latents, tile=48, overlap=16), plain)


def test_the_small_copy_has_the_shape_of_the_whole_and_the_area_of_a_tile():
    whole = torch.rand(2, 3, 96, 384)
    copy = small_copy(whole, 64, 4)
    assert copy.shape == (2, 3, 32, 128)
    assert torch.isin(copy, whole).all()
    assert torch.equal(small_copy(whole, 400, 4), whole)


@pytest.fixture(scope="module")
def trained() -> VAE:
    """A tiny VAE after some seconds of training: poor, but its tones come from where a real one's do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = VAE(VAEConfig(channels=8, channel_mult=(1, 2), num_res_blocks=1, norm_groups=4))
    optimizer = torch.optim.Adam(vae.parameters(), 4e-3)
    for step in range(100):
        pixels = image(8, 32, 32, step)
        posterior = vae.encode(pixels)
        loss = (vae.decode(posterior.mean) - pixels).abs().mean() + 1e-4 * posterior.mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return vae


def apart(vae: VAE, latents: Tensor, tile: int) -> Tensor:
    """Tiles decoded each by itself and put side by side."""
    return torch.cat(
        [torch.cat([vae.decode(x) for x in row.split(tile, 3)], dim=3) for row in latents.split(tile, 2)], dim=2
    )


def step_across(difference: Tensor, lines: list[int]) -> float:
    """Mean step of a difference across vertical lines, in 8-bit levels."""
    return float(torch.stack([difference[..., x] - difference[..., x - 1] for x in lines]).abs().mean()) / LEVEL


def test_no_seam_is_left_in_a_decoded_image(trained):
    pixels, tile, overlap = image(2, 160, 160, seed=12345), 64, 32
    with torch.no_grad():
        whole = trained.decode(trained.encode(pixels).mean)
        latents = trained.encode(pixels).mean
        tiled = decode_tiled(trained, latents, tile, overlap)
        side_by_side = apart(trained, latents, 32)
    begins = [begin * 2 for begin in starts(80, 32, 16)]
    edges = [*begins[1:], *(begin + tile for begin in begins[:-1])]
    assert step_across(side_by_side - whole, [64, 128]) > 2.0  # what there is to remove
    assert step_across(tiled - whole, edges) < 0.25  # far below what an 8-bit image can show
    energy = [
        float(torch.stack([x[..., line] - x[..., line - 1] for line in edges]).square().mean()) for x in (tiled, whole)
    ]
    assert energy[0] / energy[1] == pytest.approx(1, abs=0.25)
    assert (tiled - whole).square().mean() < 0.1 * (side_by_side - whole).square().mean()


def test_tiled_latents_are_near_those_of_the_whole(trained, relative_error):
    pixels = image(2, 160, 160, seed=12345)
    with torch.no_grad():
        whole, tiled = trained.encode(pixels), encode_tiled(trained, pixels, 64, 32)
        alone = torch.cat(
            [torch.cat([trained.encode(x).mean for x in row.split(64, 3)], dim=3) for row in pixels.split(64, 2)], dim=2
        )
    assert relative_error(tiled.mean, whole.mean) < 0.4 * relative_error(alone, whole.mean)
    assert relative_error(tiled.std, whole.std) < 0.2
