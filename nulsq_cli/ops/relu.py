"""A ReLU and the quantizer that reads it as one operation: a tensor is read once for both, forward and backward.

Apart they are two passes forward. Backward they are three, for a ReLU's result is mostly read by a shortcut, too: the
quantizer's gradient is made, the shortcut's is added, and the ReLU masks the sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from nulsq_cli.ops import codebook, fast, grid, native
from nulsq_cli.ops.remake import made_by, read_by_one_layer

Both = tuple[Tensor, Tensor]
"""The ReLU's result, and the same quantized."""


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, table: Tensor, kind: native.Kind, top: float,
                inplace: bool) -> Both:  # fmt: skip
        y = x if inplace else torch.empty_like(x)
        quantized = native.quantize(x, table, kind, relu=y, top=top)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, table)
        ctx.kind, ctx.top = kind, top  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return y, quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, others: Tensor | None,
                 grad: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
        (y, table), kind, top = ctx.saved_tensors, ctx.kind, ctx.top  # type: ignore[attr-defined]
        if grad is None:
            return None if others is None else others.masked_fill(held(y, top), 0), None, None, None, None
        if torch.is_grad_enabled():  # as in codebook.py
            to_y, to_table = backward_eager(grad, y, table, kind)
            return (to_y if others is None else to_y + others).masked_fill(held(y, top), 0), to_table, None, None, None
        spent = read_by_one_layer(ctx, output=1)
        found = native.quantize_backward(grad, y, table, kind, spent=spent, behind_relu=True, top=top, others=others)
        return *found, None, None, None


def rectify(x: Tensor, top: float) -> Tensor:
    """A ReLU, or one that ends at `top`, if that is a number."""
    return F.relu(x) if math.isnan(top) else F.hardtanh(x, 0, top)


def held(y: Tensor, top: float) -> Tensor:
    """Where a ReLU that gave y passes no gradient."""
    return (y <= 0) | (y >= top)


def backward_eager(grad: Tensor, x: Tensor, table: Tensor, kind: native.Kind) -> tuple[Tensor, Tensor]:
    """The gradients to x and to the table, step by step."""
    if isinstance(kind, tuple):
        return grid.backward_eager(grad, x, table, *kind)
    return codebook.backward_by(grad, x, table, kind)


def relu_and_quantize(x: Tensor, table: Tensor, kind: native.Kind = None, *, top: float = native.NO_TOP,
                      inplace: bool = False) -> Both | None:  # fmt: skip
    """`relu(x)`, and that through `quantize_to_levels`, `quantize_by_gaps` or `quantize_to_grid`, with the gradients of both.

    Args:
        x: (...).
        table, kind: of one table, as for `fast.loops`.
        top: the largest result of the ReLU.
        inplace: x becomes the ReLU's result.

    Returns:
        Both; None, and nothing is done, where no loop takes x, or the table learns and x does not: what else reads the
        ReLU's result would be asked for a gradient that nobody needs.
    """
    if (table.requires_grad and not x.requires_grad) or not _taken(x, table, kind, inplace, trained=True):
        return None
    y, quantized = _Both.apply(x, table, kind, top, inplace)
    return y, made_by(quantized, native.quantize, y, table, kind)


def relu_and_lookup(x: Tensor, table: Tensor, thresholds: Tensor | None, negative: int | None, *, top: float = native.NO_TOP,
                    inplace: bool = False, alone: bool = False) -> Both | None:  # fmt: skip
    """`relu(x)`, and that looked up, without a gradient; otherwise as `relu_and_quantize`.

    Args:
        x: (...).
        table, thresholds, negative, top: as for `native.quantize`.
        inplace: x becomes the ReLU's result.
        alone: x becomes the quantized result, and stands for both: memory that need not be fetched saves most of the time.
    """
    if not _taken(x, table, negative, inplace):
        return None
    y = x if inplace else torch.empty_like(x)
    quantized = native.quantize(x, table, negative, thresholds, relu=y, top=top, into=y if alone else None)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return y, quantized


def _taken(x: Tensor, table: Tensor, kind: native.Kind, inplace: bool, *, trained: bool = False) -> bool:
    # Autograd knows no change in place of a view by an operation with two results.
    return fast.loops(x, table, kind, trained=trained) is native and native.is_dense(x) and not (inplace and x._is_view())
