"""The quantizer ops written for a compiler: elementwise chains that it turns into single loops. Copies of the eager functions."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CHAIN = 16
"""Comparing against every level beats a search up to here (4 bits)."""


def lookup(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """`codebook.lookup`."""
    if levels.shape[-1] <= LARGEST_CHAIN:
        y = _nearest(x, levels, thresholds)
    elif levels.ndim == 1:
        y = levels[torch.bucketize(x.contiguous(), thresholds)]
    else:
        y = levels.gather(1, torch.searchsorted(thresholds, x.reshape(x.shape[0], -1).contiguous())).view(x.shape)
    return torch.where(x.isnan(), x, y)


def levels_backward(grad: Tensor, x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """`codebook.backward_eager`."""
    count = levels.shape[-1]
    first, last = _column(levels, 0, x), _column(levels, count - 1, x)
    below, above = x < first, x > last
    if count > LARGEST_CHAIN:
        to_levels = _search_backward(grad, x, levels)
    else:
        pull = grad * (_nearest(x, levels, (levels[..., 1:] + levels[..., :-1]) / 2) - x)
        over = None if levels.ndim == 1 else list(range(1, x.ndim))
        low, high = (torch.where(side, grad, 0.0).sum(over) for side in (below, above))
        gaps = []
        for k in range(count - 1):
            inside = (x > _column(levels, k, x)) & (x <= _column(levels, k + 1, x))
            gap = (levels[..., k + 1] - levels[..., k]).clamp_min(1e-30)
            gaps.append(torch.where(inside, pull, 0.0).sum(over) / gap)
        inner = [gaps[k - 1] - gaps[k] for k in range(1, count - 1)]
        to_levels = torch.stack([low - gaps[0], *inner, gaps[-1] + high], -1)
    return torch.where(below | above, 0.0, grad), to_levels


def grid(x: Tensor, step: Tensor, lowest: int, highest: int) -> Tensor:
    """The forward of `grid.quantize_to_grid`."""
    return (x / step).clamp(lowest, highest).round() * step


def grid_backward(grad: Tensor, x: Tensor, step: Tensor, lowest: int, highest: int) -> tuple[Tensor, Tensor]:
    """`grid.backward_eager`."""
    place = x / step
    inside = (place >= lowest) & (place <= highest)
    pull = place.clamp(lowest, highest).round() - torch.where(inside, place, 0.0)
    over = None if step.numel() == 1 else list(range(1, x.ndim))
    return torch.where(inside, grad, 0.0), (grad * pull).sum(over).view(step.shape)


def _column(table: Tensor, k: int, x: Tensor) -> Tensor:
    """Entry k of the table, or of each channel's table, in a shape that meets x."""
    return table[k] if table.ndim == 1 else table[:, k].view(-1, *[1] * (x.ndim - 1))


def _nearest(x: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    y = _column(levels, 0, x).expand_as(x)
    for k in range(thresholds.shape[-1]):
        y = torch.where(x > _column(thresholds, k, x), _column(levels, k + 1, x), y)
    return y


def _search_backward(grad: Tensor, x: Tensor, levels: Tensor) -> Tensor:
    table = levels if levels.ndim == 2 else levels[None]
    tables, count = table.shape
    rows, slopes = x.reshape(tables, -1), grad.reshape(tables, -1)
    upper = torch.searchsorted(table, rows).clamp(1, count - 1)
    low, high = table.gather(1, upper - 1), table.gather(1, upper)
    below, above = rows < table[:, :1], rows > table[:, -1:]
    nearest = torch.where(rows > (low + high) / 2, high, low)
    pull = torch.where(below | above, 0.0, slopes * (nearest - rows) / (high - low).clamp_min(1e-30))
    up, down = torch.where(above, slopes, pull), torch.where(below, slopes, -pull)
    sums = torch.zeros_like(table).scatter_add(1, upper, up).scatter_add(1, upper - 1, down)
    return sums.view(levels.shape)
