"""EWGS: gradients scaled, entry by entry, by the rounding error. Lee, Kim, Ham, CVPR 2021, arXiv:2104.00903."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import SMALLEST_SHARE, SMALLEST_STEP, Quantizer
from nulsq_cli.ops.estimators import from_unit, round_unit, to_unit
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
            error in units of the mapped interval; 0 is the plain straight-through rule. `hessian`, the
            paper's: the mean curvature of the loss at the rounded tensor, in units of three standard
            deviations of its gradient, or 0 where that is negative; 0 up to the first measurement.
        every: `hessian` measures at the start of every epoch whose number, from 0, this divides, but for
            epoch 0. The authors take 10 for CIFAR and 1 for ImageNet.
        batches: how many batches that takes; the authors' 3 for CIFAR, 10 for ImageNet.
    """

    of_any_width = ("lower", "upper", "output_scale", "delta")
    delta: Tensor

    def __init__(self, spec: QuantSpec, *, delta: float | str = "hessian", every: int = 10, batches: int = 3) -> None:
        if delta != "hessian" and not (isinstance(delta, int | float) and 0 <= delta < math.inf):
            raise ValueError(f"delta must be `hessian` or a number from 0 upwards, got {delta!r}")
        if not every >= 1 or not batches >= 1:
            raise ValueError(f"every and batches must be 1 or more, got {every} and {batches}")
        super().__init__(spec)
        self.batches, self.every = batches, every if delta == "hessian" else 0
        self.register_buffer("delta", torch.tensor(0.0 if delta == "hessian" else float(delta)))
        self.rounded: Tensor | None = None
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
        level = from_unit(place, self.spec.signed)
        return level * self.output_scale.abs() if self.spec.role == "weight" else level

    def thresholds(self) -> Tensor:
        """(K-1,): even, inside the learned interval."""
        middles = (torch.arange(self.spec.gaps, device=self.lower.device) + 0.5) / self.spec.gaps
        return self.lower + (self.upper - self.lower) * middles

    def quantize(self, x: Tensor) -> Tensor:
        """Clip and map by autograd; only the rounding has a rule of its own."""
        rounded = round_unit(to_unit(x, self.lower, self.upper), self.spec.gaps, self.delta)
        if self.watched:
            self.rounded = rounded
        return self._level(rounded)

    def curvature_batches(self, epoch: int) -> int:
        """As the options say; none in the first epoch."""
        return self.batches if self.every and epoch and epoch % self.every == 0 else 0

    def follow_curvature(self, ratio: float) -> None:
        """Take the ratio for delta, in thirds, where it is positive."""
        self.delta.fill_(max(ratio / 3, 0.0))

    @torch.no_grad()
    def after_step(self) -> None:
        """The interval may become small, not close or invert; o and -o are one scale, so the positive is kept."""
        reach = torch.maximum(self.lower.abs(), self.upper.abs())
        floor = self.lower + (reach * SMALLEST_SHARE).clamp_min(SMALLEST_STEP)
        torch.maximum(self.upper, floor, out=self.upper.data)
        if self.spec.role == "weight":
            self.output_scale.abs_().clamp_(min=SMALLEST_STEP)
