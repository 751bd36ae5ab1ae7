"""Image metrics against their definitions as others compute them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from model.metrics import Moments, frechet_distance, psnr, ssim


def images(count: int = 3, height: int = 24, width: int = 31, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_the_error_in_decibels_per_image():
    image = images()
    other = image * 0.5
    error = (image / 2 - other / 2).square().mean((1, 2, 3))
    torch.testing.assert_close(psnr(image, other), 10 * torch.log10(1 / error))
    black, white = torch.full((1, 3, 8, 8), -1.0), torch.full((1, 3, 8, 8), 1.0)
    assert float(psnr(black, white)) == 0
    assert psnr(image, image).tolist() == pytest.approx([100.0] * 3)


def test_ssim_is_the_formula_of_its_paper():
    image, other = images(), (images() + 0.5 * images(seed=1)).clamp(-1, 1)

    def reference(x: np.ndarray, y: np.ndarray) -> float:
        def mean(values: np.ndarray) -> np.ndarray:
            return gaussian_filter(values, 1.5, truncate=3.5)[5:-5, 5:-5]

        c1, c2 = 0.01**2, 0.03**2
        covariance = mean(x * y) - mean(x) * mean(y)
        spread = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
        quotient = (2 * mean(x) * mean(y) + c1) * (2 * covariance + c2)
        return float((quotient / ((mean(x) ** 2 + mean(y) ** 2 + c1) * (spread + c2))).mean())

    def scaled(x: torch.Tensor) -> np.ndarray:
        return x.double().numpy() / 2 + 0.5

    expected = [
        np.mean([reference(scaled(x)[c], scaled(y)[c]) for c in range(3)]) for x, y in zip(image, other, strict=True)
    ]
    assert ssim(image, other).tolist() == pytest.approx(expected, abs=1e-6)
    assert ssim(image, image).tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="11 pixels"):
        ssim(image[..., :10], other[..., :10])


def moments(features: torch.Tensor, part: int = 7) -> Moments:
    found = Moments(features.shape[1])
    for start in range(0, len(features), part):
        found.add(features[start : start + part])
    return found


def correlated(count: int, width: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, width, generator=draws) @ torch.randn(width, width, generator=draws)
    return mixed + shift


def test_moments_are_those_of_all_features_however_they_come():
    features = correlated(50, 6, seed=0, shift=1000.0)  # where sums of squares would lose their digits
    found = moments(features)
    assert found.count == 50
    np.testing.assert_allclose(found.mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy().T), rtol=1e-9)
    again = Moments.restored(found.state())
    again.add(features[:3])
    np.testing.assert_allclose(again.covariance, moments(torch.cat([features, features[:3]]), 53).covariance)
    with pytest.raises(ValueError, match="not finite"):
        found.add(torch.full((1, 6), float("nan")))
    with pytest.raises(ValueError, match="two samples"):
        _ = moments(features[:1]).covariance


@pytest.mark.parametrize("count", [40, 5])  # 5 samples of 8 features: covariances without an inverse
def test_frechet_distance_is_the_one_with_a_matrix_square_root(count):
    one, other = correlated(count, 8, seed=0), correlated(count, 8, seed=1, shift=0.3)
    covariances = [np.cov(x.double().numpy().T) for x in (one, other)]
    shift = (one.double().mean(0) - other.double().mean(0)).square().sum()
    offset = 1e-12 * np.eye(8)  # sqrtm needs it where a matrix is singular
    root = sqrtm((covariances[0] + offset) @ (covariances[1] + offset)).real
    expected = float(shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root))
    assert frechet_distance(moments(one), moments(other)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(moments(other), moments(one)) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(moments(one), moments(one)) == pytest.approx(0, abs=1e-5 * expected)
