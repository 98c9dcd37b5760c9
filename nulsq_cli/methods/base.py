"""What every quantizer is: parameters, how they start, what they do in training, and a codebook at the end."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nulsq_cli.ops import codebook
from nulsq_cli.values import Codebook, QuantSpec, TensorStats

SMALLEST_SHARE = 1e-3
SMALLEST_STEP = 1e-8


class Quantizer(nn.Module):
    """Base of all quantizers. A method writes `initialize`, `quantize` and `levels`.

    In training mode the method's own formula runs, with its own gradient. In evaluation the
    codebook runs, so that the exported tables compute the very same numbers. Where the formula
    transforms its input first (tanh, normalisation) or scales its output, `codebook` folds that
    into the tables: thresholds live on the tensor as it comes in, levels are what goes out.

    Args:
        spec: what this quantizer has to be.
    """

    watched = False
    """Whether the rounded tensor is to be kept, with its graph, in `rounded`."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the parameters from the statistics of the tensor that will be quantized.

        Args:
            stats: of the tensor, or of each of its channels.
            rule: a name in `INITIALIZER_NAMES`; `paper` is what the method's authors do. A rule that
                makes no sense for a method gives way to the one nearest to it.
        """
        raise NotImplementedError

    def quantize(self, x: Tensor) -> Tensor:
        """Differentiable quantization of float32 x; keeps its shape."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """(K,) or (C, K) float32, ascending."""
        raise NotImplementedError

    def thresholds(self) -> Tensor:
        """(K-1,) or (C, K-1) float32: the boundaries between levels. By default their midpoints."""
        return codebook.midpoints(self.levels())

    @torch.no_grad()
    def codebook(self, x: Tensor) -> Codebook:
        """The tables that replace this quantizer at inference.

        Args:
            x: the tensor that is quantized. Most tables do not depend on it; those of methods that
                normalise their weights do.
        """
        return Codebook(self.levels().detach(), self.thresholds().detach())

    def trained_levels(self, x: Tensor) -> Tensor:
        """The levels of `codebook(x)`, with the gradient that training gives them; without one where tables fold x in."""
        return self.levels() if type(self).codebook is Quantizer.codebook else self.codebook(x).levels

    def targets(self, x: Tensor) -> Tensor:
        """Where on the axis of x, the quantizer's input, a value of each code is best off, (K,) or (C, K).

        Where quantizing is rounding to the nearest level, at the levels, differentiable as they are. Where
        outputs live on another axis (x is normalised, the output scaled), in the middle of each bin of x,
        without a gradient.
        """
        own = type(self)
        nearest = own.codebook is Quantizer.codebook and own.thresholds is Quantizer.thresholds
        return self.levels() if nearest else codebook.middles(self.codebook(x).thresholds)

    def steps(self) -> list[nn.Parameter]:
        """The learned quantizer parameters, which have their own optimizer."""
        return list(self.parameters())

    def penalty(self) -> Tensor | None:
        """A term that the method adds to the loss, (), or None."""
        return None

    def after_step(self) -> None:
        """Called after every optimizer update, for what no gradient can express."""

    def curvature_batches(self, epoch: int) -> int:
        """On how many batches the curvature of the loss is to be measured at the start of an epoch; mostly 0."""
        return 0

    def follow_curvature(self, ratio: float) -> None:
        """Take what was measured at `rounded`: the mean curvature over the standard deviation of the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x: in float32 also under autocast, returned in x's own dtype."""
        with torch.autocast(x.device.type, enabled=False):
            if self.training:
                return self.quantize(x.float()).to(x.dtype)
            tables = self.codebook(x.float())
            return codebook.lookup(x.float(), tables.levels, tables.thresholds).to(x.dtype)

    def extra_repr(self) -> str:
        """What shows up when the module is printed."""
        sign = "signed" if self.spec.signed else "unsigned"
        return f"{self.spec.bits} bits, {sign}, per {self.spec.granularity}"


@torch.no_grad()
def keep_positive(steps: Tensor) -> None:
    """Project steps in place: a gap may become small, a thousandth of its table's mean, but not close or invert.

    Args:
        steps: (..., N), any values; NaN stays NaN.
    """
    floor = steps.clamp_min(0).mean(-1, keepdim=True) * SMALLEST_SHARE
    torch.maximum(steps, floor.clamp_min(SMALLEST_STEP), out=steps)


def gradient_factor(x: Tensor, spec: QuantSpec, largest: int, mode: str) -> float:
    """The factor on step gradients: 1 for `none`, 1/sqrt(N * largest) for `lsq`.

    N is the number of weights that share the step, or of features in one sample: the batch is not
    counted, so that the factor does not depend on how a batch is split over processes.

    Source: LSQ, arXiv:1902.08153, section 2.2.
    """
    if mode == "none":
        return 1.0
    shared = x.numel() // spec.channels if spec.role == "weight" else x[0].numel()
    return float((shared * largest) ** -0.5)


def clip_factor(x: Tensor, spec: QuantSpec, mode: str) -> float:
    """`gradient_factor` of a step, for a clip that is as many steps wide as there are levels above zero."""
    factor = gradient_factor(x, spec, spec.positive, mode)
    return factor if mode == "none" else factor * spec.positive


class Table(Quantizer):
    """A quantizer that has nothing left to learn: the codebook of another one.

    Args:
        spec: what the quantizer was.
        tables: its codebook.
    """

    def __init__(self, spec: QuantSpec, tables: Codebook) -> None:
        super().__init__(spec)
        self.register_buffer("table_levels", tables.levels)
        self.register_buffer("table_thresholds", tables.thresholds)

    def levels(self) -> Tensor:
        """As given."""
        return self.table_levels

    def thresholds(self) -> Tensor:
        """As given."""
        return self.table_thresholds

    def quantize(self, x: Tensor) -> Tensor:
        """The same in training mode as in evaluation: there is no gradient to the tables."""
        return codebook.quantize_to_levels(x, self.table_levels)
