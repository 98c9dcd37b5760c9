"""The two quantizer ops as single compiled loops. Each is a copy of an eager function, tested against it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

LARGEST_TABLE = 16
"""Comparing against every level beats a binary search up to here (4 bits)."""

_active = False


def use(wanted: bool) -> bool:
    """Switch the compiled loops on or off for this process; returns whether they are on now.

    The first call with `wanted` compiles one loop. Where that fails (no C++ compiler, say) it
    is reported once, and everything goes on by the eager functions.
    """
    global _active
    if not wanted:
        _active = False
        return False
    if not _active:
        try:
            _lookup(torch.zeros(64), torch.arange(4.0), torch.arange(3.0) + 0.5)
            _active = True
        except Exception as reason:  # torch raises many types here, of which none is public
            log.warning("quantizers run uncompiled, which is slower: %s", str(reason).strip().splitlines()[0])
    return _active


@contextmanager
def paused() -> Iterator[None]:
    """Off inside, for what the compiled loops cannot do: a derivative of a derivative."""
    global _active
    before, _active = _active, False
    try:
        yield
    finally:
        _active = before


def enabled(x: Tensor) -> bool:
    """Whether the compiled loops take this tensor."""
    return _active and x.dtype == torch.float32 and x.numel() > 0


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


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


def _nearest(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    y = levels[0].expand_as(x)
    for i in range(thresholds.shape[0]):
        y = torch.where(x > thresholds[i], levels[i + 1], y)
    return y


@_compiled
def _lookup(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, _nearest(x, levels, thresholds))


def lookup(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """`codebook.lookup` for one table of at most `LARGEST_TABLE` levels."""
    row, order = _flat(x)
    return _shaped(_lookup(row, levels, thresholds), x, order)


@_compiled
def _levels_backward(grad: Tensor, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    last = levels.shape[0] - 1
    below, above = x < levels[0], x > levels[last]
    pull = grad * (_nearest(x, levels, (levels[1:] + levels[:-1]) / 2) - x)
    gaps = []
    for i in range(last):
        here = torch.where((x > levels[i]) & (x <= levels[i + 1]), pull, 0.0).sum()
        gaps.append(here / (levels[i + 1] - levels[i]).clamp_min(1e-30))
    ends = torch.where(below, grad, 0.0).sum(), torch.where(above, grad, 0.0).sum()
    to_levels = [ends[0] - gaps[0], *(gaps[i - 1] - gaps[i] for i in range(1, last)), gaps[-1] + ends[1]]
    return torch.where(below | above, 0.0, grad), torch.stack(to_levels)


def levels_backward(grad: Tensor, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`codebook.backward_eager` for one table of at most `LARGEST_TABLE` levels."""
    row, order = _flat(x)
    to_x, to_levels = _levels_backward(_row_of(grad, order), row, levels)
    return _shaped(to_x, x, order), to_levels


@_compiled
def _grid(x: Tensor, step: Tensor, ends: Tensor) -> Tensor:
    return (x / step).clamp(ends[0], ends[1]).round() * step


def grid(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The forward of `grid.quantize_to_grid` for one step."""
    row, order = _flat(x)
    return _shaped(_grid(row, step.view(()), _ends(x, lowest, highest)), x, order)


@_compiled
def _grid_backward(grad: Tensor, x: Tensor, step: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    place = x / step
    inside = (place >= ends[0]) & (place <= ends[1])
    pull = place.clamp(ends[0], ends[1]).round() - torch.where(inside, place, 0.0)
    return torch.where(inside, grad, 0.0), (grad * pull).sum()


def grid_backward(grad: Tensor, x: Tensor, step: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """`grid.backward_eager` for one step."""
    row, order = _flat(x)
    to_x, to_step = _grid_backward(_row_of(grad, order), row, step.view(()), _ends(x, lowest, highest))
    return _shaped(to_x, x, order), to_step.view(step.shape)


def _row_of(grad: Tensor, order: torch.memory_format) -> Tensor:
    if order is torch.channels_last:
        return grad.permute(0, 2, 3, 1).reshape(-1)
    return grad.reshape(-1)


def _ends(x: Tensor, lowest: int, highest: int) -> Tensor:
    return torch.tensor([lowest, highest], dtype=x.dtype, device=x.device)
