"""Quantized tensors are made again in the backward pass instead of being kept for it.

What a quantizer reads is kept anyway: a ReLU's result by the ReLU, a weight by the model. What it writes follows from
that and a small table, so a layer that would keep it keeps how it was made. The second making has the bits of the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WORTH_MAKING_TWICE = 1 << 16
"""Entries from which on keeping a tensor costs more than making it again: the weights of small networks have fewer."""


def checkpointed() -> bool:
    """Whether gradient checkpointing, in its form without reentrance, keeps nothing of what runs now, or runs it once more.

    Both times the same things have to be kept, in the same order, whatever ran before, and all of them by torch.
    """
    if not torch.is_grad_enabled():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


class _Way:
    """How a tensor was made: a function without a gradient, and what it was called with."""

    __slots__ = ("arguments", "make", "versions")

    def __init__(self, make: Callable[..., Tensor], arguments: tuple[Any, ...]) -> None:
        self.make, self.arguments, self.versions = make, arguments, _versions(arguments)

    def __call__(self) -> Tensor:
        if _versions(self.arguments) != self.versions:
            raise RuntimeError("a tensor that a quantizer read was changed in place between forward and backward")
        if not torch.is_grad_enabled():
            return self.make(*self.arguments)
        with torch.no_grad():
            return self.make(*self.arguments)


def _versions(arguments: tuple[Any, ...]) -> list[int]:
    return [value._version for value in arguments if isinstance(value, Tensor)]


def made_by(y: Tensor, make: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """y, with a note that `make(*arguments)` gives its bits, in its layout, once more; without one if y is small."""
    if y.numel() >= WORTH_MAKING_TWICE and not torch.compiler.is_compiling() and torch.is_grad_enabled():
        y._nulsq_way = _Way(make, arguments)  # type: ignore[attr-defined]
    return y


def read_by_one_layer(ctx: Any, output: int = 0) -> bool:
    """Whether the gradient that this function gets of an output was made by the backward pass of one layer, and for it alone.

    Its memory may then be used again: convolutions and linear layers write a new tensor.
    """
    return getattr(ctx, "nulsq_layers", {}).get(output) == 1


def instead_of_keeping(*tensors: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What is computed inside from these tensors, or from views of them, makes them again in its backward pass.

    Those without a note from `made_by` are kept as usual. Compilers and gradient checkpointing decide themselves what to make
    twice. What makes them is told that a layer reads them, for `read_by_one_layer`: its backward pass has to write a new tensor.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or checkpointed():
        return contextlib.nullcontext()
    noted = [t for t in tensors if hasattr(t, "_nulsq_way")]
    if not noted:
        return contextlib.nullcontext()
    ways = {t.untyped_storage().data_ptr(): t._nulsq_way for t in noted}
    for t in noted:
        if t.grad_fn is not None:
            counts = t.grad_fn.nulsq_layers = getattr(t.grad_fn, "nulsq_layers", {})
            counts[t.output_nr] = counts.get(t.output_nr, 0) + 1

    def pack(kept: Tensor) -> Any:
        way = ways.get(kept.untyped_storage().data_ptr())
        return kept if way is None else (way, kept.shape, kept.stride(), kept.storage_offset())

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    way, *view = packed
    return way().as_strided(*view)
