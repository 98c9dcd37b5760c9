"""From statistics to the first steps. A rule returns (C, gaps) positive float64, from the lowest gap to the highest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nulsq_cli.errors import pick
from nulsq_cli.values import QuantSpec, TensorStats

Initializer = Callable[[TensorStats, QuantSpec], Tensor]

SMALLEST = 1e-8

# The step, in units of the standard deviation, that minimises the squared error of an even grid;
# recomputed by closed-form cell errors and golden section. Values: UniQ (arXiv:2104.00210) and the
# released nuLSQ code, which use the mid-rise optimum for signed tensors.
NMSE_SIGNED = {2: 0.99568669, 3: 0.58601944, 4: 0.33520061, 5: 0.18813879, 6: 0.10406301, 7: 0.05686767, 8: 0.03076238}
NMSE_UNSIGNED = {2: 0.65076985, 3: 0.35340955, 4: 0.19324868, 5: 0.10548752, 6: 0.0572659, 7: 0.03087133, 8: 0.01652923}


def _even_gaps(step: Tensor, spec: QuantSpec) -> Tensor:
    return step.clamp_min(SMALLEST)[:, None].expand(-1, spec.gaps).contiguous()


def nmse(stats: TensorStats, spec: QuantSpec) -> Tensor:
    """The best even step for a normal distribution of the measured width (half a normal if unsigned)."""
    if spec.signed:
        return _even_gaps(NMSE_SIGNED[spec.bits] * stats.std, spec)
    return _even_gaps(NMSE_UNSIGNED[spec.bits] * (2 * stats.mean_square).sqrt(), spec)


def lsq(stats: TensorStats, spec: QuantSpec) -> Tensor:
    """2 * mean|x| / sqrt(largest code). Source: LSQ, arXiv:1902.08153, section 2.1."""
    return _even_gaps(2 * stats.mean_abs / spec.positive**0.5, spec)


def mse(stats: TensorStats, spec: QuantSpec) -> Tensor:
    """The even step that minimises the squared error of the measured distribution itself."""
    return _even_gaps(best_scale(stats, torch.arange(-spec.negative, spec.positive + 1)), spec)


def best_scale(stats: TensorStats, levels: Tensor) -> Tensor:
    """The factor on a table of levels that minimises the squared error of the measured distribution.

    Args:
        stats: of the tensor as it meets the table.
        levels: (K,), ascending, in any unit.

    Returns:
        (C,) positive float64.
    """
    levels = levels.double().to(stats.points.device)
    cuts = (levels[1:] + levels[:-1]) / 2
    points, moment = stats.points.contiguous(), stats.mass * stats.points
    sums = [torch.nn.functional.pad(s.cumsum(1), (1, 0)) for s in (stats.mass, moment)]

    def error(scale: Tensor) -> Tensor:
        """Up to the tensor's own power, which no scale changes."""
        ends = torch.searchsorted(points, scale[:, None] * cuts, right=True)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=points.shape[1])
        inside, total = (s.gather(1, ends).diff(dim=1) for s in sums)
        table = scale[:, None] * levels
        return (table * (table * inside - 2 * total)).sum(1)

    reach = torch.maximum(stats.largest, -stats.least) / levels.abs().amax()
    # A coarse geometric search, then two finer ones around its best: the error has local minima.
    reach = reach.clamp_min(SMALLEST)
    low, high = reach / 64, reach * 1.25
    best = reach
    for points_tried in (48, 24, 24):
        ratio = (high / low.clamp_min(SMALLEST)) ** (1 / (points_tried - 1))
        candidates = torch.stack([low * ratio**i for i in range(points_tried)]).clamp_min(SMALLEST)
        errors = torch.stack([error(c) for c in candidates])
        best = candidates.gather(0, errors.argmin(0, keepdim=True))[0]
        low, high = best / ratio, best * ratio
    return best


def clip(rule: str, stats: TensorStats, spec: QuantSpec, levels: Tensor) -> Tensor:
    """Where the highest level starts, for methods that learn it instead of a step.

    Args:
        rule: a name in `INITIALIZERS`. `mse` and `lloyd` fit the method's own levels, the other rules an even grid.
        stats: of the tensor as the method sees it.
        spec: what the quantizer has to be.
        levels: (K,), ascending, the method's table with its highest level at 1.

    Returns:
        (C,) positive float64.
    """
    if even(rule) is mse:
        return best_scale(stats, levels)
    return even(rule)(stats, spec)[:, 0] * spec.positive


