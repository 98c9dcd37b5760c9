"""What every quantizer is: parameters, how they start, what they do in training, and a codebook at the end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli.initializers import RunningSums
from nulsq_cli.ops import codebook, fast, integer, native
from nulsq_cli.ops.estimators import straight_through
from nulsq_cli.ops.norm import norm_and_lookup, norm_and_quantize
from nulsq_cli.ops.relu import Both, relu_and_lookup, relu_and_quantize
from nulsq_cli.values import Codebook, QuantSpec, TensorStats

Tables = tuple[Tensor, Tensor | None, int | None]
"""Levels and thresholds, None for their midpoints; or gaps, None, and how many of them lie below zero."""

SMALLEST_SHARE = 1e-3
SMALLEST_STEP = 1e-8


def watched(module: nn.Module) -> bool:
    """Whether somebody has a hook on it, or another forward than its class's, or has compiled it."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
                or "forward" in module.__dict__ or module._compiled_call_impl is not None)  # fmt: skip


def watched_anywhere() -> bool:
    """Whether somebody has a hook on all modules there are."""
    hooks = nn.modules.module
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks
                or hooks._global_backward_pre_hooks)  # fmt: skip


class Quantizer(nn.Module):
    """Base of all quantizers. A method writes `initialize`, `quantize` and `levels`.

    In training mode the method's own formula runs, with its own gradient. In evaluation the
    codebook runs, so that the exported tables compute the very same numbers. Where the formula
    transforms its input first (tanh, normalisation) or scales its output, `own_codebook` folds that
    into the tables: thresholds live on the tensor as it comes in, levels are what goes out.

    On an integer grid (`spec.grid`) every level is a scale times an integer. The scale follows the
    largest level in a proportion, `grid_top`, that is chosen once, when the steps start: no level jumps
    because another one moved. Levels go to the nearest integer, gradients pass to them straight through.
    Thresholds are the midpoints of the levels on the grid where the method rounds to the nearest, else
    its own. Methods whose levels keep their ratios (`learned_shape` is False) lie on a grid as they are.

    Args:
        spec: what this quantizer has to be.
    """

    of_any_width: tuple[str, ...] = ()
    """Names in the state that mean the same whatever the number of bits."""

    watched = False
    """Whether the rounded tensor is to be kept, with its graph, in `rounded`."""

    learned_shape = False
    """Whether training changes the ratios between the levels; then `quantize` has to put them `on_grid`."""

    grid_top: Tensor

    kept: Tables | None = None
    """Of an input's quantizer, its tables, while nothing changes (`layers.standing_still`)."""

    def __init_subclass__(cls, **named: Any) -> None:
        super().__init_subclass__(**named)
        if "quantize" in vars(cls) and "operation" not in vars(cls):  # that of its base is another formula's
            cls.operation = Quantizer.operation  # type: ignore[method-assign]

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.grid != "float":
            self.register_buffer("grid_top", torch.full((spec.channels,), float(integer.limits(spec)[1])))

    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Set the parameters from the statistics of the tensor that will be quantized.

        Args:
            stats: of the tensor, or of each of its channels.
            rule: a name in `INITIALIZER_NAMES`; `paper` is what the method's authors do. A rule that
                makes no sense for a method gives way to the one nearest to it.
        """
        raise NotImplementedError

    @torch.no_grad()
    def inherit(self, before: Quantizer) -> None:
        """Take over what the quantizer in this one's place has learned: at the same width all, else what fits any width."""
        if type(self) is not type(before):
            return
        mine, theirs = self.state_dict(), before.state_dict()
        for name in mine if self.spec == before.spec else self.of_any_width:
            if name in mine and name in theirs:
                mine[name].copy_(theirs[name])

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
    def own_codebook(self, x: Tensor) -> Codebook:
        """The method's tables, wherever their levels lie.

        Args:
            x: as in `codebook`.
        """
        levels = self.levels().detach()
        midway = type(self).thresholds is Quantizer.thresholds  # then levels are not computed twice, for every batch
        return Codebook(levels, codebook.midpoints(levels) if midway else self.thresholds().detach())

    @torch.no_grad()
    def codebook(self, x: Tensor) -> Codebook:
        """The tables that replace this quantizer at inference.

        Args:
            x: the tensor that is quantized. Most tables do not depend on it; those of methods that
                normalise their weights do.
        """
        own = self.own_codebook(x)
        if self.spec.grid == "float":
            return own
        scale, integers = self._snapped(own.levels)
        levels = integer.values(integers, scale)
        return Codebook(levels, codebook.midpoints(levels) if self._nearest() else own.thresholds, scale, integers)

    def _snapped(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        scale = integer.scale_of(levels, self.grid_top if levels.ndim == 2 else self.grid_top[0])
        return scale, integer.nearest(levels, scale, *integer.limits(self.spec))

    def _nearest(self) -> bool:
        own = type(self)
        names = ("codebook", "own_codebook", "thresholds")
        return all(getattr(own, name) is getattr(Quantizer, name) for name in names)

    def on_grid(self, levels: Tensor) -> Tensor:
        """Levels, (K,) or (C, K), where the spec wants them; their gradient as if they had not moved."""
        if self.spec.grid == "float":
            return levels
        with torch.no_grad():
            scale, integers = self._snapped(levels)
            values = integer.values(integers, scale)
        return straight_through(values, levels)

    @torch.no_grad()
    def place_on_grid(self, stats: TensorStats, x: Tensor | None = None) -> None:
        """Choose the proportion of scale and levels, if there is a grid; once the parameters have started.

        Args:
            stats: of the tensor, or of each of its channels: they say how often each level is used.
            x: the weights; None for inputs.
        """
        if self.spec.grid == "float":
            return
        lowest, highest = integer.limits(self.spec)
        tables = self.own_codebook(self.grid_top.new_zeros(1) if x is None else x)
        thresholds = tables.thresholds.double().reshape(self.spec.channels, -1)
        counts = RunningSums(stats).between(thresholds.to(stats.points.device))[0]
        # Errors of inputs meet weights of both signs; errors of weights meet inputs that are mostly positive.
        coherence = 0.0 if x is None else integer.coherence_of(x[0].numel())
        self.grid_top.copy_(integer.best_top(
            tables.levels, counts.to(tables.levels.device).view(tables.levels.shape), lowest=lowest, highest=highest,
            coherence=coherence, finest=self.learned_shape))  # fmt: skip

    def trained_levels(self, x: Tensor) -> Tensor:
        """The levels of `codebook(x)`, with the gradient that training gives them; without one where tables fold x in."""
        if type(self).own_codebook is Quantizer.own_codebook:
            return self.on_grid(self.levels())
        return self.codebook(x).levels

    def targets(self, x: Tensor) -> Tensor:
        """Where on the axis of x, the quantizer's input, a value of each code is best off, (K,) or (C, K).

        Where quantizing is rounding to the nearest level, at the levels, differentiable as they are. Where
        outputs live on another axis (x is normalised, the output scaled), in the middle of each bin of x,
        without a gradient.
        """
        return self.on_grid(self.levels()) if self._nearest() else codebook.middles(self.codebook(x).thresholds)

    def steps(self) -> list[nn.Parameter]:
        """The learned quantizer parameters, which have their own optimizer; none where the plan says not to learn."""
        return [p for p in self.parameters() if p.requires_grad]

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
        """Quantize x: in float32 also under autocast, returned in x's own dtype.

        In training mode with the method's gradients. In evaluation mode the tables are looked up, nothing is learned, and the
        gradient to x is 1 between the outermost levels and 0 beyond.
        """
        kind = x.device.type
        if x.is_meta or not torch.is_autocast_enabled(kind):  # entering a context costs as much as a small weight's quantizing
            return self._quantized(x)
        with torch.autocast(kind, enabled=False):
            return self._quantized(x)

    def _quantized(self, x: Tensor) -> Tensor:
        return (self.quantize if self.training else self._by_tables)(x.float()).to(x.dtype)

    def _by_tables(self, x: Tensor) -> Tensor:
        table, thresholds, negative = self._tables_now(x)
        wanted = (torch.is_grad_enabled() and x.requires_grad) or fast.transformed()
        passes = wanted and not torch.jit.is_tracing()
        exact = x.detach() if passes else x
        y = codebook.nearest(exact, table, negative) if thresholds is None else codebook.lookup(exact, table, thresholds)
        if not passes:
            return y
        with torch.no_grad():
            places = self.targets(exact)
        low, high = (places[..., end].reshape(-1, *[1] * (x.ndim - 1)) for end in (0, -1))
        return y + torch.where((exact >= low) & (exact <= high), x - exact, 0)

    def _tables_now(self, x: Tensor) -> Tables:
        return self.tables(x) if self.kept is None or torch.compiler.is_compiling() else self.kept

    def tables(self, x: Tensor) -> Tables:
        """The numbers of `codebook(x)`, in the form that is looked up soonest."""
        if self.spec.grid == "float" and self._nearest():
            return self.levels().detach(), None, None
        found = self.codebook(x)
        return found.levels, found.thresholds, None

    def operation(self, x: Tensor) -> tuple[Tensor, native.Kind] | None:
        """The table and its kind, if `quantize(x)` is nothing but one operation of `ops` on them, which may be done elsewhere."""
        return None

    def behind_relu(self, x: Tensor, inplace: bool, alone: bool = False, norm: native.Norm | None = None,
                    shortcut: Tensor | None = None, top: float = native.NO_TOP) -> Both | None:  # fmt: skip
        """What a ReLU makes of x, and what this quantizer makes of that, in one pass.

        Args:
            x: what goes into the ReLU or, with `norm`, into the BatchNorm before it.
            inplace: x becomes the ReLU's result; with `norm` it may, outside of training.
            alone: nobody else reads that result: it may be the quantized one, without `norm` while the model stands still.
            norm: a BatchNorm that comes first.
            shortcut: what is added to what that hands on.
            top: the largest result of the ReLU; with `norm` that knows it.

        Returns:
            Both, with the bits and gradients of one after the other, with `norm` to the rounding of sums; None, and nothing is
            done, where that has no fast way.
        """
        if self.hooked or fast.recorded():
            return None
        if self.training:
            operation = self.operation(x)
            if operation is None:
                return None
            if norm is None:
                return relu_and_quantize(x, *operation, top=top, inplace=inplace)
            return norm_and_quantize(x, *operation, norm, shortcut, alone=alone)
        if torch.is_grad_enabled() and (x.requires_grad or norm is not None):
            return None
        tables = self._tables_now(x)
        if norm is None:
            return relu_and_lookup(x, *tables, top=top, inplace=inplace, alone=alone and self.kept is not None)
        return norm_and_lookup(x, *tables, norm, shortcut, inplace=inplace, alone=alone)

    @property
    def hooked(self) -> bool:
        """Whether somebody wants to know when this module is called, or has put something else in its place."""
        return watched(self) or watched_anywhere()

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
    if steps.shape[-1] == 1:
        steps.clamp_min_(SMALLEST_STEP)
        return
    if fast.readable(steps) and steps.is_contiguous():
        native.keep_positive(steps, SMALLEST_SHARE, SMALLEST_STEP)
        return
    floor = steps.clamp_min(0).mean(-1, keepdim=True).mul_(SMALLEST_SHARE).clamp_min_(SMALLEST_STEP)
    torch.maximum(steps, floor, out=steps)


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
        for part, table in vars(tables).items():
            self.register_buffer(f"table_{part}", table)

    def codebook(self, x: Tensor) -> Codebook:
        """As given."""
        return Codebook(self.table_levels, self.table_thresholds, self.table_scale, self.table_integers)

    def levels(self) -> Tensor:
        """As given."""
        return self.table_levels

    def thresholds(self) -> Tensor:
        """As given."""
        return self.table_thresholds

    def quantize(self, x: Tensor) -> Tensor:
        """The same in training mode as in evaluation: there is no gradient to the tables."""
        return codebook.quantize_to_levels(x, self.table_levels)
