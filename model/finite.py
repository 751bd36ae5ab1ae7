"""float16 says when it has overflowed."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFiniteError(FloatingPointError):
    """Samples of a batch came out infinite or as no number."""

    def __init__(self, what: str, samples: tuple[int, ...]) -> None:
        super().__init__(
            f"{what} overflowed in float16 for samples {', '.join(map(str, samples))} of the batch; "
            "run the network in bfloat16 or float32"
        )
        self.samples = samples
        """Their places in the batch."""


def require_finite(x: Tensor, what: str) -> Tensor:
    """`x` [B,..] as it is; raises NotFiniteError where it is float16 and not finite.

    Only in float16: its range ends at 65,504, which the published VAE's activations pass. bfloat16 and float32 reach
    3e38, so there only weights or inputs that are not finite themselves come out so, and the look at the result would
    make the host wait for the device at every call.
    """
    if x.dtype == torch.float16:
        bad = ~x.isfinite().flatten(1).all(1)  # [B]
        if bool(bad.any()):
            raise NotFiniteError(what, tuple(bad.nonzero().flatten().tolist()))
    return x
