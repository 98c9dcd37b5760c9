"""Which loops take a tensor: C++ on CPUs, compiled by torch on accelerators, or none, and the eager functions do it.

All are copies of the eager functions and are tested against them; a path never changes what is computed beyond the
rounding of sums.
"""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

from nulsq_cli.ops import fused, native

_wanted = True
_PLAIN = (Tensor, nn.Parameter)  # not one that only stands for another, as while a model is exported


def use(wanted: bool, *, accelerators: bool = False) -> bool:
    """Switch the fast loops of this process on or off; returns whether those of the CPU are on now.

    Args:
        wanted: whether at all. They are on until somebody switches them off.
        accelerators: also compile those of the accelerators, which takes a while.
    """
    global _wanted
    _wanted = wanted
    if wanted:
        _keep_freed_memory()
    fused.use(wanted and accelerators)
    return wanted and native.library() is not None


@cache
def _keep_freed_memory() -> None:
    """Quantized tensors are freed as soon as they were used. Where the C library hands their pages back to the system each
    time, getting new ones for the next tensor takes as long as quantizing it. (GNU limits the threshold for it to 32 MB.)"""
    trim_threshold, mmap_max = -1, -4
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another library than GNU's has another way
        settings = ctypes.CDLL(None).mallopt
        settings(mmap_max, 0)
        settings(trim_threshold, 2**31 - 1)


def _plain(x: Tensor) -> bool:
    return _wanted and type(x) in _PLAIN and x.dtype is torch.float32 and x.numel() > 0 and not recorded()


def recorded() -> bool:
    """Whether operations are written down or transformed as they run: loops would not be seen, or find no memory behind x."""
    return torch._C._get_tracing_state() is not None or torch._C._len_torch_dispatch_stack() > 0 or transformed()


def transformed() -> bool:
    """Whether this runs inside a transform of `torch.func`, whose tensors do not say that a gradient is wanted."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def readable(x: Tensor) -> bool:
    """Whether the loops of the CPU read x: float32, not empty, nothing that only stands for a tensor."""
    return _plain(x) and x.is_cpu and native.library() is not None


def loops(x: Tensor, table: Tensor, kind: native.Kind = None, *, trained: bool = False) -> ModuleType | None:
    """The module whose functions take x; None for the eager ones.

    Args:
        x: what is quantized.
        table: (K,) or (C, K) levels, (C, K-1) gaps, or (1,) or (C, 1, ..., 1) steps.
        kind: which of them.
        trained: whether a gradient to the table is asked for.
    """
    if not (_plain(x) and table.dtype is torch.float32 and x.device == table.device):
        return None
    grid = isinstance(kind, tuple)
    levels = 0 if grid else table.shape[-1] + (kind is not None)
    if x.is_cpu:
        fits = levels <= (native.LARGEST_TRAINED_TABLE if trained else native.LARGEST_TABLE)
        return native if fits and native.library() is not None else None
    one = table.numel() == (1 if grid else table.shape[-1])
    return fused if one and levels <= fused.LARGEST_TABLE and fused.active() else None
