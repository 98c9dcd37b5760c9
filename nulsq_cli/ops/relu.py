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

Ends = tuple[int, int] | None
"""Of an even grid, its lowest and highest code; None where the table holds levels."""


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, table: Tensor, ends: Ends, inplace: bool) -> Both:
        y = x if inplace else torch.empty_like(x)
        quantized = native.lookup(x, table, None, relu=y) if ends is None else native.grid(x, table, *ends, relu=y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, table)
        ctx.ends = ends  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return y, quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, others: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        y, table = ctx.saved_tensors  # type: ignore[attr-defined]
        if grad is None:
            return None if others is None else others.masked_fill(y <= 0, 0), None, None, None
        backward, ends = (codebook.backward_eager, ()) if ctx.ends is None else (grid.backward_eager, ctx.ends)  # type: ignore[attr-defined]
        if torch.is_grad_enabled() or fast.loops(y, table, grid=bool(ends), trained=True) is not native:  # as in codebook.py
            to_y, to_table = backward(grad, y, table, *ends)
            to_y = to_y if others is None else to_y + others
            return to_y.masked_fill(y <= 0, 0), to_table, None, None
        backward = native.grid_backward if ends else native.levels_backward
        return *backward(grad, y, table, *ends, spent=read_by_one_layer(ctx), behind_relu=True, others=others), None, None


def relu_and_quantize(x: Tensor, table: Tensor, ends: Ends = None, *, inplace: bool = False) -> Both | None:
    """`relu(x)`, and that through `quantize_to_levels` or `quantize_to_grid`, with the gradients of both.

    Args:
        x: (...).
        table: levels, (K,); or the step of a grid, (1,).
        ends: None for levels, (lowest, highest) for a grid.
        inplace: x becomes the ReLU's result.

    Returns:
        Both; None, and nothing is done, where no loop takes x.
    """
    if not _taken(x, table, inplace, grid=ends is not None, trained=True):
        return None
    y, quantized = _Both.apply(x, table, ends, inplace)
    nearest = codebook.nearest if ends is None else grid.nearest
    return y, made_by(quantized, nearest, y, table, *(ends or ()))


def relu_and_lookup(x: Tensor, levels: Tensor, thresholds: Tensor, *, inplace: bool = False) -> Both | None:
    """`relu(x)`, and that through `codebook.lookup`, without a gradient; otherwise as `relu_and_quantize`."""
    if not _taken(x, levels, inplace):
        return None
    y = x if inplace else torch.empty_like(x)
    quantized = native.lookup(x, levels, thresholds, relu=y)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return y, quantized


def _taken(x: Tensor, table: Tensor, inplace: bool, **kind: Any) -> bool:
    # Autograd knows no change in place of a view by an operation with two results.
    return fast.loops(x, table, **kind) is native and native.is_dense(x) and not (inplace and x._is_view())
