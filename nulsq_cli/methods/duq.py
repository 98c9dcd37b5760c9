"""DuQ: an even grid with one learned scale for what comes in and another for what goes out. Park, Yoo, ECCV 2020.

The quantizer of PROFIT, arXiv:2008.04693.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nulsq_cli import initializers
from nulsq_cli.methods.base import SMALLEST_STEP, Quantizer
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec, TensorStats

INPUT_SHARE, WEIGHT_SHARE = 0.95, 0.9


class DuQ(Quantizer):
    """y = c * round(clip(x / a, -1 or 0, 1) * N) / N, with a and c kept positive by a softplus.

    Signed tables are mirrored at zero: N = 2**(bits-1) - 1, and 2**bits - 1 levels. The form for
    h-swish, which shifts by 3/8 and needs convolutions that pad with -3/8, is not here.

    Args:
        spec: what this quantizer has to be.
    """

    of_any_width = ("raw_scale_in", "raw_scale_out")

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        self.raw_scale_in = nn.Parameter(inverse_softplus(torch.ones(spec.channels)))
        self.raw_scale_out = nn.Parameter(inverse_softplus(torch.ones(spec.channels)))

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Start with both scales the same.

        `paper`: 0.9 of the largest weight; for inputs the 95th percentile of those that are not zero.
        Signed inputs count by magnitude, as the paper has it; its code looks at the positive ones alone.
        """
        if rule != "paper":
            scale = initializers.clip(rule, stats, self.spec, self._codes() / self.spec.positive)
        elif self.spec.role == "weight":
            scale = torch.maximum(stats.largest, -stats.least) * WEIGHT_SHARE
        else:
            scale = _percentile_of_magnitudes(stats, INPUT_SHARE)
        for raw in (self.raw_scale_in, self.raw_scale_out):
            raw.copy_(inverse_softplus(scale.clamp_min(SMALLEST_STEP)))

    def _codes(self) -> Tensor:
        lowest = -self.spec.positive if self.spec.signed else 0
        return torch.arange(lowest, self.spec.positive + 1, device=self.raw_scale_in.device)

    def _scaled(self, codes: Tensor, raw: Tensor) -> Tensor:
        table = (softplus(raw) / self.spec.positive)[:, None] * codes
        return table if self.spec.granularity == "channel" else table[0]

    def levels(self) -> Tensor:
        """(K,) or (C, K), one of them exactly 0."""
        return self._scaled(self._codes(), self.raw_scale_out)

    def thresholds(self) -> Tensor:
        """(K-1,) or (C, K-1), in units of the input's scale."""
        return self._scaled(self._codes()[:-1] + 0.5, self.raw_scale_in)

    def quantize(self, x: Tensor) -> Tensor:
        """Round on the grid of the integers; both scales are outside of it, where autograd sees them."""
        shape = (-1, *[1] * (x.ndim - 1)) if self.spec.granularity == "channel" else (1,)
        scale_in, scale_out = (softplus(raw).view(shape) for raw in (self.raw_scale_in, self.raw_scale_out))
        most = self.spec.positive
        codes = quantize_to_grid(x * (most / scale_in), x.new_ones(1), -most if self.spec.signed else 0, most)
        return codes * (scale_out / most)

    def after_step(self) -> None:
        """Keep the softplus above the smallest step: in float32 it would reach 0."""
        for raw in (self.raw_scale_in, self.raw_scale_out):
            raw.data.clamp_(min=float(inverse_softplus(torch.tensor(SMALLEST_STEP, dtype=torch.float64))))


def inverse_softplus(x: Tensor) -> Tensor:
    """log(exp(x) - 1) for positive x, without overflow."""
    return x + torch.log(-torch.expm1(-x))


def _percentile_of_magnitudes(stats: TensorStats, share: float) -> Tensor:
    """(C,): at least as large as this share of the entries that are not zero."""
    sizes, order = stats.points.abs().sort(1)
    mass = (stats.mass.gather(1, order) * (sizes > 0)).cumsum(1)
    place = torch.searchsorted(mass, mass[:, -1:] * share).clamp_(max=mass.shape[1] - 1)
    return sizes.gather(1, place)[:, 0]
