"""What the tests of this floor share: small configs of the published shapes, and modules whose every weight counts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from model.config import BASE_CONDITIONING, REFINER_CONDITIONING, UNetConfig, VAEConfig

REDUCED_UNETS = {  # the published depths and levels at a tenth of the width
    "base": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 3),
        middle_depth=3,
        context_dim=48,
        pooled_dim=40,
        conditioning=BASE_CONDITIONING,
        head_channels=16,
        conditioning_embed_dim=16,
        norm_groups=8,
    ),
    "refiner": UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 2, 2, 0),
        middle_depth=2,
        context_dim=48,
        pooled_dim=40,
        conditioning=REFINER_CONDITIONING,
        head_channels=16,
        conditioning_embed_dim=16,
        norm_groups=8,
    ),
}
REDUCED_VAES = {
    "sdxl": VAEConfig(channels=16, norm_groups=8),
    "tiny": VAEConfig(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, norm_groups=8),
}


@pytest.fixture(params=REDUCED_UNETS)
def unet_config(request: pytest.FixtureRequest) -> UNetConfig:
    return REDUCED_UNETS[request.param]


@pytest.fixture(params=REDUCED_VAES)
def vae_config(request: pytest.FixtureRequest) -> VAEConfig:
    return REDUCED_VAES[request.param]


@pytest.fixture
def randomized() -> Callable[[nn.Module], nn.Module]:
    """Fills every weight, so that branches that start at zero take part."""

    def fill(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in module.parameters():
                fan_in = max(weight[0].numel(), 8)
                weight.normal_(mean=float(weight.ndim == 1) * 0.5, std=fan_in**-0.5, generator=generator)
        return module

    return fill


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    def error(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        return float((found.double() - expected.double()).norm() / expected.double().norm())

    return error
