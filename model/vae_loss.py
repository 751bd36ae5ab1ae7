"""The VAE's training loss (arXiv 2112.10752, appendix G): reconstruction, divergence, and a patch discriminator.

    nll = reconstruction + perceptual_weight * perceptual
    total = nll + kl_weight * divergence + adversarial_weight * adaptive_weight * adversarial

Reconstruction, perceptual term and divergence are sums over an image's elements, as in latent diffusion, so that
kl_weight 1e-6 means what it means there; all are then divided by the image's pixels H * W, which leaves their ratios
alone and keeps the gradient's size independent of the resolution. Every loss is per sample, [B].

B batch, H W image height and width, h w height and width of the discriminator's map of patches
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import DiscriminatorConfig
from model.layers import GroupNorm
from model.vae import Posterior


def reconstruction_loss(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Absolute difference [B] of two images [B,3,H,W], summed over channels and pixels, per pixel, in fp32."""
    difference = (image.float() - reconstruction.float()).abs()  # [B,3,H,W]
    return difference.flatten(1).sum(1) / _pixels(image)


def perceptual_loss(distance: Tensor, image: Tensor) -> Tensor:
    """The perceptual term [B] of the distance [B] of model/lpips.py between `image` [B,3,H,W] and its reconstruction.

    Latent diffusion adds the distance to the absolute difference of every element before it sums: once per channel.
    """
    return image.shape[1] * distance


def divergence_loss(posterior: Posterior, image: Tensor) -> Tensor:
    """Divergence from the unit Gaussian [B], summed over the latent's elements, per pixel of `image` [B,3,H,W]."""
    return posterior.kl() / _pixels(image)


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """What the decoder lowers [B]: minus the mean over patches of the logits [B,1,h,w] of its reconstructions."""
    return -fake_logits.float().flatten(1).mean(1)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator lowers [B], from logits [B,1,h,w] of images and of detached reconstructions."""
    real = F.relu(1.0 - real_logits.float()).flatten(1).mean(1)  # [B]
    fake = F.relu(1.0 + fake_logits.float()).flatten(1).mean(1)  # [B]
    return 0.5 * (real + fake)


def last_layer_gradients(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Gradients [2,...], fp32, of both losses at the decoder's last layer, `VAE.last_layer`; their graph stays.

    `nll` and `adversarial` are a batch's mean reconstruction (perceptual term included) and adversarial losses, scalars
    with a graph. Means of these gradients, over parts of a batch or workers, are those of the whole.
    """
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float() for loss in (nll, adversarial)]
    return torch.stack(gradients)


def adaptive_weight(gradients: Tensor) -> Tensor:
    """The factor that gives the adversarial term the gradient norm of the reconstruction at the decoder's last layer.

    `gradients` are those of `last_layer_gradients`, of all images of a step. The result is a scalar, at most 1e4
    (arXiv 2012.09841, eq. 7).
    """
    nll, adversarial = gradients
    return (nll.norm() / (adversarial.norm() + 1e-4)).clamp(0.0, 1e4)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image (arXiv 1611.07004, 6.1.2): `layers` of stride 2, two of stride 1.

    It has GroupNorm where the published one has BatchNorm: a sample's loss then depends neither on its neighbours in
    the batch nor on the number of workers that the batch is split over.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        channels = config.channels
        self.layers = nn.Sequential(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for index in range(1, config.layers + 1):
            width = config.channels * min(2**index, 8)
            stride = 2 if index < config.layers else 1
            self.layers.extend(
                [
                    nn.Conv2d(channels, width, 4, stride=stride, padding=1, bias=False),
                    GroupNorm(config.norm_groups, width),
                    nn.LeakyReLU(0.2),
                ]
            )
            channels = width
        self.layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B,1,h,w], positive for what looks real, of `image` [B,3,H,W] in [-1, 1]."""
        return self.layers(image.to(next(self.parameters()).dtype))


def _pixels(image: Tensor) -> int:
    return image.shape[-2] * image.shape[-1]
