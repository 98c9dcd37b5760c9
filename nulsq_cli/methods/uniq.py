"""UniQ: a learned step; signed levels are symmetric, without a zero. Pham et al., IEEE Access 2021, arXiv:2104.00210."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.ops.native import Kind
from nulsq_cli.values import TensorStats


class UniQ(LSQ):
    """LSQ, but signed levels lie half a step off: +-1/2, +-3/2, ... steps.

    The authors quantize weights, and a signed network input, on this grid; inputs without negatives
    as LSQ does. Their gradient scale counts the batch in activations, ours does not (`gradient_factor`).

    Args:
        spec: what this quantizer has to be.
        grad_scale: `lsq` multiplies the step's gradient by 1/sqrt(N * positive), `none` by 1.
    """

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the step by an even rule; the authors' is `nmse`, made for this very grid."""
        super().initialize(stats, "nmse" if rule == "paper" else rule)

    def levels(self) -> Tensor:
        """(K,) or (C, K): the odd multiples of half the step if signed, else its multiples."""
        if not self.spec.signed:
            return super().levels()
        return super().levels() + (self.step / 2).view(-1, *[1] * (self.spec.granularity == "channel"))

    def quantize(self, x: Tensor) -> Tensor:
        """As LSQ around half a step; autograd carries both shifts to the step, where they cancel inside the ends."""
        if not self.spec.signed:
            return super().quantize(x)
        step = self.step_for(x)
        return quantize_to_grid(x - step / 2, step, *self.ends) + step / 2

    def operation(self, x: Tensor) -> tuple[Tensor, Kind] | None:
        """LSQ's where it quantizes as LSQ does."""
        return None if self.spec.signed else super().operation(x)
