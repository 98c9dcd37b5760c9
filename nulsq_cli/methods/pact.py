"""PACT: the value at which activations are clipped is learned. Choi et al., 2018, arXiv:1805.06085."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.ops.estimators import clip, straight_through
from nulsq_cli.ops.grid import quantize_to_grid
from nulsq_cli.values import QuantSpec, TensorStats

SMALLEST_ALPHA = 1e-3


class PACT(Quantizer):
    """Even levels up to alpha. Only clipped activations move alpha, and only upwards; the penalty brings it down.

    Signed inputs, which the paper does not have, get LSQ's codes -negative..positive with alpha the
    level of the code `positive`, and are clipped on both sides; that form is ours.

    Args:
        spec: what this quantizer has to be; on weights, PACT uses DoReFa.
        alpha: where the rule `paper` starts, in the input's units.
        penalty: adds penalty / 2 * alpha**2 to the loss. The default is the order of a usual weight
            decay, as in the paper; set 0 where the steps' optimizer has a weight decay, as in the
            CIFAR recipes: both bring alpha down.
    """

    of_any_width = ("alpha",)

    def __init__(self, spec: QuantSpec, *, alpha: float = 10.0, penalty: float = 1e-4) -> None:
        if not alpha > 0 or not penalty >= 0:
            raise ValueError(f"alpha must be positive and penalty 0 or positive, got {alpha} and {penalty}")
        super().__init__(spec)
        self.start, self.strength = alpha, penalty
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set alpha to the authors' constant, or to the largest level of an even rule."""
        if rule == "paper":
            self.alpha.fill_(self.start)
        else:
            self.alpha.copy_(initializers.even(rule)(stats, self.spec)[:, 0] * self.spec.positive)

    def levels(self) -> Tensor:
        """(K,): even, the last one alpha."""
        codes = torch.arange(-self.spec.negative, self.spec.positive + 1, device=self.alpha.device)
        return self.alpha / self.spec.positive * codes

    def quantize(self, x: Tensor) -> Tensor:
        """Rounded in the forward pass, merely clipped in the backward pass: no rounding residual reaches alpha."""
        codes = -self.spec.negative, self.spec.positive
        rounded = quantize_to_grid(x.detach(), self.alpha.detach() / self.spec.positive, *codes)
        return straight_through(rounded, clip(x, self.alpha * (codes[0] / codes[1]), self.alpha))

    def penalty(self) -> Tensor | None:
        """Half the penalty's strength times alpha squared, ()."""
        return self.strength / 2 * self.alpha.square().sum() if self.strength else None

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep alpha positive."""
        self.alpha.clamp_(min=SMALLEST_ALPHA)
