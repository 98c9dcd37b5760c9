"""The quantizer ops on an accelerator as single loops: those of `traced.py`, each compiled by torch."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nulsq_cli.errors import first_line
from nulsq_cli.ops import traced

log = logging.getLogger(__name__)

LARGEST_TABLE = traced.LARGEST_CHAIN

_active = False
_compiled = {
    name: torch.compile(getattr(traced, name), dynamic=True, fullgraph=True)
    for name in ("lookup", "levels_backward", "grid", "grid_backward")
}


def use(wanted: bool, device: str | None = None) -> bool:
    """Switch the compiled loops on or off for this process; returns whether they are on now.

    The first call with `wanted` compiles one loop. Where that fails it is reported once, and
    everything goes on by the eager functions.

    Args:
        wanted: whether to compile.
        device: where to try; the accelerator of this machine by default.
    """
    global _active
    if not wanted:
        _active = False
    elif not _active:
        try:
            where = device or torch.accelerator.current_accelerator()
            _compiled["lookup"](torch.zeros(64, device=where), torch.arange(4.0, device=where), torch.arange(3.0, device=where))
            _active = True
        except Exception as reason:  # torch raises many types here, of which none is public
            log.warning("quantizers run uncompiled, which is slower: %s", first_line(reason))
    return _active


def active() -> bool:
    """Whether the compiled loops are on."""
    return _active


def lookup(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """`codebook.lookup` for one table of at most `LARGEST_TABLE` levels."""
    row, order = _flat(x)
    return _shaped(_compiled["lookup"](row, levels, thresholds), x, order)


def levels_backward(grad: Tensor, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`codebook.backward_eager` for one table of at most `LARGEST_TABLE` levels."""
    row, order = _flat(x)
    to_x, to_levels = _compiled["levels_backward"](_row_of(grad, order), row, levels)
    return _shaped(to_x, x, order), to_levels


def grid(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The forward of `grid.quantize_to_grid` for one step."""
    row, order = _flat(x)
    return _shaped(_compiled["grid"](row, step.view(()), lowest, highest), x, order)


def grid_backward(grad: Tensor, x: Tensor, step: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """`grid.backward_eager` for one step."""
    row, order = _flat(x)
    to_x, to_step = _compiled["grid_backward"](_row_of(grad, order), row, step.view(()), lowest, highest)
    return _shaped(to_x, x, order), to_step.view(step.shape)


def _flat(x: Tensor) -> tuple[Tensor, torch.memory_format]:
    """x as one row in the order of its memory, so that every shape runs the same loop."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).reshape(-1), torch.channels_last
    return x.reshape(-1), torch.contiguous_format


def _shaped(row: Tensor, like: Tensor, order: torch.memory_format) -> Tensor:
    if order is torch.channels_last:
        n, c, h, w = like.shape
        return row.view(n, h, w, c).permute(0, 3, 1, 2)
    return row.view(like.shape)


def _row_of(grad: Tensor, order: torch.memory_format) -> Tensor:
    if order is torch.channels_last:
        return grad.permute(0, 2, 3, 1).reshape(-1)
    return grad.reshape(-1)
