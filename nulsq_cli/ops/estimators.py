"""Small rules about gradients that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None  # type: ignore[attr-defined]


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself, with its gradient multiplied by `factor`.

    Source: LSQ, arXiv:1902.08153, section 2.2. Optimizers that normalise gradients (Adam) undo it.
    """
    return x if factor == 1 else _ScaledGradient.apply(x, factor)
