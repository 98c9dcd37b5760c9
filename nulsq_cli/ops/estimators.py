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


class _Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`: value and derivative of a quantizer, each by its own formula.

    Args:
        value: (...); nothing flows back through it.
        surrogate: (...) of the same shape, what the backward pass takes the quantizer to be: x itself
            for the identity gradient, the clipped x for the clipped one.
    """
    return _Borrowed.apply(value.detach(), surrogate)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, high = ctx.saved_tensors  # type: ignore[attr-defined]
        below, above = x < low, x >= high
        to_ends = [(grad * side).sum(dtype=torch.float64).to(low.dtype).view(low.shape) for side in (below, above)]
        return grad * ~(below | above), *to_ends


def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x held between two ends that learn from what they hold back.

    Args:
        x: (...); NaN stays NaN.
        low, high: (1,), low < high, same units as x.

    Returns:
        (...). Gradient to x: 1 where low <= x < high, else 0. To an end: the sum over the entries that
        it holds back, in float64.

    Source: PACT, arXiv:1805.06085, eq. 1-3.
    """
    return _Clip.apply(x, low, high)


class _ToUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return ((x - low) / (high - low)).clamp_(0, 1)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, high = ctx.saved_tensors  # type: ignore[attr-defined]
        place = (x - low) / (high - low)
        grad = grad * ((place >= 0) & (place <= 1)) / (high - low)
        weighted = (grad * place).sum(dtype=torch.float64)
        to_low = weighted - grad.sum(dtype=torch.float64)
        return grad, to_low.to(low.dtype).view(low.shape), -weighted.to(low.dtype).view(low.shape)


def to_unit(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """clip((x - low) / (high - low), 0, 1): the place of x in a learned interval.

    Args:
        x: (...); NaN stays NaN.
        low, high: (1,), low < high, same units as x.

    Returns:
        (...) in [0, 1]. All gradients are those of the affine map for x in the interval, 0 for x
        outside; those to the ends are summed in float64.

    Source: EWGS, arXiv:2104.00903, eq. 1.
    """
    return _ToUnit.apply(x, low, high)


class _RoundUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, place: Tensor, gaps: int, delta: Tensor | None) -> Tensor:
        rounded = (place * gaps).round_() / gaps
        ctx.save_for_backward(*(() if delta is None else (delta, place - rounded)))
        return rounded

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.saved_tensors:  # type: ignore[attr-defined]
            return grad, None, None
        delta, error = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * (1 + delta * grad.sign() * error), None, None


def round_unit(place: Tensor, gaps: int, delta: Tensor | None = None) -> Tensor:
    """Round places in [0, 1] to the nearest multiple of 1/gaps; a tie goes to the even one.

    Args:
        place: (...) in [0, 1].
        gaps: the number of levels less one.
        delta: (), how much a gradient grows with its entry's rounding error; None is the plain straight-through rule.

    Returns:
        (...). Gradient: g * (1 + delta * sign(g) * (place - rounded)).

    Source: EWGS, arXiv:2104.00903, eq. 4; without delta: DoReFa-Net, arXiv:1606.06160, eq. 5.
    """
    return _RoundUnit.apply(place, gaps, delta)


def from_unit(place: Tensor, signed: bool) -> Tensor:
    """Places in [0, 1] as they are, or stretched to [-1, 1] if signed."""
    return 2 * place - 1 if signed else place
