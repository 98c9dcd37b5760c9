"""A ReLU and the quantizer that reads it as one operation: a tensor is read once for both, forward and backward.

Apart they are two passes forward. Backward they are three, for a ReLU's result is mostly read by a shortcut, too: the
quantizer's gradient is made, the shortcut's is added, and the ReLU masks the sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nulsq_cli.ops import codebook, fast, grid, native
from nulsq_cli.ops.remake import made_by, read_by_one_layer

Both = tuple[Tensor, Tensor]
"""The ReLU's result, and the same quantized."""

Kind = int | tuple[int, int] | None
"""What a table holds: levels (None), gaps of which so many lie below zero, or the step of a grid with these ends."""


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, table: Tensor, kind: Kind, inplace: bool) -> Both:
        y = x if inplace else torch.empty_like(x)
        if isinstance(kind, tuple):
            quantized = native.grid(x, table, *kind, relu=y)
        else:
            table = codebook.levels_of(table, kind)
            quantized = native.lookup(x, table, None, relu=y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, table)
        ctx.kind = kind  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return y, quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, others: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (y, table), kind = ctx.saved_tensors, ctx.kind  # type: ignore[attr-defined]
        if grad is None:
            return None if others is None else others.masked_fill(y <= 0, 0), None, None, None
        ends = kind if isinstance(kind, tuple) else ()
        if torch.is_grad_enabled() or fast.loops(y, table, grid=bool(ends), trained=True) is not native:  # as in codebook.py
            to_y, to_table = (grid if ends else codebook).backward_eager(grad, y, table, *ends)
            to_x = (to_y if others is None else to_y + others).masked_fill(y <= 0, 0)
        else:
            backward = native.grid_backward if ends else native.levels_backward
            to_x, to_table = backward(grad, y, table, *ends, spent=read_by_one_layer(ctx), behind_relu=True, others=others)
        return to_x, to_table if ends else codebook.to_table(to_table, kind), None, None


def relu_and_quantize(x: Tensor, table: Tensor, kind: Kind = None, *, inplace: bool = False) -> Both | None:
    """`relu(x)`, and that through `quantize_to_levels`, `quantize_by_gaps` or `quantize_to_grid`, with the gradients of both.

    Args:
        x: (...).
        table: levels, (K,); gaps, (1, K-1); or a step, (1,).
        kind: which of them.
        inplace: x becomes the ReLU's result.

    Returns:
        Both; None, and nothing is done, where no loop takes x.
    """
    grids = isinstance(kind, tuple)
    if not _taken(x, table, inplace, grid=grids, trained=True):
        return None
    y, quantized = _Both.apply(x, table, kind, inplace)
    return y, made_by(quantized, *((grid.nearest, y, table, *kind) if grids else (codebook.nearest, y, table, kind)))


def relu_and_lookup(x: Tensor, levels: Tensor, thresholds: Tensor, *, inplace: bool = False, alone: bool = False) -> Both | None:
    """`relu(x)`, and that through `codebook.lookup`, without a gradient; otherwise as `relu_and_quantize`.

    Args:
        x, levels, thresholds: as in `lookup`.
        inplace: x becomes the ReLU's result.
        alone: x becomes the quantized result, and stands for both: memory that need not be fetched saves most of the time.
    """
    if not _taken(x, levels, inplace):
        return None
    y = x if inplace else torch.empty_like(x)
    quantized = native.lookup(x, levels, thresholds, relu=y, into=y if alone else None)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return y, quantized


def _taken(x: Tensor, table: Tensor, inplace: bool, **asked: Any) -> bool:
    # Autograd knows no change in place of a view by an operation with two results.
    return fast.loops(x, table, **asked) is native and native.is_dense(x) and not (inplace and x._is_view())
