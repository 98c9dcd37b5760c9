"""LSQ: one learned step per tensor, or per output channel. Esser et al., ICLR 2020, arXiv:1902.08153."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import Quantizer, gradient_factor, keep_positive
from nulsq_cli.ops.estimators import scale_gradient
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.ops.native import Kind
from nulsq_cli.values import QuantSpec, TensorStats


class LSQ(Quantizer):
    """Levels are the integers -negative..positive times one step.

    Args:
        spec: what this quantizer has to be.
        grad_scale: `lsq` multiplies the step's gradient by 1/sqrt(N * positive), `none` by 1.
    """

    def __init__(self, spec: QuantSpec, *, grad_scale: str = "none") -> None:
        super().__init__(spec)
        self.grad_scale = grad_scale
        self.step = nn.Parameter(torch.ones(spec.channels))
        self.ends = -spec.negative, spec.positive

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the step by an even rule; `lloyd`, which is not even, gives way to `mse`."""
        rule = "lsq" if rule == "paper" else rule
        self.step.copy_(initializers.even(rule)(stats, self.spec)[:, 0])

    def levels(self) -> Tensor:
        """(K,) or (C, K): the multiples of the step."""
        codes = torch.arange(-self.spec.negative, self.spec.positive + 1, device=self.step.device)
        table = self.step[:, None] * codes
        return table if self.spec.granularity == "channel" else table[0]

    def trained_levels(self, x: Tensor) -> Tensor:
        """With the factor on the step's gradient: levels are proportional to it."""
        return self.on_grid(scale_gradient(self.levels(), gradient_factor(x, self.spec, self.spec.positive, self.grad_scale)))

    def step_for(self, x: Tensor) -> Tensor:
        """The step in the shape that meets x, its gradient scaled."""
        factor = gradient_factor(x, self.spec, self.ends[1], self.grad_scale)
        step = scale_gradient(self.step, factor)
        return step.view(-1, *[1] * (x.ndim - 1)) if self.spec.granularity == "channel" else step

    def operation(self, x: Tensor) -> tuple[Tensor, Kind]:
        """On an even grid."""
        return self.step_for(x), self.ends

    def quantize(self, x: Tensor) -> Tensor:
        """Arithmetic, so that any bit width costs the same."""
        return quantize_to_grid(x, self.step_for(x), *self.ends)

    def after_step(self) -> None:
        """Keep every step positive; each is a table of its own."""
        keep_positive(self.step.data[:, None])
