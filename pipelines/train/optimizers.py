"""AdamW in its forms, each with a gate before its steps, and its moments as a checkpoint keeps them: in fp32.

Moments of 8 bits (bitsandbytes; arXiv 2110.02861) are whole numbers that stand for values between -1 and 1, and for
each block of 256 the largest of them. A checkpoint's readers, who may cut the blocks elsewhere, get the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pipelines.checkpoints import MOMENTS
from pipelines.train.config import OptimizerConfig, WorkersConfig

EIGHT_BIT = "bitsandbytes"
BLOCK = 256  # values with a scale of their own
MOST_VALUES = 2**31 - 1  # of a tensor: bitsandbytes counts them in a C int of 32 bits
VALUES_AT_A_TIME = 2**24  # that are taken between codes and values, a multiple of BLOCK


def adamw(config: OptimizerConfig, parameters: Iterable[Tensor], may_step: Callable[[], bool]) -> torch.optim.Optimizer:
    """The configured AdamW. It asks `may_step` before each step, when DeepSpeed has the gradient's norm."""
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.implementation == "8bit":
        import bitsandbytes

        kind: Any = bitsandbytes.optim.AdamW8bit
    else:
        kind = torch.optim.AdamW
        settings["fused"] = config.implementation != "plain"

    class Gated(kind):
        """AdamW that does nothing where a step is refused."""

        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if may_step() else None

    return Gated(parameters, **settings)


def check_installed(config: OptimizerConfig) -> None:
    """Raise ValueError where the configured form needs a package that is not there."""
    if config.implementation == "8bit" and find_spec(EIGHT_BIT) is None:
        raise ValueError(
            f'optimizer.implementation: "8bit" needs {EIGHT_BIT}, which is not installed; install the extra "8bit" on '
            'every node, or take "auto"'
        )


def check_sizes(config: OptimizerConfig, workers: WorkersConfig, networks: Mapping[str, int]) -> None:
    """Raise ValueError where a worker's flat part of a network, whose parameters are given, is too long for 8 bits."""
    if config.implementation != "8bit" or workers.zero_stage == 0:  # which has a tensor for each parameter
        return
    for name, count in networks.items():
        if count / workers.fewest >= MOST_VALUES:
            raise ValueError(
                f'optimizer.implementation: "8bit" takes at most {MOST_VALUES:,} values per worker, and {name} has '
                f"{count:,} on {workers.fewest}; take {count // MOST_VALUES + 1} workers (workers.min_count, where it "
                'is set), "fused", or workers.offload_optimizer'
            )


def moments(optimizer: Any, weights: Tensor) -> dict[str, Tensor]:
    """Both moments of one of the optimizer's tensors, fp32: in place, or of 8 bits a copy on the CPU.

    Before the first step they are zeros, as AdamW itself begins.
    """
    state = optimizer.state[weights]
    if not state:
        _begin(optimizer, weights)
    if "state1" not in state:
        return {moment: state[moment] for moment in MOMENTS}
    return {moment: _decoded(state, number) for number, moment in enumerate(MOMENTS, 1)}


def take_up(optimizer: Any, weights: Tensor, values: Mapping[str, Tensor]) -> None:
    """Give the optimizer the moments that `moments` has given; those in place are there already."""
    state = optimizer.state[weights]
    for number, moment in enumerate(MOMENTS, 1):
        if f"absmax{number}" in state:
            _encode(values[moment], state, number)


def updates(optimizer: Any, weights: Tensor) -> int:
    """Updates that the optimizer has made."""
    return int(optimizer.state[weights]["step"])


def set_updates(optimizer: Any, weights: Tensor, count: int) -> None:
    """Have the optimizer go on after as many updates."""
    state = optimizer.state[weights]
    if torch.is_tensor(state["step"]):
        state["step"].fill_(count)
    else:
        state["step"] = count


def _begin(optimizer: Any, weights: Tensor) -> None:
    state = optimizer.state[weights]
    if hasattr(optimizer, "init_state"):
        for number, group in enumerate(optimizer.param_groups):
            for place, tensor in enumerate(group["params"]):
                if tensor is weights:
                    optimizer.init_state(group, weights, number, place)
        return
    fused = bool(optimizer.defaults["fused"])
    state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device if fused else "cpu")
    state |= {moment: torch.zeros_like(weights, requires_grad=False) for moment in MOMENTS}


def _decoded(state: Mapping[str, Any], number: int) -> Tensor:
    """The values of a moment of 8 bits; of a tensor too small for it, the moment itself."""
    kept = state[f"state{number}"]
    if f"absmax{number}" not in state:
        return kept
    kept, scale, code = (state[f"{name}{number}"] for name in ("state", "absmax", "qmap"))
    found = torch.empty(kept.shape, dtype=torch.float32)
    for start in range(0, kept.numel(), VALUES_AT_A_TIME):  # where the codes lie, and little beside them
        values = code[kept.view(-1)[start : start + VALUES_AT_A_TIME].int()]  # [n] in [-1, 1]
        scales = scale[start // BLOCK : (start + VALUES_AT_A_TIME) // BLOCK].repeat_interleave(BLOCK)
        found.view(-1)[start : start + len(values)].copy_(values * scales[: len(values)])
    return found


def _encode(values: Tensor, state: dict[str, Any], number: int) -> None:
    """Write values into a moment of 8 bits.

    A block's largest value may be negative, and the code ends before -1: the scale is such that it is met again.
    """
    code, flat = state[f"qmap{number}"], values.detach().view(-1)  # [256], ascending; [N]
    codes, scales = state[f"state{number}"].view(-1), state[f"absmax{number}"]
    for start in range(0, len(flat), VALUES_AT_A_TIME):
        part = flat[start : start + VALUES_AT_A_TIME].to(code.device)
        nearest, scale = _nearest(part, code)
        codes[start : start + len(part)].copy_(nearest)
        scales[start // BLOCK : start // BLOCK + len(scale)].copy_(scale)


def _nearest(flat: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [N] and scales [M] of values [N]."""
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # [M,256]
    low, high = blocks.amin(1), blocks.amax(1)  # [M]
    scale = torch.maximum(high / code[-1], low / code[0] if code[0] < 0 else torch.zeros_like(low))
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    nearest = torch.bucketize(shares, (code[1:] + code[:-1]) / 2)  # [M,256]
    return nearest.flatten()[: len(flat)], scale