def lloyd(stats: TensorStats, spec: QuantSpec, iterations: int = 500, tolerance: float = 1e-7) -> Tensor:
    """Levels that minimise the squared error of the measured distribution, with one pinned at 0.

    Lloyd-Max: thresholds between levels, then each level but the pinned one to the mean of its cell,
    until nothing moves. It starts from the best even grid; a cell that nothing falls into keeps its width.

    Source: S. P. Lloyd, Least squares quantization in PCM, 1982, with the zero of nuLSQ kept.
    """
    even_step = mse(stats, spec)[:, :1]
    levels = even_step * torch.arange(-spec.negative, spec.positive + 1, dtype=torch.float64, device=even_step.device)
    sums = RunningSums(stats)
    for _ in range(iterations):
        inside, total = sums.between((levels[:, 1:] + levels[:, :-1]) / 2)
        moved = torch.where(inside > 0, total / inside.clamp_min(1e-300), levels)
        moved[:, spec.negative] = 0
        # An empty cell keeps its level while its neighbours move: keep the order.
        moved = moved.sort(1).values
        change = (moved - levels).abs().amax() / even_step.amax()
        levels = moved
        if change < tolerance:
            break
    # Where the data have fewer values than there are levels, some would meet; keep them apart.
    return torch.maximum(levels.diff(dim=1), even_step * 1e-2).clamp_min(SMALLEST)


class RunningSums:
    """Mass and moment of a distribution up to any place, with each point's mass spread halfway to its neighbours.

    Without the spreading a threshold that moves by less than the distance of two points changes
    nothing, and the iteration stops before it has arrived.
    """

    def __init__(self, stats: TensorStats) -> None:
        points, mass = stats.points, stats.mass
        self.edges = torch.cat((points[:, :1], (points[:, 1:] + points[:, :-1]) / 2, points[:, -1:]), 1).contiguous()
        self.mass = torch.nn.functional.pad(mass.cumsum(1), (1, 0))
        self.moment = torch.nn.functional.pad((mass * points).cumsum(1), (1, 0))

    def between(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """(C, K-1) cuts give the (C, K) masses and moments of the cells between them."""
        right = torch.searchsorted(self.edges, cuts.contiguous()).clamp_(1, self.edges.shape[1] - 1)
        left, low, high = right - 1, self.edges.gather(1, right - 1), self.edges.gather(1, right)
        share = ((cuts - low) / (high - low).clamp_min(1e-300)).clamp_(0, 1)
        cells = []
        for sums in (self.mass, self.moment):
            before = sums.gather(1, left)
            at = before + share * (sums.gather(1, right) - before)
            cells.append(torch.cat((at, sums[:, -1:]), 1).diff(dim=1, prepend=torch.zeros_like(sums[:, :1])))
        return cells[0], cells[1]


INITIALIZERS: dict[str, Initializer] = {"nmse": nmse, "lsq": lsq, "lloyd": lloyd, "mse": mse}


def even(name: str) -> Initializer:
    """The rule of that name, or its even counterpart where the rule is not even (`lloyd` -> `mse`)."""
    rule = pick(INITIALIZERS, name, "initializer")
    return mse if rule is lloyd else rule


def standardized(stats: TensorStats) -> TensorStats:
    """The statistics of (x - mean) / std, from those of x."""
    std = stats.std.clamp_min(SMALLEST)
    points = (stats.points - stats.mean[:, None]) / std[:, None]
    return TensorStats(
        count=stats.count, mean=torch.zeros_like(std), mean_abs=(points.abs() * stats.mass).sum(1) / stats.mass.sum(1),
        mean_square=(stats.mean_square - stats.mean**2).clamp_min(0) / std**2, std=stats.std / std,
        least=(stats.least - stats.mean) / std, largest=(stats.largest - stats.mean) / std, points=points, mass=stats.mass,
    )  # fmt: skip


def measure(values: Tensor, channels: int = 1, bins: int = 4096) -> TensorStats:
    """Statistics of a tensor that is at hand.

    Args:
        values: any shape; its first dimension is split into `channels`.
        channels: how many separate distributions to measure along the first dimension.
        bins: distributions of more entries than this are binned evenly over their range.
    """
    rows = values.detach().reshape(channels, -1)
    points, rows = rows.sort(1).values.double(), rows.double()  # float32 sorts faster, to the same order
    mass = torch.ones_like(rows)
    if rows.shape[1] > bins:
        points, mass = _binned(points, bins)
    return TensorStats(
        count=rows.shape[1], mean=rows.mean(1), mean_abs=rows.abs().mean(1), mean_square=rows.square().mean(1),
        std=rows.std(1) if rows.shape[1] > 1 else rows[:, 0].abs(), least=rows.amin(1), largest=rows.amax(1),
        points=points, mass=mass,
    )  # fmt: skip


def _binned(rows: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Sorted (C, N) rows as (C, bins) bin means and counts; an empty bin is its middle with no mass."""
    low, width = rows[:, :1], (rows[:, -1:] - rows[:, :1]) / bins
    edges = low + width * torch.arange(bins + 1, dtype=torch.float64, device=rows.device)
    cuts = torch.searchsorted(rows, edges[:, 1:-1].contiguous())
    cuts = torch.nn.functional.pad(cuts, (1, 1))
    cuts[:, -1] = rows.shape[1]
    sums = torch.nn.functional.pad(rows.cumsum(1), (1, 0)).gather(1, cuts).diff(dim=1)
    counts = cuts.diff(dim=1).double()
    middle = (edges[:, 1:] + edges[:, :-1]) / 2
    return torch.where(counts > 0, sums / counts.clamp_min(1), middle), counts
