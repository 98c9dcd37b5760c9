"""Level tables on an integer grid, level = scale * integer: what runtimes that multiply bytes compute exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.values import QuantSpec

SIGNED_WEIGHTS = (-127, 127)
"""Not -128: where a negative BatchNorm gain is folded into a weight, the negated integer has to exist too."""

ZERO_POINT = 128
"""What is added to the integers of signed inputs, so that they fit a uint8."""

PARTS = 3
"""How finely the scale is searched: the largest level is tried at every half of an integer."""

EXACT = 1e-4
"""A table whose levels lie this close to integers, in units of the scale, is on them: more than float32 rounds off."""

PIECE = 1 << 18
"""How many numbers a search holds at once."""


def limits(spec: QuantSpec) -> tuple[int, int]:
    """The integers that a quantizer's levels may become, both ends included.

    Weights are int8, inputs uint8, with a zero point of 128 where they are signed. On x86 processors
    without VNNI the usual kernels add two products in 16 bits and saturate; they cannot where inputs
    end at 127, so those without negatives do where that leaves two integers per level or more.
    """
    if spec.role == "weight":
        return SIGNED_WEIGHTS if spec.bits < 8 else (-128, 127)  # 256 levels take all there is
    if spec.signed:
        return -ZERO_POINT, 255 - ZERO_POINT
    return 0, 127 if spec.bits <= 6 else 255


def extent(levels: Tensor) -> Tensor:
    """(...,) float64: the largest magnitude in each table of (..., K) levels."""
    return levels.double().abs().amax(-1).clamp_min(1e-30)


def scale_of(levels: Tensor, top: Tensor) -> Tensor:
    """(...,) float32: the scale on which the largest magnitude of each table, (..., K), is `top`, (...,), units."""
    return (extent(levels) / top.double()).float()


def values(integers: Tensor, scale: Tensor) -> Tensor:
    """The levels (..., K) that integers (..., K) stand for on scales (...,): float32, rounded once."""
    return integers.float() * scale[..., None]


def nearest(levels: Tensor, scale: Tensor, lowest: int, highest: int) -> Tensor:
    """The integers that are nearest to the levels in units of the scale, made to rise strictly.

    Args:
        levels: (..., K), ascending.
        scale: (...,), positive.
        lowest, highest: the ends, both included; K integers or more.

    Returns:
        (..., K) int16, strictly ascending; a level that is exactly 0 gets 0. Levels that fall on
        one integer, equal ones too, make room on both sides.
    """
    count = levels.shape[-1]
    if highest - lowest + 1 < count:
        raise ValueError(f"{count} levels do not fit the integers {lowest}..{highest}")
    place = (levels.double() / scale.double()[..., None]).round()
    # On this axis "strictly ascending integers" is "ascending integers".
    order = torch.arange(count, dtype=torch.float64, device=levels.device)
    loose = place - order
    from_below, from_above = loose.cummax(-1).values, loose.flip(-1).cummin(-1).values.flip(-1)
    loose = (((from_below + from_above) / 2 + order).trunc() - order).cummax(-1).values
    zero = levels == 0
    at = zero.int().argmax(-1, keepdim=True)
    pinned, still = zero.any(-1, keepdim=True), -at.double()
    infinite = torch.full_like(loose, float("inf"))
    least = torch.where(pinned & (order >= at), still, -infinite).clamp_min(lowest)
    most = torch.where(pinned & (order <= at), still, infinite).clamp_max(highest - (count - 1))
    return (torch.minimum(torch.maximum(loose, least), most) + order).to(torch.int16)


def best_top(levels: Tensor, counts: Tensor | None = None, *, lowest: int, highest: int, coherence: float = 0.0,
             finest: bool = False) -> Tensor:  # fmt: skip
    """How many units of its scale the largest magnitude of each table is best taken to be.

    A table that already lies on integers, an even one say, is left on the coarsest of its grids: even
    codes stay what they are. Else the scale is searched between one and two times the smallest that
    the integers allow, for the least error

        sum f_k e_k**2 + coherence * (sum f_k e_k)**2,   e_k = scale * integer_k - level_k.

    All entries that share a level share its error, so what is left of its mean adds up in a sum of
    products whose other factors are mostly positive; the second term is about that.

    Args:
        levels: (K,) or (C, K), ascending.
        counts: like levels, how often each is used; None takes all for equally frequent.
        lowest, highest: the integers' ends.
        coherence: weight of the squared mean error, 0 or positive.
        finest: search in any case, and prefer the finest among equally good scales: for tables that
            are even only because they have not learned yet.

    Returns:
        () or (C,) float32; equal tables give equal results.
    """
    rows = levels.reshape(-1, levels.shape[-1]).double()
    share = torch.ones_like(rows) if counts is None else counts.reshape(rows.shape).to(rows)
    share = share / share.sum(1, keepdim=True).clamp_min(1e-30)
    rows = rows / extent(rows)[:, None]
    at_once = max(1, PIECE // (rows.shape[1] * PARTS * highest))
    found = [_top(*piece, lowest, highest, coherence, finest)
             for piece in zip(*(t.split(at_once) for t in (rows, share)), strict=True)]  # fmt: skip
    return torch.cat(found).view(levels.shape[:-1]).float()


def _top(rows: Tensor, share: Tensor, lowest: int, highest: int, coherence: float, finest: bool) -> Tensor:
    above, below = rows[:, -1].clamp_min(0), (-rows[:, 0]).clamp_min(0)
    smallest = torch.maximum(above / highest, below / max(-lowest, 1e-9))  # scale, where the extent is 1
    most = (1 / smallest + EXACT).floor()
    exact = torch.full_like(most, float("inf"))
    # No unit is wider than the smallest gap, so no coarser grid needs a look.
    coarsest = 1 if rows.shape[1] == 1 else int((1 / rows.diff(dim=1).amin(1).clamp_min(1e-3)).amin() + 1e-2)
    for top in range(coarsest, int(most.max()) + 1) if not finest else ():
        place = rows * top
        fits = ((place - place.round()).abs().amax(1) <= EXACT) & (top <= most)
        exact = torch.where(fits & exact.isinf(), top, exact)
        if exact.isfinite().all():
            return exact
    steps = torch.arange(int(most.max()) // 2 * PARTS + 1, dtype=torch.float64, device=rows.device)
    tops = most[:, None] - steps / PARTS  # from the finest on
    tops = tops.clamp_min(1)
    table = rows[:, None].expand(-1, tops.shape[1], -1)
    error = nearest(table, 1 / tops, lowest, highest) / tops[..., None] - table
    cost = (share[:, None] * error.square()).sum(2) + coherence * (share[:, None] * error).sum(2).square()
    good = cost <= cost.amin(1, keepdim=True) + 1e-12
    searched = tops.gather(1, torch.where(good, steps, len(steps)).argmin(1, keepdim=True))[:, 0]
    return torch.where(exact.isinf(), searched, exact)


def snap(levels: Tensor, counts: Tensor | None = None, *, lowest: int = SIGNED_WEIGHTS[0], highest: int = SIGNED_WEIGHTS[1],
         coherence: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Put any level table on an integer grid.

    Args:
        levels: (K,) or (C, K) float32, ascending.
        counts: like levels, how often each is used; None takes all for equally frequent.
        lowest, highest: the integers' ends, as `limits` gives them.
        coherence: as in `best_top`; for weights `coherence_of` says how much.

    Returns:
        The scale, () or (C,) float32, and the integers, (K,) or (C, K) int16, strictly ascending,
        a level of 0 at 0: `values(integers, scale)` are the levels. The same bits in every run.
    """
    scale = scale_of(levels, best_top(levels, counts, lowest=lowest, highest=highest, coherence=coherence))
    return scale, nearest(levels, scale, lowest, highest)


def coherence_of(fan_in: int) -> float:
    """What the squared mean error of weights counts against their mean squared error: fan_in / pi.

    A sum of fan_in products of weight errors e and inputs x has the mean square fan_in * E[x**2] *
    E[e**2] and the squared mean fan_in**2 * E[x]**2 * E[e]**2; for a rectified normal input
    E[x]**2 / E[x**2] is 1 / pi.
    """
    return fan_in / torch.pi
