"""APoT: levels are sums of powers of two under a learned clip. Li, Dong, Wang, ICLR 2020, arXiv:1909.13144."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import Quantizer, clip_factor, keep_positive
from nulsq_cli.ops import codebook, normalize
from nulsq_cli.ops.estimators import scale_gradient, straight_through
from nulsq_cli.values import Codebook, QuantSpec, TensorStats

WEIGHT_CLIP, INPUT_CLIP = 3.0, 8.0

# By the bits that code the magnitude: a level is one term of each group, summed; a term is 0 or 2**-shift.
SHIFTS = {
    1: ((0,),), 2: ((0, 1, 2),), 3: ((1, 2, 4), (3,)), 4: ((1, 3, 5), (2, 4, 6)),
    5: ((1, 3, 6), (2, 4, 7), (5,)), 6: ((1, 4, 7), (2, 5, 8), (3, 6, 9)),
}  # fmt: skip


def unit_levels(bits: int, signed: bool) -> Tensor:
    """The additive powers of two, ascending, with the highest at 1.

    Args:
        bits: 1..6 for the magnitude, and one more for the sign where there is one.
        signed: whether the levels are mirrored at zero, which is one of them.

    Returns:
        (2**bits,), or (2**bits - 1,) when signed; float64.

    Source: APoT, arXiv:1909.13144, eq. 5 and 6.
    """
    groups = [(0.0, *(2.0**-shift for shift in group)) for group in SHIFTS[bits - signed]]
    magnitudes = torch.tensor(sorted(sum(terms) for terms in product(*groups)), dtype=torch.float64)
    levels = magnitudes / magnitudes[-1]
    return torch.cat((-levels[1:].flip(0), levels)) if signed else levels


class APoT(Quantizer):
    """A learned clip times a fixed table of sums of powers of two.

    Signed tables have 2**bits - 1 levels. Weights are quantized with mean 0 and standard deviation 1
    and stay so: the BatchNorm that follows takes the scale. With a table per channel each channel is
    normalised by itself, which is ours. So are signed inputs: the form of the weights, not normalised.

    Args:
        spec: what this quantizer has to be, of 1 to 6 bits besides the sign.
        grad_scale: `lsq` multiplies the clip's gradient by sqrt(S / N), S the even levels above zero
            that would take as many bits; `none` by 1.
        weight_gradient: what weights get from theirs. `identity`, as released for CIFAR: all of it, mean
            and deviation taken as constants. `clipped`, as released for ImageNet: from 3 bits on nothing
            beyond the clip, and through mean and deviation.
    """

    of_any_width = ("clip",)
    unit: Tensor

    def __init__(self, spec: QuantSpec, *, grad_scale: str = "none", weight_gradient: str = "identity") -> None:
        super().__init__(spec)
        if weight_gradient not in ("identity", "clipped"):
            raise ValueError(f"weight_gradient is identity or clipped, got {weight_gradient!r}")
        self.grad_scale, self.weight_gradient = grad_scale, weight_gradient
        self.normalised = spec.role == "weight"
        self.clip = nn.Parameter(torch.ones(spec.channels))
        self.register_buffer("unit", unit_levels(spec.bits, spec.signed).float(), persistent=False)

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the clip. The constants of `paper` are 3 for weights and 8 for inputs, as released for CIFAR."""
        if rule == "paper":
            self.clip.fill_(WEIGHT_CLIP if self.normalised else INPUT_CLIP)
            return
        stats = initializers.standardized(stats) if self.normalised else stats
        self.clip.copy_(initializers.clip(rule, stats, self.spec, self.unit))

    def levels(self, clip: Tensor | None = None) -> Tensor:
        """(K,) or (C, K), one of them exactly 0."""
        table = (self.clip if clip is None else clip)[:, None] * self.unit
        return table if self.spec.granularity == "channel" else table[0]

    @torch.no_grad()
    def own_codebook(self, x: Tensor) -> Codebook:
        """The tables on the tensor as it is: weights are normalised by where their thresholds lie."""
        levels, thresholds = self.levels(), self.thresholds()
        if self.normalised:
            mean, std = normalize.moments(x, self.spec.channels)
            levels, thresholds = normalize.unfold(levels, thresholds, mean, std, rescale=False)
        return Codebook(levels, thresholds)

    def quantize(self, x: Tensor) -> Tensor:
        """To the nearest level; the gradient of the levels is that of the clip times the table."""
        levels = self.levels(scale_gradient(self.clip, clip_factor(x, self.spec, self.grad_scale)))
        if not self.normalised:
            return codebook.quantize_to_levels(x, levels)
        clipped = self.weight_gradient == "clipped"
        mean, std = normalize.moments(x if clipped else x.detach(), self.spec.channels)
        normal = normalize.standardize(x, mean, std)
        if clipped and self.spec.bits > 2:
            return codebook.quantize_to_levels(normal, levels)
        y = codebook.quantize_to_levels(normal.detach(), levels)
        return straight_through(y, y + normal)  # the levels have their own gradient, and the weights all of it

    def after_step(self) -> None:
        """Keep the clip positive."""
        keep_positive(self.clip.data[:, None])
