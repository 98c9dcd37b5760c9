"""LLSQ: the step follows a simulated gradient, toward less quantization error. Zhao, Wang, Cai, Liu, Zhang, ICLR 2020."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.initializers import SMALLEST
from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.ops.estimators import straight_through
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec, TensorStats


class LLSQ(LSQ):
    """LSQ's levels, but the task's loss does not move the step a: its gradient is -a**2, 0 or a**2.

    It is taken anew for every training batch, toward whichever of a/2, a and 2a quantizes the tensor at
    hand with the least error. It comes as a `penalty`, whose value is 0, so that batches gathered for one
    update and processes are averaged, and what scales the loss scales it, too.

    Args:
        spec: what this quantizer has to be.
        error: `l2` compares mean squared errors, `l1` mean absolute ones.
    """

    def __init__(self, spec: QuantSpec, *, error: str = "l2") -> None:
        if error not in ("l1", "l2"):
            raise ValueError(f"error is l1 or l2, got {error!r}")
        super().__init__(spec)
        self.error = error
        self.simulated: Tensor | None = None

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the step by an even rule; the authors' one takes it from the largest magnitude."""
        if rule != "paper":
            return super().initialize(stats, rule)
        positive, bits = self.spec.positive, self.spec.bits
        if self.spec.role == "weight":
            codes = positive if self.spec.granularity == "channel" else 2 ** (bits - 1)
        else:
            codes = positive + 1 if bits >= 4 else 2 * positive
        self.step.copy_((torch.maximum(stats.largest, -stats.least) / codes).clamp_min(SMALLEST))

    def quantize(self, x: Tensor) -> Tensor:
        """Gradient to x: identity for weights, clipped for activations."""
        y = self._rounded(x, 1)
        if self.spec.role == "weight":
            y = straight_through(y, x)
        wanted = torch.is_grad_enabled() and self.step.requires_grad
        self.simulated = self.simulated_gradient(x) if wanted else None
        return y

    def penalty(self) -> Tensor | None:
        """0, with the simulated gradient of the last training batch to the step, ()."""
        return None if self.simulated is None else ((self.step - self.step.detach()) * self.simulated).sum()

    @torch.no_grad()
    def simulated_gradient(self, x: Tensor) -> Tensor:
        """-a**2 where 2a is the best of three steps, a**2 where a/2 is, else 0; (1,) or (C,).

        Equal errors: a/2 goes before 2a, and 2a before a.
        """
        half, own, double = (self._error(x, factor) for factor in (0.5, 1, 2))
        smaller = (half <= own) & (half <= double)
        larger = (double <= own) & ~smaller
        return self.step.square() * (smaller.float() - larger.float())

    def _rounded(self, x: Tensor, factor: float) -> Tensor:
        return quantize_to_grid(x, self.step_for(x).detach() * factor, *self.ends)

    def _error(self, x: Tensor, factor: float) -> Tensor:
        apart = self._rounded(x, factor) - x
        errors = apart.square() if self.error == "l2" else apart.abs()
        return errors.reshape(self.spec.channels, -1).mean(1, dtype=torch.float64)
