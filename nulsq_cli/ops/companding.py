"""Quantize through a learned piecewise linear curve: compress, round evenly, expand. The op behind LCQ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from nulsq_cli.ops.codebook import decode, encode, lookup, sum_by_code


def curve(theta: Tensor) -> tuple[Tensor, Tensor]:
    """The increasing curve from (0, 0) to (1, 1) with a knot at every multiple of 1/K.

    Args:
        theta: (C, K); the softmax of a row is how far the curve rises in each interval.

    Returns:
        Slopes and heights at the left knots, (C, K) both; differentiable.
    """
    rise = theta.softmax(1)
    return rise * theta.shape[1], pad(rise.cumsum(1)[:, :-1], (1, 0))


def expand(u: Tensor, slopes: Tensor, heights: Tensor) -> Tensor:
    """The inverse of the curve at u.

    Args:
        u: (N,) in 0..1.
        slopes, heights: (C, K), as from `curve`.

    Returns:
        (C, N) in 0..1.
    """
    knot = _knot_below(u, heights)
    return (u - heights.gather(1, knot)) / slopes.gather(1, knot) + knot / slopes.shape[1]


def _knot_below(u: Tensor, heights: Tensor) -> Tensor:
    return torch.searchsorted(heights.contiguous(), u.expand(len(heights), -1).contiguous(), right=True) - 1


def _heights_of_codes(gaps: int, like: Tensor) -> Tensor:
    return torch.arange(gaps + 1, dtype=like.dtype, device=like.device) / gaps


def unit_tables(slopes: Tensor, heights: Tensor, gaps: int) -> tuple[Tensor, Tensor]:
    """Levels (C, gaps + 1) from exactly 0 to exactly 1, and the thresholds (C, gaps) between them."""
    codes = _heights_of_codes(gaps, slopes)
    levels = expand(codes, slopes, heights)
    levels[:, -1] = 1
    return levels, expand((codes[1:] + codes[:-1]) / 2, slopes, heights)


def tables(
    clip: Tensor, slopes: Tensor, heights: Tensor, gaps: int, signed: bool, fine: int | None = None
) -> tuple[Tensor, Tensor]:
    """Levels (C, K) and thresholds (C, K-1) of `compand`, ascending; K is gaps + 1, or 2 * gaps + 1 when signed."""
    levels, thresholds = unit_tables(slopes, heights, gaps)
    if fine is not None:
        levels = (levels * fine).round() / fine
    levels, thresholds = clip[:, None] * levels, clip[:, None] * thresholds
    if not signed:
        return levels, thresholds
    return torch.cat((-levels[:, 1:].flip(1), levels), 1), torch.cat((-thresholds.flip(1), thresholds), 1)


class _Compand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        clip: Tensor,
        slopes: Tensor,
        heights: Tensor,
        gaps: int,
        signed: bool,
        fine: int | None,
    ) -> Tensor:
        ctx.save_for_backward(x, clip, slopes, heights)
        ctx.shape = gaps, signed  # type: ignore[attr-defined]
        levels, thresholds = tables(clip, slopes, heights, gaps, signed, fine)
        if len(levels) == 1:
            levels, thresholds = levels[0], thresholds[0]
        return lookup(x, levels, thresholds)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, clip, slopes, heights = ctx.saved_tensors  # type: ignore[attr-defined]
        return *backward_eager(grad, x, clip, slopes, heights, *ctx.shape), None, None, None  # type: ignore[attr-defined]


def backward_eager(
    grad: Tensor, x: Tensor, clip: Tensor, slopes: Tensor, heights: Tensor, gaps: int, signed: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `compand` to x, clip, slopes and heights; the last three are summed in float64."""
    knots = slopes.shape[1]
    rows, pulls = x.reshape(len(clip), -1), grad.reshape(len(clip), -1)
    reached = rows if signed else rows.clamp_min(0)
    place = reached.abs() / clip[:, None]
    inside = place < 1
    levels, thresholds = unit_tables(slopes, heights, gaps)
    code = encode(place, thresholds).long()
    value = decode(code, levels) * reached.sign()
    to_clip = (pulls * (value - torch.where(inside, reached / clip[:, None], 0))).sum(1, dtype=torch.float64)

    # What reaches the unit levels. Expanding has its derivative to the knots above each level, and
    # compressing its own to the knots above each x, divided by the slope of the expansion.
    push = torch.where(inside, pulls * reached.sign() * clip[:, None], 0)
    height = _heights_of_codes(gaps, slopes).expand(len(clip), -1)
    above = _knot_below(height[0], heights)
    slope = slopes.gather(1, above)
    by_code = sum_by_code(code, push, levels.shape)
    to_slopes = -sum_by_code(above, by_code * (height - heights.gather(1, above)) / slope**2, slopes.shape)
    to_heights = -sum_by_code(above, by_code / slope, slopes.shape)
    knot = (place * knots).long().clamp_(max=knots - 1)
    push = push / slope.gather(1, code)
    to_slopes += sum_by_code(knot, push * (place - knot / knots), slopes.shape)
    to_heights += sum_by_code(knot, push, slopes.shape)
    passes = inside if signed else inside & (rows >= 0)
    to_x = (pulls * passes).view(x.shape)
    return to_x, to_clip.to(x.dtype), to_slopes.to(x.dtype), to_heights.to(x.dtype)


def compand(
    x: Tensor, clip: Tensor, slopes: Tensor, heights: Tensor, gaps: int, signed: bool, fine: int | None = None
) -> Tensor:
    """Map x to the levels that are evenly spaced after compression by a curve.

    Args:
        x: (...), or (C, ...) when there is a curve per channel; NaN stays NaN.
        clip: (C,), positive: the highest level, where the curve ends, in units of x.
        slopes, heights: (C, K), as from `curve`.
        gaps: how many gaps there are from zero to the highest level.
        signed: whether the levels are mirrored at zero; else what is negative becomes 0.
        fine: round every level to a multiple of clip / fine, which no gradient sees; None does not.

    Returns:
        (...) like x: clip * expand(k / gaps) with the sign of x, where k is compress(|x| / clip) * gaps
        rounded. The gradient to x is 1 inside the clip, as if compressing and expanding undid each
        other; to clip, the level minus x, in units of the clip, inside, and the sign outside; to the
        curve, that of both its uses.

    Source: LCQ, arXiv:2103.07156, sections 3.1 and 3.2.
    """
    return _Compand.apply(x, clip, slopes, heights, gaps, signed, fine)
