"""EWGS: gradients scaled, entry by entry, by the rounding error. Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import SMALLEST_SHARE, SMALLEST_STEP, Quantizer
from nulsq_cli.ops.estimators import round_unit, to_unit
from nulsq_cli.values import QuantSpec, TensorStats

HALF_NORMAL_STD = math.sqrt(1 - 2 / math.pi)
"""The standard deviation of |z| for a standard normal z."""


class EWGS(Quantizer):
    """A learned interval is mapped to [0, 1], or to [-1, 1] if signed, and rounded there.

    What goes out is not on the scale of what comes in. The paper multiplies a layer's output by a
    learned |o|; here o multiplies the quantized weight, which is the same but for the bias: the paper's
    convolutions have none, and ours is left alone. The paper's activations are unsigned; signed ones get
    the weights' form, without o, which is ours.

    Args:
        spec: what this quantizer has to be.
        delta: strength of the scaling: a gradient g becomes g * (1 + delta * sign(g) * error), with the
            error in units of the mapped interval; 0 is the plain straight-through rule.
    """

    def __init__(self, spec: QuantSpec, *, delta: float = 1e-3) -> None:
        if not 0 <= delta < math.inf:
            raise ValueError(f"delta must be a number from 0 upwards, got {delta}")
        super().__init__(spec)
        self.delta = delta
        self.lower = nn.Parameter(torch.full((1,), -1.0 if spec.signed else 0.0))
        self.upper = nn.Parameter(torch.ones(1))
        if spec.role == "weight":
            self.output_scale = nn.Parameter(torch.ones(1))

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the interval by the authors' three sigmas, or so that levels lie one even step apart.

        The output scale starts where weights keep their size; `calibrate.match_output_scales`
        then makes layers keep theirs.
        """
        if rule != "paper":
            width = initializers.even(rule)(stats, self.spec)[:, 0] * self.spec.gaps
            self.lower.copy_(-width / 2 if self.spec.signed else 0 * width)
            self.upper.copy_(self.lower + width)
        elif self.spec.signed:
            self.upper.copy_(3 * stats.std)
            self.lower.copy_(-self.upper)
        else:
            self.upper.copy_(3 * stats.std / HALF_NORMAL_STD)
            self.lower.copy_(stats.least)
        if self.spec.role == "weight":
            self.output_scale.copy_((self.upper - self.lower) / 2)

    def levels(self) -> Tensor:
        """(K,): even, over [-|o|, |o|] for weights, [-1, 1] or [0, 1] for activations."""
        return self._level(torch.arange(self.spec.levels, device=self.lower.device) / self.spec.gaps)

    def _level(self, place: Tensor) -> Tensor:
        level = 2 * place - 1 if self.spec.signed else place
        return level * self.output_scale.abs() if self.spec.role == "weight" else level

    def thresholds(self) -> Tensor:
        """(K-1,): even, inside the learned interval."""
        middles = (torch.arange(self.spec.gaps, device=self.lower.device) + 0.5) / self.spec.gaps
        return self.lower + (self.upper - self.lower) * middles

    def quantize(self, x: Tensor) -> Tensor:
        """Clip and map by autograd; only the rounding has a rule of its own."""
        return self._level(round_unit(to_unit(x, self.lower, self.upper), self.spec.gaps, self.delta))

    @torch.no_grad()
    def after_step(self) -> None:
        """The interval may become small, not close or invert; o and -o are one scale, so the positive is kept."""
        reach = torch.maximum(self.lower.abs(), self.upper.abs())
        floor = self.lower + (reach * SMALLEST_SHARE).clamp_min(SMALLEST_STEP)
        torch.maximum(self.upper, floor, out=self.upper.data)
        if self.spec.role == "weight":
            self.output_scale.abs_().clamp_(min=SMALLEST_STEP)
