"""BatchNorm, the shortcut that is added to it, the ReLU after them and the quantizer that reads that as one operation.

Apart, each of them reads a tensor and writes one. Together they read BatchNorm's own input, which is kept for the backward
pass anyway, and the shortcut, and write what the layer reads and, where somebody else reads it, the ReLU's result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nulsq_cli.ops import fast, native
from nulsq_cli.ops.native import Norm
from nulsq_cli.ops.relu import Both, backward_eager, held, rectify
from nulsq_cli.ops.remake import made_by, read_by_one_layer


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor,
                table: Tensor, kind: native.Kind, norm: Norm, facts: Tensor, alone: bool) -> Tensor | Both:  # fmt: skip
        y = None if alone else torch.empty_like(x)
        quantized = native.normalize(x, norm, facts, table, kind, shortcut=shortcut, relu=y)
        ctx.save_for_backward(x, weight, bias, table, facts, None if shortcut is None else y)
        ctx.kind, ctx.norm = kind, norm  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return quantized if y is None else (y, quantized)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, weight, bias, table, facts, y), kind, norm = ctx.saved_tensors, ctx.kind, ctx.norm  # type: ignore[attr-defined]
        others, grad = (None, *grads)[-2:]
        found: tuple[Tensor | None, ...] = (None,) * 5
        if grad is None or torch.is_grad_enabled():  # as in codebook.py
            if grad is not None or others is not None:
                found = _backward_eager(grad, others, x, y, norm._replace(weight=weight, bias=bias), table, kind)
        else:
            spent = read_by_one_layer(ctx, output=len(grads) - 1)
            found = native.normalize_backward(grad, x, norm, facts, table, kind, y=y, spent=spent, others=others)
        return *found, None, None, None, None


def _backward_eager(grad: Tensor | None, others: Tensor | None, x: Tensor, y: Tensor | None, norm: Norm, table: Tensor,
                    kind: native.Kind) -> tuple[Tensor | None, ...]:  # fmt: skip
    recorded = torch.is_grad_enabled()
    inputs = [t if recorded and t.requires_grad else t.detach().requires_grad_() for t in (x, norm.weight, norm.bias)]
    statistics = (None, None) if norm.batch else (norm.running_mean, norm.running_var)
    with torch.enable_grad():
        own = F.batch_norm(inputs[0], *statistics, *inputs[1:], norm.batch, eps=norm.eps)
        made = rectify(own, norm.top) if y is None else y
        to_y, to_table = (others, None) if grad is None else backward_eager(grad, made, table, kind)
        if grad is not None and others is not None:
            to_y = to_y + others
        to_sum = to_y.masked_fill(held(made, norm.top), 0)
        to_x, *to_norm = torch.autograd.grad(own, inputs, to_sum, create_graph=recorded)
        return to_x, None if y is None else to_sum, *to_norm, to_table


def norm_and_quantize(x: Tensor, table: Tensor, kind: native.Kind, norm: Norm, shortcut: Tensor | None = None, *,
                      alone: bool = False) -> Both | None:  # fmt: skip
    """`relu(batch_norm(x))`, or `relu(batch_norm(x) + shortcut)`, and that quantized by one of the ops, with all gradients.

    Args:
        x: (N, C, H, W).
        table, kind: of one table, as for `fast.loops`.
        norm: the BatchNorm, whose running statistics change if it takes the batch.
        shortcut: of the shape and in the memory order of x.
        alone: nobody needs the ReLU's result: the quantized one stands for both.

    Returns:
        Both; None, and nothing is done, where no loop takes x, or the table learns and x does not.
    """
    if (table.requires_grad and not x.requires_grad) or not _taken(x, shortcut, table, kind, norm, trained=True):
        return None
    alone = alone and shortcut is None  # else the ReLU's result is kept, which is less than keeping the shortcut, too
    facts = native.room_for_facts(x)
    made = _Normalized.apply(x, shortcut, norm.weight, norm.bias, table, kind, norm, facts, alone)
    y, quantized = (made, made) if alone else made
    if shortcut is not None:
        return y, made_by(quantized, native.quantize, y, table, kind)
    return y, made_by(quantized, _again, x, norm, facts, table, kind)


def _again(x: Tensor, norm: Norm, facts: Tensor, table: Tensor, kind: native.Kind) -> Tensor:
    return native.normalize(x, norm, facts, table, kind, again=True)


def norm_and_lookup(x: Tensor, table: Tensor, thresholds: Tensor | None, negative: int | None, norm: Norm,
                    shortcut: Tensor | None = None, *, inplace: bool = False, alone: bool = False) -> Both | None:  # fmt: skip
    """The same, looked up, without a gradient; otherwise as `norm_and_quantize`.

    Args:
        x: (N, C, H, W).
        table, thresholds, negative: as for `native.quantize`.
        norm, shortcut: as there.
        inplace: what is returned first may take x's memory.
        alone: the quantized result stands for both.
    """
    if not _taken(x, shortcut, table, negative, norm):
        return None
    first = x if inplace else torch.empty_like(x)
    quantized = native.normalize(x, norm, native.room_for_facts(x), table, negative, thresholds, shortcut=shortcut,
                                 relu=None if alone else first, into=first if alone else None)  # fmt: skip
    if inplace:
        torch.autograd.graph.increment_version(x)
    return first, quantized


def _taken(x: Tensor, shortcut: Tensor | None, table: Tensor, kind: native.Kind, norm: Norm, *, trained: bool = False) -> bool:
    like = shortcut is None or (shortcut.shape == x.shape and shortcut.stride() == x.stride() and fast.readable(shortcut))
    return like and fast.loops(x, table, kind, trained=trained) is native and norm.takes(x)
