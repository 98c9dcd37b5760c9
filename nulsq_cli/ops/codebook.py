"""Quantize to any sorted levels: the op behind nuLSQ and every method whose levels are a table."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from nulsq_cli.ops import fast, native, traced
from nulsq_cli.ops.remake import made_by, read_by_one_layer


def midpoints(levels: Tensor) -> Tensor:
    """The boundaries of nearest-level rounding: (..., K) levels give (..., K-1) thresholds."""
    return (levels[..., 1:] + levels[..., :-1]) / 2


def middles(thresholds: Tensor) -> Tensor:
    """The middle of every bin: (..., K-1) thresholds, at least two, give (..., K) points.

    The two outer bins have no end; each is taken to be as wide as its neighbour.
    """
    inner = midpoints(thresholds)
    low = 2 * thresholds[..., :1] - inner[..., :1]
    high = 2 * thresholds[..., -1:] - inner[..., -1:]
    return torch.cat((low, inner, high), -1)


def levels_around_zero(gaps: Tensor, negative: int) -> Tensor:
    """Sorted levels from the gaps between them, with a level that is exactly 0.

    Args:
        gaps: (C, N), positive, from the lowest gap to the highest.
        negative: how many of the N gaps lie below zero.

    Returns:
        (C, N + 1); column `negative` is 0.
    """
    return _Around.apply(gaps, negative) if gaps.requires_grad and torch.is_grad_enabled() else _around(gaps, negative)


class _Around(torch.autograd.Function):
    """One operation for autograd instead of ten: there are two of these in every layer, however small it is."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gaps: Tensor, negative: int) -> Tensor:
        ctx.negative = negative  # type: ignore[attr-defined]
        return _around(gaps, negative)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _around_backward(grad, ctx.negative), None  # type: ignore[attr-defined]


def _around(gaps: Tensor, negative: int) -> Tensor:
    if not torch.compiler.is_compiling() and fast.readable(gaps):
        return native.around(gaps, negative)
    above = pad(gaps[:, negative:].cumsum(1), (1, 0))
    if not negative:
        return above
    return torch.cat((-gaps[:, :negative].flip(1).cumsum(1).flip(1), above), 1)


def _around_backward(grad: Tensor, negative: int) -> Tensor:
    recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()  # as in _StraightThrough
    if not recorded and fast.readable(grad):
        return native.around_backward(grad, negative)
    above = grad[:, negative + 1 :].flip(1).cumsum(1).flip(1)  # a gap moves all levels beyond it
    return torch.cat((-grad[:, :negative].cumsum(1), above), 1) if negative else above


def levels_of(table: Tensor, negative: int | None) -> Tensor:
    """The levels that a table stands for, (K,) or (C, K): those of its gaps, (C, K-1), if `negative` of them lie below zero."""
    if negative is None:
        return table
    levels = _around(table, negative)
    return levels[0] if len(levels) == 1 else levels


def _to_table(to_levels: Tensor, negative: int | None) -> Tensor:
    if negative is None:
        return to_levels
    return _around_backward(to_levels if to_levels.ndim == 2 else to_levels[None], negative)


def encode(x: Tensor, thresholds: Tensor) -> Tensor:
    """The code of every entry: how many thresholds lie strictly below it, so a tie goes down.

    Args:
        x: (...), or (C, ...) when thresholds are per channel.
        thresholds: (K-1,) or (C, K-1), ascending.

    Returns:
        uint8, shaped like x, in 0..K-1. NaN gets the last code.
    """
    if thresholds.ndim == 1:
        return torch.bucketize(x.contiguous(), thresholds, out_int32=True).to(torch.uint8)
    rows = x.reshape(x.shape[0], -1).contiguous()
    return torch.searchsorted(thresholds, rows, out_int32=True).to(torch.uint8).view(x.shape)


def decode(codes: Tensor, levels: Tensor) -> Tensor:
    """The level of every code; the inverse of `encode` on the levels themselves.

    Args:
        codes: (...) integers in 0..K-1, or (C, ...) when levels are per channel.
        levels: (K,) or (C, K).
    """
    if levels.ndim == 1:
        return levels[codes.int()]
    return levels.gather(1, codes.reshape(codes.shape[0], -1).long()).view(codes.shape)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, codes: Tensor, levels: Tensor) -> Tensor:
        ctx.save_for_backward(codes, levels)
        return decode(codes, levels)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor]:
        codes, levels = ctx.saved_tensors  # type: ignore[attr-defined]
        return None, sum_by_code(codes, grad, levels.shape).to(levels.dtype)


def decode_with_gradient(codes: Tensor, levels: Tensor) -> Tensor:
    """`decode`, where each level gets the gradient of all entries of its code, summed in float64 and in a fixed order."""
    return _Decode.apply(codes, levels)


