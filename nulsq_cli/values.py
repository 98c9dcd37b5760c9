"""The small frozen values that the rooms exchange. Importing this loads no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nulsq_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["tensor", "channel"]
Role = Literal["weight", "activation"]
Grid = Literal["float", "int8"]
"""Where levels may lie: anywhere, or on a scale times integers of 8 bits, which runtimes for int8 compute exactly."""

FLOAT_BITS = 32
"""The width that stands for "leave it in float"."""


@dataclass(frozen=True)
class Bits:
    """Weight and activation widths, each 2..8, or 32 for float."""

    weights: int
    activations: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read `W/A`, for instance `3/3` or `4/32`.

        Raises:
            UsageError: not two numbers around a slash, or a width that does not exist.
        """
        parts = str(text).split("/")
        if len(parts) != 2 or not all(re.fullmatch(r"\s*[0-9]{1,2}\s*", p) for p in parts):
            raise UsageError(
                f"bits must be WEIGHTS/ACTIVATIONS, got {str(text)[:40]!r}",
                fix="write for instance 3/3, or 4/32 for weights only",
            )
        widths = cls(*(int(p) for p in parts))
        for width in (widths.weights, widths.activations):
            if width != FLOAT_BITS and not 2 <= width <= 8:
                raise UsageError(
                    f"bits must be 2..8, or 32 for float, got {text}",
                    fix="write for instance 2/2, 3/3 or 4/4",
                )
        return widths

    def __str__(self) -> str:
        return f"{self.weights}/{self.activations}"


@dataclass(frozen=True)
class QuantSpec:
    """What one quantizer has to be.

    Args:
        bits: 2..8.
        signed: whether levels below zero exist.
        role: `weight` or `activation`.
        granularity: one level table for the tensor, or one per output channel (weights only).
        channels: number of output channels; 1 when granularity is `tensor`.
        grid: where levels may lie.
    """

    bits: int
    signed: bool
    role: Role = "activation"
    granularity: Granularity = "tensor"
    channels: int = 1
    grid: Grid = "float"

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return 2**self.bits

    @property
    def gaps(self) -> int:
        """How many gaps between neighbouring levels there are."""
        return 2**self.bits - 1

    @property
    def negative(self) -> int:
        """How many levels lie below zero: 2**(bits-1) when signed, else none."""
        return 2 ** (self.bits - 1) if self.signed else 0

    @property
    def positive(self) -> int:
        """How many levels lie above zero."""
        return self.gaps - self.negative


@dataclass(frozen=True)
class Codebook:
    """All that is left of a quantizer at inference: code = count(x > thresholds), value = levels[code].

    Args:
        levels: (K,) or (C, K) float32, ascending, in the tensor's own units.
        thresholds: (K-1,) or (C, K-1) float32, ascending.
        scale, integers: on an integer grid, levels = integers * scale, rounded once; () or (C,) float32 and
            int16 like levels. Else None.
    """

    levels: Tensor
    thresholds: Tensor
    scale: Tensor | None = None
    integers: Tensor | None = None

    @property
    def per_channel(self) -> bool:
        """Whether each output channel has its own table."""
        return self.levels.ndim == 2


@dataclass(frozen=True)
class Score:
    """Accuracy over all samples of a split; `top1` and `top5` in percent, `loss` the mean cross entropy."""

    top1: float
    top5: float
    loss: float
    samples: int


@dataclass(frozen=True)
class Phase:
    """One stretch of a run.

    Args:
        name: for people.
        epochs: how long.
        bits: the model's widths meanwhile; first and last layers keep theirs.
        lesson: `labels`; `tutor`, labels and a frozen teacher; `mutual`, the teacher learns from the student too.
        continues: whether optimizers and schedule go on from the phase before, or start anew.
        only_norms: norms, biases and steps train, weights stand still.
        samples_instability: meanwhile measure how much updates of a layer's codes shake its output.
        frozen_share: 0..1, the share of layers, the most unstable first, whose weights stand still.
        teacher_lr: the teacher's learning rate in a `mutual` lesson.
    """

    name: str
    epochs: int
    bits: Bits
    lesson: Literal["labels", "tutor", "mutual"] = "labels"
    continues: bool = False
    only_norms: bool = False
    samples_instability: bool = False
    frozen_share: float = 0.0
    teacher_lr: float = 0.0


@dataclass(frozen=True)
class TensorStats:
    """What was measured of a tensor: exact moments, and its distribution as weighted points.

    All float64. C is 1 for statistics of a whole tensor, else the number of output channels.

    Args:
        count: how many entries each of the C distributions has.
        mean, mean_abs, mean_square, std: (C,); std is the unbiased one.
        least, largest: (C,).
        points: (C, P), ascending.
        mass: (C, P), how many entries each point stands for.
    """

    count: int
    mean: Tensor
    mean_abs: Tensor
    mean_square: Tensor
    std: Tensor
    least: Tensor
    largest: Tensor
    points: Tensor
    mass: Tensor


INITIALIZER_NAMES = ("nmse", "lsq", "lloyd", "mse", "paper")
"""The rules that start steps. `initializers.py` holds them; `paper` is each method's own."""
