"""nuLSQ: every gap between neighbouring levels is a learned step. Gongyo et al., ACCV 2024, pp. 4385-4402."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.errors import pick
from nulsq_cli.methods.base import Quantizer, Tables, gradient_factor, keep_positive
from nulsq_cli.ops.codebook import levels_around_zero, quantize_by_gaps, quantize_to_levels
from nulsq_cli.ops.estimators import scale_gradient
from nulsq_cli.ops.native import Kind
from nulsq_cli.values import QuantSpec, TensorStats


class NuLSQ(Quantizer):
    """Levels are cumulative sums of learned steps on both sides of a level that is pinned at 0.

    Args:
        spec: what this quantizer has to be.
        grad_scale: `lsq` multiplies the steps' gradient by 1/sqrt(N * M), M the gaps on that side
            of zero; `none` by 1.
    """

    learned_shape = True

    def __init__(self, spec: QuantSpec, *, grad_scale: str = "none") -> None:
        super().__init__(spec)
        self.grad_scale = grad_scale
        self.gaps = nn.Parameter(torch.ones(spec.channels, spec.gaps))  # from the lowest gap to the highest
        # Where nothing stands between gaps and levels they are one operation, which wants to know how many lie below zero.
        self._below = spec.negative if grad_scale == "none" and spec.grid == "float" else None

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set all gaps by a rule, even or not; the authors' is `nmse`."""
        rule = "nmse" if rule == "paper" else rule
        self.gaps.copy_(pick(initializers.INITIALIZERS, rule, "initializer")(stats, self.spec))

    def levels(self, gaps: Tensor | None = None) -> Tensor:
        """(K,) or (C, K), ascending, one of them exactly 0."""
        table = levels_around_zero(self.gaps if gaps is None else gaps, self.spec.negative)
        return table if self.spec.granularity == "channel" else table.squeeze(0)

    def trained_levels(self, x: Tensor) -> Tensor:
        """On the grid if there is one, and with the factor on the gaps' gradient."""
        if self.grad_scale == "none":
            return self.on_grid(self.levels())
        below, above = self.gaps.split([self.spec.negative, self.spec.positive], dim=1)
        scaled = [
            scale_gradient(side, gradient_factor(x, self.spec, side.shape[1], self.grad_scale))
            for side in (below, above)
            if side.shape[1]
        ]
        return self.on_grid(self.levels(torch.cat(scaled, 1)))

    def tables(self, x: Tensor) -> Tables:
        """The gaps themselves, where nothing stands between them and the levels."""
        return super().tables(x) if self._below is None else (self.gaps.detach(), None, self._below)

    def operation(self, x: Tensor) -> tuple[Tensor, Kind]:
        """On gaps where nothing stands between them and the levels, else on levels."""
        return (self.trained_levels(x), None) if self._below is None else (self.gaps, self._below)

    def quantize(self, x: Tensor) -> Tensor:
        """To the nearest level; autograd carries the levels' gradient through the sums to the gaps."""
        if self._below is None:
            return quantize_to_levels(x, self.trained_levels(x))
        return quantize_by_gaps(x, self.gaps, self._below)

    def after_step(self) -> None:
        """A gap may become small, not close or invert."""
        keep_positive(self.gaps.data)
