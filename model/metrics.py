"""How near two images are (PSNR, SSIM), and how near two sets of images are (the Frechet distance of their features).

B batch, N samples, D feature width, H W image height and width
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import SSIM_WINDOW

LEAST_ERROR = 1e-10  # equal images are at 100 dB, and a mean over many stays finite
DEVIATION = 1.5  # pixels, of the Gaussian window (Wang et al. 2004, 3.2)
C1, C2 = 0.01**2, 0.03**2  # keep the quotients from dividing by zero, for values in [0, 1] (likewise)


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of images [B,3,H,W] in [-1, 1]; at most 100, which equal images have."""
    error = (_unit(image) - _unit(other)).square().flatten(1).mean(1)  # [B]
    return -10 * error.clamp(min=LEAST_ERROR).log10().float()


def ssim(image: Tensor, other: Tensor) -> Tensor:
    """Structural similarity [B], at most 1, of images [B,3,H,W] in [-1, 1] (Wang et al. 2004, eq. 13).

    The mean over colours and over all places where the window of 11 x 11 pixels lies inside the image. Raises
    ValueError for smaller images.
    """
    if min(image.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"images {tuple(image.shape)}: sides must have {SSIM_WINDOW} pixels or more")
    x, y = _unit(image), _unit(other)
    mean_x, mean_y = _window(x), _window(y)  # [B,3,H-10,W-10]
    variance_x = _window(x * x) - mean_x.square()
    variance_y = _window(y * y) - mean_y.square()
    covariance = _window(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x.square() + mean_y.square() + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).flatten(1).mean(1).float()


class Moments:
    """Mean and covariance of features that come in parts, in float64; the parts' order and size do not matter."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)  # [D]
        self._scatter = torch.zeros(width, width, dtype=torch.float64)  # [D,D] sum of products of deviations

    def add(self, features: Tensor) -> None:
        """Take in features [N,D] (Chan, Golub and LeVeque 1983, eq. 2.1). Raises ValueError where one is not finite."""
        if not len(features):
            return
        if not features.isfinite().all():
            raise ValueError(f"features of {len(features)} images: some are not finite")
        features = features.double().cpu()
        mean = features.mean(0)  # [D]
        deviations, shift = features - mean, mean - self.mean  # [N,D], [D]
        total = self.count + len(features)
        self._scatter += deviations.T @ deviations + torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """[D,D], over count - 1. Raises ValueError for fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two samples or more, and there are {self.count}")
        return self._scatter / (self.count - 1)

    def state(self) -> dict[str, Tensor]:
        """Tensors that `restored` takes."""
        return {"count": torch.tensor(self.count), "mean": self.mean, "scatter": self._scatter}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Moments:
        """The moments of a `state`."""
        moments = cls(len(state["mean"]))
        moments.count, moments.mean, moments._scatter = int(state["count"]), state["mean"], state["scatter"]
        return moments


def frechet_distance(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6); of Inception's features it is the FID.

    |m1 - m2|^2 + tr(C1) + tr(C2) - 2 tr((C1^1/2 C2 C1^1/2)^1/2), whose last term needs eigenvalues of symmetric
    matrices alone. It falls with the number of samples, so only distances over equally many compare.
    """
    first, second = one.covariance, other.covariance  # [D,D]
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # [D,D]
    product = root @ second @ root
    crossed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (one.mean - other.mean).square().sum()
    return float((shift + first.trace() + second.trace() - 2 * crossed).clamp(min=0))


def _unit(image: Tensor) -> Tensor:
    """An image in [-1, 1], clipped, as values in [0, 1] and float64."""
    return (image.double().clamp(-1, 1) + 1) / 2


def _window(image: Tensor) -> Tensor:
    """Gaussian-weighted means [B,C,H-10,W-10] of the windows of an image [B,C,H,W]."""
    place = torch.arange(SSIM_WINDOW, dtype=image.dtype, device=image.device) - SSIM_WINDOW // 2
    weights = torch.exp(-place.square() / (2 * DEVIATION**2))
    weights = weights / weights.sum()
    channels = image.shape[1]
    down = F.conv2d(image, weights.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(down, weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
