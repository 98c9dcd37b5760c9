"""Quantize to an even grid by arithmetic: the op behind LSQ, at any bit width."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.ops import fast, native, traced
from nulsq_cli.ops.remake import made_by, read_by_one_layer


def nearest(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The forward of `quantize_to_grid`, without a gradient."""
    if torch.compiler.is_compiling():
        return traced.grid(x, step, lowest, highest)
    loops = fast.loops(x, step, (lowest, highest))
    if loops is native:
        return native.quantize(x, step, (lowest, highest))
    if loops is not None:
        return loops.grid(x, step, lowest, highest)
    return (x / step).clamp_(lowest, highest).round_() * step


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
        ctx.save_for_backward(x, step)
        ctx.ends = lowest, highest  # type: ignore[attr-defined]
        return nearest(x, step, lowest, highest)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, step = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.compiler.is_compiling():
            return *traced.grid_backward(grad, x, step, *ctx.ends), None, None  # type: ignore[attr-defined]
        loops = None if torch.is_grad_enabled() else fast.loops(x, step, ctx.ends)  # as in codebook.py
        if loops is native:
            return *native.quantize_backward(grad, x, step, ctx.ends, spent=read_by_one_layer(ctx)), None, None  # type: ignore[attr-defined]
        backward = backward_eager if loops is None else loops.grid_backward
        return *backward(grad, x, step, *ctx.ends), None, None  # type: ignore[attr-defined]


def backward_eager(grad: Tensor, x: Tensor, step: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """The gradients of `quantize_to_grid`, step by step: the truth that fast paths are tested against.

    Returns:
        The gradient to x, and to the step; the latter is summed in float64.
    """
    place = x / step
    inside = (place >= lowest) & (place <= highest)
    pull = place.clamp(lowest, highest).round() - torch.where(inside, place, 0)
    over = None if step.numel() == 1 else list(range(1, x.ndim))
    to_step = (grad * pull).sum(over, dtype=torch.float64)
    return grad * inside, to_step.to(step.dtype).view(step.shape)


def quantize_to_grid(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """Map x to the nearest multiple of `step` between two ends, by the straight-through rule.

    Args:
        x: (...) in the layer's own units; NaN stays NaN.
        step: (1,), or (C, 1, ..., 1) with as many dimensions as x; positive, same units as x.
        lowest: the smallest integer code, 0 or negative.
        highest: the largest integer code.

    Returns:
        (...) like x; each entry is step * k with lowest <= k <= highest. A tie goes to the even k.
        Gradient to x: 1 inside the ends, 0 outside. Gradient to the step: round(x/step) - x/step
        inside, the end's code outside, summed over x.

    Raises:
        Nothing. A step that is not positive is prevented where steps are updated.

    Source: LSQ, arXiv:1902.08153, eq. 1-3.
    """
    return made_by(_StraightThrough.apply(x, step, lowest, highest), nearest, x, step, lowest, highest)