def sum_by_code(codes: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """Add up what shares a code.

    Args:
        codes: (...) integers in 0..K-1, or (C, ...) for tables per channel.
        values: like codes.
        shape: of the table, (K,) or (C, K).

    Returns:
        float64, (K,) or (C, K), the same bits in every run.
    """
    tables, count = shape.numel() // shape[-1], shape[-1]
    places, rows = codes.reshape(tables, -1), values.reshape(tables, -1)
    if places.is_cuda:  # bincount adds by atomics there: another order, other bits, in every run
        sums = [torch.where(places == k, rows, 0).sum(1, dtype=torch.float64) for k in range(count)]
        return torch.stack(sums, 1).view(shape)
    places = places.long() + torch.arange(tables, device=places.device)[:, None] * count
    return torch.bincount(places.flatten(), rows.flatten().double(), minlength=tables * count).double().view(shape)


def lookup(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Quantize without a gradient: `decode(encode(x))`, and NaN stays NaN."""
    if torch.compiler.is_compiling():
        return traced.lookup(x, levels, thresholds)
    loops = fast.loops(x, levels)
    if loops is native:
        return native.quantize(x, levels, None, thresholds)
    if loops is not None:
        return loops.lookup(x, levels, thresholds)
    return torch.where(x.isnan(), x, decode(encode(x, thresholds), levels))


def nearest(x: Tensor, table: Tensor, negative: int | None = None) -> Tensor:
    """The forward of `quantize_to_levels` or, with gaps, of `quantize_by_gaps`; without a gradient."""
    if not torch.compiler.is_compiling() and fast.loops(x, table, negative) is native:
        return native.quantize(x, table, negative)
    levels = levels_of(table, negative)
    return lookup(x, levels, midpoints(levels))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, table: Tensor, negative: int | None) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.negative = negative  # type: ignore[attr-defined]
        return nearest(x, table, negative)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, table), negative = ctx.saved_tensors, ctx.negative  # type: ignore[attr-defined]
        # A derivative of this derivative is asked for where gradients are recorded: the eager function has one.
        recorded = torch.compiler.is_compiling() or torch.is_grad_enabled()
        loops = None if recorded else fast.loops(x, table, negative, trained=True)
        if loops is native:
            return *native.quantize_backward(grad, x, table, negative, spent=read_by_one_layer(ctx)), None
        return *backward_by(grad, x, table, negative, loops), None


def backward_by(grad: Tensor, x: Tensor, table: Tensor, negative: int | None,
                loops: ModuleType | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients to x and to levels or gaps, by the loops of a compiler or, without, by `backward_eager`."""
    levels = levels_of(table, negative)
    if torch.compiler.is_compiling():
        to_x, to_levels = traced.levels_backward(grad, x, levels)
    else:
        to_x, to_levels = (backward_eager if loops is None else loops.levels_backward)(grad, x, levels)
    return to_x, _to_table(to_levels, negative)


def backward_eager(grad: Tensor, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `quantize_to_levels`, step by step: the truth that fast paths are tested against.

    Args:
        grad: gradient of the loss to the output, shaped like x.
        x: (...) or (C, ...).
        levels: (K,) or (C, K).

    Returns:
        The gradient to x, and to the levels; the latter is summed in float64 and in a fixed order.
    """
    table = levels if levels.ndim == 2 else levels[None]
    rows, slopes = x.reshape(len(table), -1).contiguous(), grad.reshape(len(table), -1)
    count = table.shape[1]
    # upper: the first level that is not below x, so x lies in the gap (levels[upper-1], levels[upper]].
    upper = torch.searchsorted(table, rows).clamp_(1, count - 1)
    low, high = table.gather(1, upper - 1), table.gather(1, upper)
    below, above = rows < table[:, :1], rows > table[:, -1:]
    inside = ~(below | above)
    closer = torch.where(rows > (low + high) / 2, high, low)
    # round(u) - u, where u is the place inside the gap. Not subtracting u first keeps exact levels at 0.
    pull = torch.where(inside, (closer - rows) / (high - low).clamp_min(1e-30), 0) * slopes

    to_levels = sum_by_code(upper, pull, table.shape) - sum_by_code(upper - 1, pull, table.shape)
    to_levels[:, 0] += (slopes * below).sum(1, dtype=torch.float64)
    to_levels[:, -1] += (slopes * above).sum(1, dtype=torch.float64)
    return (slopes * inside).view(x.shape), to_levels.to(levels.dtype).view(levels.shape)


def quantize_to_levels(x: Tensor, levels: Tensor) -> Tensor:
    """Map x to the nearest of some sorted levels, by the straight-through rule.

    Args:
        x: (...) in the layer's own units, or (C, ...) when levels are per channel; NaN stays NaN.
        levels: (K,) or (C, K), ascending, same units as x.

    Returns:
        (...) like x; each entry is a level. A tie goes to the lower level.
        Gradient to x: 1 inside [levels[0], levels[-1]], 0 outside. Gradient to the levels:
        round(u) - u to the upper and its negative to the lower neighbour of each x (u its place
        in the gap, 0 to 1); 1 to the end level from each x beyond it.

    Raises:
        Nothing. Unsorted levels are refused where they are made, not here.

    Source: nuLSQ, ACCV 2024; with even levels, LSQ, arXiv:1902.08153, eq. 3.
    """
    return made_by(_StraightThrough.apply(x, levels, None), nearest, x, levels)


def quantize_by_gaps(x: Tensor, gaps: Tensor, negative: int) -> Tensor:
    """`quantize_to_levels` of `levels_around_zero(gaps, negative)`, as one operation, with the gradient to the gaps.

    Args:
        x: (...), or (C, ...) where there are gaps per channel.
        gaps: (C, N); C is 1, or the number of channels.
        negative: how many of the N gaps lie below zero.
    """
    return made_by(_StraightThrough.apply(x, gaps, negative), nearest, x, gaps, negative)
