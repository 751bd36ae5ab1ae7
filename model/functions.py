"""Operations of the networks whose backward pass keeps less, in eager mode, than that of plain torch.

Compiled, and under torch.func, they are plain torch: inductor plans what to keep by itself, and torch.func transforms
what it can look into.

B batch, C channels
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm (arXiv 1803.08494) of `x` [B,C,..], to the same type and memory format; computed in fp32 at least.

    Some kernels round mean and deviation of a float16 or bfloat16 map to its type: in bf16, where the mean is ten
    deviations, the result then shifts by 2% of one.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return F.group_norm(x, groups, weight, bias, eps)
    if _looked_into():
        return F.group_norm(x.float(), groups, weight.float(), bias.float(), eps).to(x.dtype)
    if x.device.type == "cpu":  # whose kernel computes in the type of the weights
        return F.group_norm(x, groups, weight.float(), bias.float(), eps)
    return GroupNormFunction.apply(x, groups, weight, bias, eps)


def gate(halves: Tensor) -> Tensor:
    """The first half of the last axis times the exact GELU of the second: [..,2C] to [..,C] (arXiv 2002.05202)."""
    return plain_gate(halves) if _looked_into() else GateFunction.apply(halves)


def plain_gate(halves: Tensor) -> Tensor:
    """`gate` in plain torch, which keeps gelu(b) beside its input."""
    a, b = halves.chunk(2, dim=-1)
    return a * F.gelu(b)


class GroupNormFunction(torch.autograd.Function):
    """`group_norm` of a float16 or bfloat16 map through a copy in fp32, which is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # noqa: PLR0917
        """[B,C,..] to the same."""
        batch, channels, size = len(x), x.shape[1], x.shape[2:].numel()
        ctx.sizes = batch, channels, size, groups
        result, mean, rstd = torch.native_group_norm(
            x.float(), weight.float(), bias.float(), batch, channels, size, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return torch.empty_like(x).copy_(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of map, weight and bias, each in its type."""
        _first_order_only()
        x, weight, mean, rstd = ctx.saved_tensors
        to_result = torch.empty_like(x, dtype=torch.float32).copy_(gradient)  # in the map's memory format
        for_x, _, for_weight, for_bias, _ = ctx.needs_input_grad
        to_x, to_weight, to_bias = torch.ops.aten.native_group_norm_backward(
            to_result, x.float(), mean, rstd, weight.float(), *ctx.sizes, (for_x, for_weight, for_bias)
        )
        return (
            torch.empty_like(x).copy_(to_x) if for_x else None,
            None,
            to_weight.to(weight.dtype) if for_weight else None,
            to_bias.to(weight.dtype) if for_bias else None,
            None,
        )


class GateFunction(torch.autograd.Function):
    """`gate` that keeps its input alone for the backward pass.

    Plain torch keeps gelu(b) as well, a seventh of what a transformer block keeps, and copies to join two gradients.
    """

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        """[..,2C] to [..,C]."""
        ctx.save_for_backward(halves)
        return plain_gate(halves)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """[..,C] to [..,2C]."""
        _first_order_only()
        (halves,) = ctx.saved_tensors
        a, b = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        to_a, to_b = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(b), out=to_a)
        torch.ops.aten.gelu_backward(gradient * a, b, grad_input=to_b)
        return result


def _looked_into() -> bool:
    """Whether a compiler or a transform of torch.func is to see what an operation consists of."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _first_order_only() -> None:
    """Raise where a backward pass is to be differentiated itself: these would leave terms out without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "layers of U-Net and VAE have first derivatives only: leave create_graph out, or take others by torch.func"
        )
