"""Statistics of a tensor that comes in chunks: moments and a histogram, in one pass and without knowing the range before."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nulsq_cli.ops import fast, native
from nulsq_cli.values import TensorStats

HALF = 2**13
"""Bins on each side of zero. The range takes up more than half of them, so a bin is 1/8192 to 1/4096 of it."""

NARROWEST = -100
"""Bins are not narrower than 2**-100 / HALF, so that a tensor of zeros has some, too."""

BLOCK = 4096
"""Entries that are summed in float32; sums of blocks are added up in float64."""


class Measured:
    """What is known so far of one tensor, summed so that the order of its chunks does not matter.

    A bin is a power of two wide, and one edge is zero. Where a chunk reaches further than those
    before, bins double their width by joining two and two, which is exact: the histogram at the end is the
    one that a first pass for the range and a second for the counts would give.

    Args:
        chunks: how many there are over all processes; each has its own row of sums.
    """

    def __init__(self, chunks: int) -> None:
        self.sums = torch.zeros(chunks, 4, dtype=torch.float64)  # count, sum, sum of |x|, sum of squares
        self.ends = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
        self.exponent = NARROWEST  # bins are 2**exponent / HALF wide
        self.counts = torch.zeros(2 * HALF, dtype=torch.int64)

    def add(self, chunk: int, x: Tensor) -> None:
        """Count one chunk, float32 of any shape; an entry that is not finite makes its sums so, too."""
        row = in_memory_order(x.detach().float())
        loops = fast.readable(row)
        total, sizes, squares, low, high = native.moments(row) if loops else _moments(row)
        self.sums[chunk] += torch.tensor([row.numel(), total, sizes, squares], dtype=torch.float64)
        if not math.isfinite(sizes):
            self.sums[chunk] = math.nan
            return
        self.ends = torch.stack((self.ends[0].clamp_max(low), self.ends[1].clamp_min(high)))
        self.widen(reach(low, high))
        scale = HALF / 2.0**self.exponent
        if loops:
            native.add_histogram(row, scale, self.counts)
            return
        # A power of two: nothing is rounded, unless tiny values become too small for float32.
        places = (row if scale >= 1 else row.double()) * scale
        self.counts += torch.bincount(places.floor_().to(torch.int16) + HALF, minlength=2 * HALF).cpu()

    def widen(self, exponent: int) -> None:
        """Join bins until they are 2**exponent / HALF wide."""
        joined = exponent - self.exponent
        if joined <= 0:
            return
        places = (torch.arange(-HALF, HALF) >> min(joined, HALF.bit_length())) + HALF
        self.counts = torch.zeros_like(self.counts).index_add_(0, places, self.counts)
        self.exponent = exponent

    def stats(self) -> TensorStats:
        """All that was counted, as the statistics of one distribution."""
        count, total, sizes, squares = self.sums.sum(0)
        low, high = self.ends
        mean = total / count
        variance = (squares - count * mean**2).clamp_min(0) / (count - 1).clamp_min(1)
        filled = self.counts.nonzero()[:, 0]
        bins = torch.arange(int(filled[0]), int(filled[-1]) + 1)
        points = (bins.double() - HALF + 0.5) * (2.0**self.exponent / HALF)
        if low == 0:
            # After ReLU most entries are exactly 0; the middle of their bin would pull levels upwards.
            points[0] = 0
        return TensorStats(
            count=int(count), mean=mean[None], mean_abs=(sizes / count)[None], mean_square=(squares / count)[None],
            std=variance.sqrt()[None], least=low[None], largest=high[None], points=points[None],
            mass=self.counts[bins].double()[None],
        )  # fmt: skip


def reach(low: float, high: float) -> int:
    """The smallest exponent, not below `NARROWEST`, such that |low| and |high| are less than 2**exponent."""
    furthest = max(-low, high, 2.0 ** (NARROWEST - 1))
    return math.frexp(furthest)[1]


def block_sum(row: Tensor) -> Tensor:
    """The sum of a float32 row, () float64 on the CPU, with about the rounding error of a single entry."""
    return torch.cat([block.sum(-1) for block in _blocks(row)]).cpu().double().sum()


def _moments(row: Tensor) -> list[float]:
    """`native.moments`, step by step."""
    squares = torch.cat([torch.linalg.vector_norm(block, dim=-1) for block in _blocks(row)]).cpu().double().square().sum()
    return [float(v) for v in (block_sum(row), block_sum(row.abs()), squares, *torch.aminmax(row))]


def _blocks(row: Tensor) -> tuple[Tensor, Tensor]:
    whole = row.numel() - row.numel() % BLOCK
    return row[:whole].view(-1, BLOCK), row[whole:][None]


def in_memory_order(x: Tensor) -> Tensor:
    """All entries of x as one row, without a copy where x is dense in one of the two usual layouts."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)
