"""LCQ: levels that are even after a learned compression. Yamamoto, CVPR 2021, arXiv:2103.07156."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nulsq_cli import initializers
from nulsq_cli.methods.base import Quantizer, clip_factor, keep_positive
from nulsq_cli.ops import companding, normalize
from nulsq_cli.ops.codebook import lookup
from nulsq_cli.ops.estimators import scale_gradient, straight_through
from nulsq_cli.values import Codebook, QuantSpec, TensorStats

KNOTS = 16
SMALLEST_RISE = 1e-4
WEIGHT_CLIP, INPUT_CLIP = 3.0, 8.0


class LCQ(Quantizer):
    """A clip and a piecewise linear curve of 16 intervals that rises from 0 to 1 below it.

    Signed tables mirror the curve at zero and so have 2**bits - 1 levels; at 2 bits nothing is left
    of the curve. Weights are quantized with mean 0 and standard deviation 1 and multiplied by the
    latter again: limited weight normalisation. With a table per channel each channel is normalised
    by itself, which is ours. So are signed inputs: the form of the weights, not normalised.

    Args:
        spec: what this quantizer has to be.
        grad_scale: `lsq` multiplies the gradients of clip and curve by sqrt(S / N), S the levels above
            zero; `none` by 1.
        level_bits: rounds every level to an integer of this many bits times the clip over the largest such
            integer, so that a small table of integers holds them; gradients are those of the level before.
            None leaves levels as the curve has them, as the nuLSQ authors' port does; the paper re-quantizes
            them, to a width that we do not know.
    """

    learned_shape = True
    of_any_width = ("clip", "theta")

    def __init__(self, spec: QuantSpec, *, grad_scale: str = "none", level_bits: int | None = None) -> None:
        if level_bits is not None and not spec.bits <= level_bits <= 16:
            raise ValueError(f"level_bits must be from {spec.bits}, the width of the codes, to 16, got {level_bits}")
        super().__init__(spec)
        self.grad_scale = grad_scale
        self.fine = None if level_bits is None else 2 ** (level_bits - spec.signed) - 1
        self.normalised = spec.role == "weight"
        self.clip = nn.Parameter(torch.ones(spec.channels))
        theta = torch.zeros(spec.channels, KNOTS)
        if spec.positive > 1:
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Start from the straight curve. The constants of `paper` are 3 for weights and 8 for inputs."""
        self.theta.zero_()
        if rule == "paper":
            self.clip.fill_(WEIGHT_CLIP if self.normalised else INPUT_CLIP)
            return
        stats = initializers.standardized(stats) if self.normalised else stats
        lowest = -self.spec.positive if self.spec.signed else 0
        even = torch.arange(lowest, self.spec.positive + 1) / self.spec.positive
        self.clip.copy_(initializers.clip(rule, stats, self.spec, even))

    def levels(self) -> Tensor:
        """(K,) or (C, K), one of them exactly 0; of the normalised weights where they are normalised."""
        return self._tables()[0]

    def thresholds(self) -> Tensor:
        """(K-1,) or (C, K-1): no midpoints where the curve bends between two levels."""
        return self._tables()[1]

    def _form(self) -> tuple[int, bool, int | None]:
        return self.spec.positive, self.spec.signed, self.fine

    def _tables(self) -> tuple[Tensor, Tensor]:
        levels, thresholds = companding.tables(self.clip, *companding.curve(self.theta), *self._form())
        return (levels, thresholds) if self.spec.granularity == "channel" else (levels[0], thresholds[0])

    @torch.no_grad()
    def own_codebook(self, x: Tensor) -> Codebook:
        """The tables on the tensor as it is, with the normalisation folded in; the mean stays out of the levels."""
        levels, thresholds = self._tables()
        if self.normalised:
            mean, std = normalize.moments(x, self.spec.channels)
            levels, thresholds = normalize.unfold(levels, thresholds, mean, std, rescale=True)
        return Codebook(levels, thresholds)

    def quantize(self, x: Tensor) -> Tensor:
        """Through the curve and back; for weights with gradients through mean and standard deviation too."""
        y = self._companded(x)
        if self.spec.grid == "float":
            return y
        tables = self.codebook(x)
        return straight_through(lookup(x, tables.levels, tables.thresholds), y)

    def _companded(self, x: Tensor) -> Tensor:
        factor = clip_factor(x, self.spec, self.grad_scale)
        clip, slopes, heights = (scale_gradient(p, factor) for p in (self.clip, *companding.curve(self.theta)))
        if not self.normalised:
            return companding.compand(x, clip, slopes, heights, *self._form())
        mean, std = normalize.moments(x, self.spec.channels)
        normal = normalize.standardize(x, mean, std)
        y = companding.compand(normal, clip, slopes, heights, *self._form())
        return (y.view(self.spec.channels, -1) * std).view(x.shape)

    def after_step(self) -> None:
        """Keep the clip positive, and every interval rising: gradients divide by its rise twice."""
        keep_positive(self.clip.data[:, None])
        total = self.theta.data.logsumexp(1, keepdim=True)
        self.theta.data.clamp_(min=total + math.log(SMALLEST_RISE))
