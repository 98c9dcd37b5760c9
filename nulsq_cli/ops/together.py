"""Many small tensors quantized as one operation: the weights of a network.

A call costs more than its work where weights are small, and most of that is fetching the code that runs: between two
layers their inputs have passed through all caches. One after the other in one place, calls find it there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nulsq_cli.ops import fast, native
from nulsq_cli.ops.relu import backward_eager
from nulsq_cli.ops.remake import made_by, read_by_one_layer


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, kinds: Sequence[native.Kind], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.kinds = kinds  # type: ignore[attr-defined]
        ctx.set_materialize_grads(False)
        return tuple(map(native.quantize, tensors[::2], tensors[1::2], kinds))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, kinds = ctx.saved_tensors, ctx.kinds  # type: ignore[attr-defined]
        found: list[Tensor | None] = []
        for number, (grad, x, table, kind) in enumerate(zip(grads, tensors[::2], tensors[1::2], kinds, strict=True)):
            if grad is None:
                found += None, None
            elif torch.is_grad_enabled():  # as in codebook.py
                found += backward_eager(grad, x, table, kind)
            else:
                found += native.quantize_backward(grad, x, table, kind, spent=read_by_one_layer(ctx, number))
        return None, *found


def fits(x: Tensor, table: Tensor, kind: native.Kind) -> bool:
    """Whether `quantize_together` takes it."""
    return fast.loops(x, table, kind, trained=True) is native


def quantize_together(wanted: Sequence[tuple[Tensor, Tensor, native.Kind]]) -> list[Tensor]:
    """What `quantize_to_levels`, `quantize_by_gaps` or `quantize_to_grid` make of each, with their gradients.

    Args:
        wanted: x, its table and the kind of the table, as for `fast.loops`; all of them have to fit.
    """
    tensors = [t for x, table, _ in wanted for t in (x, table)]
    made = _Together.apply([kind for *_, kind in wanted], *tensors)
    return [made_by(y, native.quantize, *how) for y, how in zip(made, wanted, strict=True)]
