"""Which loops take a tensor: C++ on CPUs, compiled by torch on accelerators, or none, and the eager functions do it.

All are copies of the eager functions and are tested against them; a path never changes what is computed beyond the
rounding of sums.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from nulsq_cli.ops import fused, native

_wanted = True


def use(wanted: bool, *, accelerators: bool = False) -> bool:
    """Switch the fast loops of this process on or off; returns whether those of the CPU are on now.

    Args:
        wanted: whether at all. They are on until somebody switches them off.
        accelerators: also compile those of the accelerators, which takes a while.
    """
    global _wanted
    _wanted = wanted
    fused.use(wanted and accelerators)
    return wanted and native.library() is not None


def loops(x: Tensor, levels: int, tables: int = 1, *, trained: bool = False) -> ModuleType | None:
    """The module whose functions take x; None for the eager ones.

    Args:
        x: what is quantized.
        levels: how many levels a table has; 0 for the even grid.
        tables: how many tables there are.
        trained: whether a gradient to the levels is asked for.
    """
    if not _wanted or x.dtype != torch.float32 or x.numel() == 0:
        return None
    if x.is_cpu:
        fits = levels <= (native.LARGEST_TRAINED_TABLE if trained else native.LARGEST_TABLE)
        return native if fits and native.library() is not None else None
    return fused if tables == 1 and levels <= fused.LARGEST_TABLE and fused.active() else None
