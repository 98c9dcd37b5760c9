"""Oscillation dampening: every weight is pulled towards its level. Nagel et al., ICML 2022, arXiv:2203.11086."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nulsq_cli.errors import pick
from nulsq_cli.ops.codebook import decode
from nulsq_cli.stabilizers.base import Penalty

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "kernel_mean": lambda squares: squares.sum(0).mean(),
    "mean": lambda squares: squares.mean(),
    "sum": lambda squares: squares.sum(),
}
"""How the squares of a layer, (C, ...), become one number; the first, a sum over output channels, is the authors'."""


class Dampening(Penalty):
    """Weights, not bins, count alike: next to `bin-reg` the crowded bins pull harder.

    Args:
        layers: quantized layers by module path.
        aggregate: a name in `AGGREGATES`.
        schedule: begin, first, last, widest.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, aggregate: str, **schedule: Any) -> None:
        super().__init__(layers, **schedule)
        self.aggregate = pick(AGGREGATES, aggregate, "aggregate")

    def term(self, weight: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
        """The squared distances of one layer, aggregated."""
        return self.aggregate(squared_distance(weight, codes, targets))


def squared_distance(weight: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of every weight to the level of its bin.

    Args:
        weight: (...) or (C, ...).
        codes: integers in 0..K-1, shaped like weight.
        targets: (K,) or (C, K), the levels; they get no gradient.

    Returns:
        (...) like weight; 0, without a gradient, for weights beyond the outermost levels, so that the range
        of the table is not pulled at.

    Source: section 4.1 of the paper.
    """
    targets = targets.detach()
    ends = targets.view(-1, targets.shape[-1], *[1] * (weight.ndim - 1))
    clipped = weight.clamp(ends[:, 0], ends[:, -1])
    return (clipped - decode(codes, targets)).square()
