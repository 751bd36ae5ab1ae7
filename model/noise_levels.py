"""Where the steps of a sampling run lie: the noise levels, noisiest first, and the timestep that each stands for.

n steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from model.config import SamplerName, Spacing
from model.diffusion import Diffusion


@dataclass(frozen=True)
class NoiseLevels:
    """The levels that a run steps through, noisiest first. Raises ValueError where they do not descend."""

    timesteps: tuple[float, ...]
    """What the network is told at each of n steps; between two timesteps of the schedule where a sigma lies there."""
    sigmas: tuple[float, ...]
    """Where each step starts, and where the last one ends: n + 1. The end is 0, or a level for others to go on from."""
    spacing: Spacing | None = None
    """How the run that they are, or are a part of, was spaced; None for levels that were picked by hand."""

    def __post_init__(self) -> None:
        if len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(f"{len(self.timesteps)} timesteps need one sigma more, and have {len(self.sigmas)}")
        if self.sigmas[-1] < 0 or any(here <= below for here, below in pairwise(self.sigmas)):
            rising = [pair for pair in pairwise(self.sigmas) if pair[0] <= pair[1]]
            raise ValueError(f"noise levels do not descend to 0: they go {rising}, and end at {self.sigmas[-1]}")

    def split(self, cutoff: float) -> tuple[NoiseLevels, NoiseLevels]:
        """The steps at timesteps >= cutoff, which end where the others start, and those others."""
        high = sum(timestep >= cutoff for timestep in self.timesteps)
        return (
            replace(self, timesteps=self.timesteps[:high], sigmas=self.sigmas[: high + 1]),
            replace(self, timesteps=self.timesteps[high:], sigmas=self.sigmas[high:]),
        )

    def tail(self, strength: float) -> NoiseLevels:
        """The last steps, a share of `strength` in (0, 1], rounded down as in the published image-to-image pipeline.

        Raises ValueError where no step is left.
        """
        steps = len(self.timesteps)
        kept = min(int(steps * strength), steps)
        if kept < 1:
            raise ValueError(f"strength {strength} of {steps} steps leaves none")
        return replace(self, timesteps=self.timesteps[steps - kept :], sigmas=self.sigmas[steps - kept :])


def noise_levels(
    steps: int,
    spacing: Spacing,
    diffusion: Diffusion,
    *,
    sampler: SamplerName = SamplerName.EULER,
    rho: float = 7.0,
    below: int | None = None,
) -> NoiseLevels:
    """`steps` levels down to 0, spaced over the whole schedule, or over its timesteps below `below`.

    The published DPM++ 2M has its own: leading timesteps as if there were one step more, which leaves out the lowest
    one, and timesteps of Karras's levels rounded to the schedule's. Raises ValueError where there are more steps than
    timesteps.
    """
    published_dpmpp = sampler == SamplerName.DPMPP_2M
    end = diffusion.config.num_timesteps if below is None else below
    if end > diffusion.config.num_timesteps:
        raise ValueError(f"timesteps below {end} of a schedule of {diffusion.config.num_timesteps}")
    if not 1 <= steps <= end:
        raise ValueError(f"{steps} steps over {end} timesteps")
    if spacing == Spacing.KARRAS:
        first, last = float(diffusion.sigmas[end - 1]), float(diffusion.sigmas[0])
        levels = levels_of(karras_sigmas(steps, first, last, rho), diffusion)
        if published_dpmpp:
            levels = replace(levels, timesteps=tuple(map(round, levels.timesteps)))
    elif spacing == Spacing.TRAILING:
        levels = levels_at(timesteps_trailing(steps, end), diffusion)
    elif published_dpmpp and steps < end:
        levels = levels_at(timesteps_leading(steps + 1, end)[:-1], diffusion)
    else:
        levels = levels_at(timesteps_leading(steps, end), diffusion)
    return replace(levels, spacing=Spacing(spacing))


def levels_at(timesteps: Sequence[int], diffusion: Diffusion) -> NoiseLevels:
    """The levels of descending timesteps of the schedule, down to 0."""
    return NoiseLevels(tuple(timesteps), (*(float(diffusion.sigmas[t]) for t in timesteps), 0.0))


def levels_of(sigmas: Sequence[float], diffusion: Diffusion) -> NoiseLevels:
    """The levels of descending sigmas, down to 0; their timesteps lie between two of the schedule, in log sigma.

    As in diffusers; sgm takes the nearest level of the schedule.
    """
    schedule = diffusion.sigmas.double().cpu().log()  # [num_timesteps], ascending
    at = torch.tensor(sigmas, dtype=torch.float64).log()  # [n]
    low = (torch.searchsorted(schedule, at, right=True) - 1).clamp(0, len(schedule) - 2)  # [n]
    share = (at - schedule[low]) / (schedule[low + 1] - schedule[low])  # [n]
    return NoiseLevels(tuple((low + share.clamp(0.0, 1.0)).tolist()), (*sigmas, 0.0))


def timesteps_leading(steps: int, num_timesteps: int = 1000, offset: int = 1) -> list[int]:
    """`steps` descending timesteps, evenly spaced from `offset` on, or from below it where they need all timesteps.

    They skip the noisiest. The published pipeline's Euler and DDIM have the same.
    """
    ratio = num_timesteps // steps
    first = min(offset, num_timesteps - 1 - (steps - 1) * ratio)
    return [k * ratio + first for k in reversed(range(steps))]


def timesteps_trailing(steps: int, num_timesteps: int = 1000) -> list[int]:
    """`steps` descending timesteps, evenly spaced and starting at the noisiest (arXiv 2305.08891, 3.3).

    For 50 steps they are those of sgm's default. The spacing is rounded as by numpy.arange, with which diffusers makes
    its own: it tells where those end up that lie half-way, as some of 48 steps do.
    """
    spacing = num_timesteps - (num_timesteps - num_timesteps / steps)
    return [round(num_timesteps - k * spacing) - 1 for k in range(steps)]


def karras_sigmas(steps: int, first: float, last: float, rho: float = 7.0) -> list[float]:
    """`steps` sigmas from `first` down to `last`, evenly spaced in their rho-th root (arXiv 2206.00364, eq. 5)."""
    if steps == 1:
        return [first]
    top, bottom = first ** (1.0 / rho), last ** (1.0 / rho)
    between = [(top + k / (steps - 1) * (bottom - top)) ** rho for k in range(1, steps - 1)]
    return [first, *between, last]  # the ends to the bit: the first one tells whether there is a signal
