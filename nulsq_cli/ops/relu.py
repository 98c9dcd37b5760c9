"""A ReLU and the quantizer that reads it as one operation: a tensor is read once for both, forward and backward.

Apart they are two passes forward. Backward they are three, for a ReLU's result is mostly read by a shortcut, too: the
quantizer's gradient is made, the shortcut's is added, and the ReLU masks the sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.ops import codebook, fast, grid, native
from nulsq_cli.ops.remake import made_by, read_by_one_layer

Both = tuple[Tensor, Tensor]
"""The ReLU's result, and the same quantized."""


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, table: Tensor, kind: native.Kind, inplace: bool) -> Both:
        y = x if inplace else torch.empty_like(x)
        quantized = native.quantize(x, table, kind, relu=y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, table)
        ctx.kind = kind  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return y, quantized

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, others: Tensor | None,
                 grad: Tensor | None) -> tuple[Tensor | None, ...]:  # fmt: skip
        (y, table), kind = ctx.saved_tensors, ctx.kind  # type: ignore[attr-defined]
        if grad is None:
            return None if others is None else others.masked_fill(y <= 0, 0), None, None, None
        if torch.is_grad_enabled():  # as in codebook.py
            to_y, to_table = backward_eager(grad, y, table, kind)
            return (to_y if others is None else to_y + others).masked_fill(y <= 0, 0), to_table, None, None
        spent = read_by_one_layer(ctx, output=1)
        return *native.quantize_backward(grad, y, table, kind, spent=spent, behind_relu=True, others=others), None, None


def backward_eager(grad: Tensor, x: Tensor, table: Tensor, kind: native.Kind) -> tuple[Tensor, Tensor]:
    """The gradients to x and to the table, step by step."""
    if isinstance(kind, tuple):
        return grid.backward_eager(grad, x, table, *kind)
    return codebook.backward_by(grad, x, table, kind)


def relu_and_quantize(x: Tensor, table: Tensor, kind: native.Kind = None, *, inplace: bool = False) -> Both | None:
    """`relu(x)`, and that through `quantize_to_levels`, `quantize_by_gaps` or `quantize_to_grid`, with the gradients of both.

    Args:
        x: (...).
        table, kind: of one table, as for `fast.loops`.
        inplace: x becomes the ReLU's result.

    Returns:
        Both; None, and nothing is done, where no loop takes x, or the table learns and x does not: what else reads the
        ReLU's result would be asked for a gradient that nobody needs.
    """
    if (table.requires_grad and not x.requires_grad) or not _taken(x, table, kind, inplace, trained=True):
        return None
    y, quantized = _Both.apply(x, table, kind, inplace)
    return y, made_by(quantized, native.quantize, y, table, kind)


def relu_and_lookup(x: Tensor, table: Tensor, thresholds: Tensor | None, negative: int | None, *, inplace: bool = False,
                    alone: bool = False) -> Both | None:  # fmt: skip
    """`relu(x)`, and that looked up, without a gradient; otherwise as `relu_and_quantize`.

    Args:
        x: (...).
        table, thresholds, negative: as for `native.quantize`.
        inplace: x becomes the ReLU's result.
        alone: x becomes the quantized result, and stands for both: memory that need not be fetched saves most of the time.
    """
    if not _taken(x, table, negative, inplace):
        return None
    y = x if inplace else torch.empty_like(x)
    quantized = native.quantize(x, table, negative, thresholds, relu=y, into=y if alone else None)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return y, quantized


def _taken(x: Tensor, table: Tensor, kind: native.Kind, inplace: bool, *, trained: bool = False) -> bool:
    # Autograd knows no change in place of a view by an operation with two results.
    return fast.loops(x, table, kind, trained=trained) is native and native.is_dense(x) and not (inplace and x._is_view())
