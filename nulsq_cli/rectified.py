"""ReLUs, and BatchNorms before them, that quantize what they hand on, for the layer that reads it.

This is `ops/relu.py` and `ops/norm.py` in the place of modules of a model.
"""

from __future__ import annotations

from functools import cached_property
from threading import get_ident
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from nulsq_cli.layers import QuantLayer, in_trace, prepare
from nulsq_cli.ops.native import NO_TOP, Norm
from nulsq_cli.ops.remake import checkpointed


class Switch:
    """Whether nobody sees what goes through a model: modules may do what others do after them, or hand on something else.

    That is while this thread is inside.
    """

    thread: int | None = None
    of: int | None = None
    """The identity of the model whose forward may turn it on."""
    entered = 0
    """How many contexts allow that now."""

    @property
    def on(self) -> bool:
        """Whether it is so."""
        return self.thread == get_ident()

    def __enter__(self) -> None:
        self.thread = get_ident()

    def __exit__(self, *_: object) -> None:
        self.thread = None


class QuantAct(nn.Module):
    """A ReLU that knows a layer which reads its result. What comes out is the same, and so are all gradients.

    Of those that reach the result the layer's is added last; where there are more than two, that may be another order
    than a plain ReLU's. Made from a ReLU by `pairing.pair`. The layer is no child of it: it has its own place in the model.
    """

    reader: QuantLayer
    alone: bool
    """Whether nobody else reads the result."""
    overwrites: bool
    """Whether it works in place, and nobody else reads what it is made from."""
    switch: Switch
    top: float
    """The largest result, if there is one."""

    def forward(self, input: Tensor) -> Tensor:
        """(...) to the same shape."""
        x = input
        if isinstance(x, fx.Proxy):
            return in_trace(self, x)  # type: ignore[return-value]
        quantizer = None if torch.compiler.is_compiling() else self.reader.input_quantizer
        if quantizer is None or checkpointed():
            return super().forward(x)
        if x.__dict__.pop("_nulsq_rectified", None) is self:  # by the BatchNorm before it
            return x
        unseen = self.switch.on
        if not unseen and (torch.is_inference_mode_enabled() or x.is_inference()):  # a change in place would not be counted
            return super().forward(x)
        both = quantizer.behind_relu(x, self.inplace, unseen and self.alone and self.overwrites, top=self.top)
        return super().forward(x) if both is None else prepare(*both, self.reader)


class QuantReLU(QuantAct, nn.ReLU):
    """Of `nn.ReLU`."""

    top = NO_TOP


class QuantReLU6(QuantAct, nn.ReLU6):
    """Of `nn.ReLU6`."""

    @property
    def top(self) -> float:
        """As torch has it."""
        return self.max_val


class BehindNorm(nn.BatchNorm2d):
    """What both kinds below share."""

    relu: QuantAct
    switch: Switch
    overwrites: bool
    """Whether a layer made what this one reads, and nobody else reads it."""
    adds: bool
    """Whether something is added to the result, which the ReLU then reads."""

    def plain(self, x: Tensor) -> Tensor:
        """What the module that it was does."""
        return nn.BatchNorm2d.forward(self, x)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        x = input
        if isinstance(x, fx.Proxy):
            return in_trace(self, x)  # type: ignore[return-value]
        if torch.compiler.is_compiling() or not self.switch.on or checkpointed():
            return self.plain(x)
        quantizer = self.relu.reader.input_quantizer
        if quantizer is None or not self.track_running_stats:
            return self.plain(x)
        if self.adds:
            return _Unfinished(self, x)  # type: ignore[return-value]
        y = self.with_relu(x)
        return self.plain(x) if y is None else y

    def with_relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """What the ReLU makes of it or, where nobody would notice, that quantized; None, and nothing is done, if no loop can."""
        relu = self.relu
        share = 1 / (1 + int(self.num_batches_tracked)) if self.momentum is None else self.momentum
        norm = Norm(self.weight, self.bias, self.running_mean, self.running_var, share, self.eps, self.training, relu.top)
        both = relu.reader.input_quantizer.behind_relu(x, self.overwrites, relu.alone, norm, shortcut)
        if both is None:
            return None
        if self.training:
            self.num_batches_tracked.add_(1)
        y = prepare(*both, relu.reader)
        y._nulsq_rectified = relu  # type: ignore[attr-defined]
        return y


class QuantNorm(BehindNorm):
    """A BatchNorm that knows the ReLU which reads its result, and nobody else does: it does the ReLU's work as well.

    Inside of `pairing.one_operation` only. What it computes with has a plain BatchNorm's bits, but in training with channels
    last or planes of one pixel: there sums are added in another order, as those of gradients and running statistics are in
    any layout. Made by `pairing.pair`, as a `QuantReLU` is.
    """


class QuantNormAct(BehindNorm, BatchNormAct2d):
    """The same for timm's BatchNorm that has the ReLU inside, or nothing."""

    def plain(self, x: Tensor) -> Tensor:
        """What the module that it was does."""
        return BatchNormAct2d.forward(self, x)

    def with_relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """As above; a ReLU inside lets it pass."""
        y = super().with_relu(x, shortcut)
        return y if y is None or self.act is not self.relu else self.act(y)


class _Unfinished:
    """What a BatchNorm would hand on, were not something added to it next: the addition does the BatchNorm's work as well.

    `pairing.pair` has proved that nothing else is done with it. Were something, it would be a tensor for that.
    """

    def __init__(self, norm: BehindNorm, x: Tensor) -> None:
        self._norm, self._x = norm, x

    def __add__(self, shortcut: Any) -> Tensor:
        fresh = isinstance(shortcut, Tensor) and "_tensor" not in self.__dict__
        y = self._norm.with_relu(self._x, shortcut) if fresh else None
        return self._tensor + shortcut if y is None else y

    __iadd__ = __radd__ = __add__

    @cached_property
    def _tensor(self) -> Tensor:
        return self._norm.plain(self._x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.add, Tensor.__add__) and len(args) == 2 and not kwargs and isinstance(args[1], cls):
            return args[1] + args[0]
        finished = lambda value: tree_map_only(cls, lambda one: one._tensor, value)  # noqa: E731
        return func(*finished(args), **finished(kwargs or {}))


for _name in ("sub", "rsub", "mul", "rmul", "truediv", "neg", "getitem"):
    setattr(_Unfinished, f"__{_name}__", lambda self, *other, _name=_name: getattr(self._tensor, f"__{_name}__")(*other))
