"""ReLUs, and BatchNorms before them, that quantize what they hand on, for the layer that reads it.

This is `ops/relu.py` and `ops/norm.py` in the place of modules of a model.
"""

from __future__ import annotations

import operator
from collections import Counter
from functools import cached_property
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from nulsq_cli.errors import UsageError
from nulsq_cli.layers import QuantLayer, evaluating, prepare, quant_layers
from nulsq_cli.ops.native import Norm


class QuantReLU(nn.ReLU):
    """A ReLU that knows a layer which reads its result. What comes out is the same, and so are all gradients.

    Of those that reach the result the layer's is added last; where there are more than two, that may be another order
    than a plain ReLU's. Made from a ReLU by `pair`. The layer is no child of it: it has its own place in the model.
    """

    reader: QuantLayer
    alone: bool
    """Whether nobody else reads the result."""
    overwrites: bool
    """Whether it works in place, and nobody else reads what it is made from."""
    places: tuple[tuple[nn.Module, str, nn.Module], ...]
    """Where this module and the reader are: (parent, name, module)."""
    awaits = False
    """Whether the BatchNorm before it has done its work, so that only that result may come."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to the same shape.

        Raises:
            UsageError: what comes is not what the BatchNorm before made, as it was when they were paired.
        """
        quantizer = None if torch.compiler.is_compiling() else self.reader.input_quantizer
        if quantizer is None:
            return super().forward(x)
        if x.__dict__.pop("_nulsq_rectified", None) is self:
            self.__dict__["awaits"] = False
            return x
        if self.awaits:
            raise UsageError("something new stands between a BatchNorm and its ReLU, which are one operation here",
                             fix="change a model before it is quantized")  # fmt: skip
        if self.moved:
            return super().forward(x)
        both = quantizer.behind_relu(x, self.inplace, self.alone and self.overwrites and not self.watched)
        return super().forward(x) if both is None else prepare(*both, self.reader)

    @property
    def moved(self) -> bool:
        """Whether this module or the reader is no longer where it was: the model is another one then."""
        return any(parent._modules.get(name) is not module for parent, name, module in self.places)

    @property
    def watched(self) -> bool:
        """Whether somebody wants to see what this hands on."""
        return bool(self._forward_hooks or self.reader._forward_pre_hooks or self.reader._forward_hooks)


class _BehindNorm(nn.BatchNorm2d):
    relu: QuantReLU
    overwrites: bool
    """Whether a layer made what this one reads, and nobody else reads it."""
    adds: bool
    """Whether something is added to the result, which the ReLU then reads."""

    def plain(self, x: Tensor) -> Tensor:
        """What the module that it was does."""
        return nn.BatchNorm2d.forward(self, x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        if torch.compiler.is_compiling():
            return self.plain(x)
        relu = self.relu
        relu.__dict__["awaits"] = False
        if relu.reader.input_quantizer is None or relu.moved:
            return self.plain(x)
        if self._forward_hooks or relu._forward_pre_hooks:  # somebody wants to see what lies between
            return self.plain(x)
        if self.adds:
            return _Unfinished(self, x)  # type: ignore[return-value]
        y = self.with_relu(x)
        return self.plain(x) if y is None else y

    def with_relu(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor | None:
        """What the ReLU makes of it or, where nobody would notice, that quantized; None, and nothing is done, if no loop can."""
        relu = self.relu
        share = 1 / (1 + int(self.num_batches_tracked)) if self.momentum is None else self.momentum
        norm = Norm(self.weight, self.bias, self.running_mean, self.running_var, share, self.eps, self.training)
        both = relu.reader.input_quantizer.behind_relu(
            x, self.overwrites and not self._forward_pre_hooks, relu.alone and not relu.watched, norm, shortcut)  # fmt: skip
        if both is None:
            return None
        if self.training:
            self.num_batches_tracked.add_(1)
        y = prepare(*both, relu.reader)
        y._nulsq_rectified = relu  # type: ignore[attr-defined]
        relu.__dict__["awaits"] = True
        return y


class QuantNorm(_BehindNorm):
    """A BatchNorm that knows the ReLU which reads its result, and nobody else does: it does the ReLU's work as well.

    What it computes with has a plain BatchNorm's bits, but with channels last in training: there sums are added in another
    order, as those of gradients and running statistics are in any layout. Made by `pair`, as a `QuantReLU` is.
    """


class QuantNormAct(_BehindNorm, BatchNormAct2d):
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

    `pair` has proved that nothing else is done with it. Where somebody changes the model after that, it becomes a tensor.
    """

    def __init__(self, norm: _BehindNorm, x: Tensor) -> None:
        self._norm, self._x = norm, x

    def __add__(self, shortcut: Any) -> Tensor:
        y = self._norm.with_relu(self._x, shortcut) if isinstance(shortcut, Tensor) else None
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


class _Tracer(fx.Tracer):
    """Goes into what holds a layer, a BatchNorm or a ReLU, and through what does nothing."""

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        if type(m) is nn.Identity:
            return False
        whole = isinstance(m, (QuantLayer, _BatchNorm)) or super().is_leaf_module(m, name)
        return whole or not any(isinstance(part, (QuantLayer, _BatchNorm, nn.ReLU)) for part in m.modules())


class _Proved(NamedTuple):
    """What is certain about a model in the mode that it was in."""

    alone: set[nn.ReLU]
    """Only the reader reads the result."""
    fresh: set[nn.ReLU]
    """What it reads was made by a BatchNorm, for nobody else."""
    norms: dict[nn.BatchNorm2d, tuple[nn.ReLU, bool]]
    """Only this ReLU reads the result, or, if that is so, the sum of it and something else, which nobody else reads."""
    own: set[nn.BatchNorm2d]
    """What such a one reads was made by a layer, for nobody else."""


def _proved(model: nn.Module, readers: dict[nn.ReLU, QuantLayer]) -> _Proved:
    """By a symbolic trace, which fails where the way through a model depends on its data."""
    proved = _Proved(set(), set(), {}, set())
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception:  # torch.fx runs the model's code on symbols: anything may fail
        return proved
    modules = dict(model.named_modules())
    called = {node: modules[node.target] for node in nodes if node.op == "call_module"}
    times = Counter(called.values())

    def for_one(node: Any) -> bool:
        return isinstance(node, fx.Node) and len(node.users) == 1

    def read_by(node: fx.Node) -> fx.Node | None:
        return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None

    def prove(norm: nn.Module | None, node: fx.Node, relu: nn.ReLU, added: bool) -> None:
        if type(norm) in (nn.BatchNorm2d, BatchNormAct2d) and times[norm] == 1 and norm.affine and norm.track_running_stats:
            proved.norms[norm] = relu, added
            if for_one(read_by(node)) and isinstance(called.get(read_by(node)), (QuantLayer, nn.Conv2d)):
                proved.own.add(norm)

    for node, module in called.items():
        inside = isinstance(module, BatchNormAct2d) and type(module.drop) is nn.Identity
        relu = module.act if inside else module
        if relu not in readers:
            continue
        if [called.get(user) for user in node.users] == [readers[relu]]:
            proved.alone.add(relu)
        if inside:
            proved.fresh.add(relu)
            prove(module, node, relu, False)
            continue
        before = read_by(node)
        if not for_one(before):
            continue
        if isinstance(called.get(before), _BatchNorm):
            proved.fresh.add(relu)
        added = before.target in (operator.add, operator.iadd)
        terms = before.args[: 1 if before.target is operator.iadd else 2] if added else [before]
        for term in terms:
            norm = called.get(term) if for_one(term) else None
            if not isinstance(norm, BatchNormAct2d) or (type(norm.drop) is type(norm.act) is nn.Identity):
                prove(norm, term, relu, added)
            if norm in proved.norms:
                break
    return proved


@torch.no_grad()
def pair(model: nn.Module, images: Tensor) -> None:
    """Find the ReLUs whose result goes into a quantized layer as it is, and tell them. Once for a model; later calls return.

    A ReLU that runs more than once in a forward pass has no one reader. Where several layers read one, it is the
    first. Nothing else changes: parameters, names, hooks.

    Args:
        model: in any mode, on the device of the images.
        images: at least one that the model takes; two of them are run.
    """
    if getattr(model, "_nulsq_paired", False) or not images.is_cpu or getattr(model, "_compiled_call_impl", None) is not None:
        return  # done, or there are no such loops
    layers = quant_layers(model).values()
    if not layers:  # it may be quantized later
        return
    model._nulsq_paired = True
    relus = [m for m in model.modules() if type(m) is nn.ReLU]
    if not relus:
        return
    runs: Counter[nn.ReLU] = Counter()
    made: dict[int, tuple[nn.ReLU, Tensor, int]] = {}  # by identity of the tensor, which is kept so that no other gets it
    readers: dict[nn.ReLU, QuantLayer] = {}

    def ran(relu: nn.ReLU, _: tuple[Tensor], y: Tensor) -> None:
        runs[relu] += 1
        made[id(y)] = relu, y, y._version

    def reads(layer: QuantLayer, args: tuple[Tensor, ...]) -> None:
        relu, y, version = made.get(id(args[0]), (None, None, None))
        if relu is not None and y._version == version:
            readers.setdefault(relu, layer)

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    hooks = [relu.register_forward_hook(ran) for relu in relus]
    hooks += [layer.register_forward_pre_hook(reads) for layer in layers]
    with torch.random.fork_rng(devices=[]), evaluating(model):
        try:
            model.forward(images[:2])
        finally:
            for hook in hooks:
                hook.remove()
        readers = {relu: reader for relu, reader in readers.items() if runs[relu] == 1}
        still = _proved(model, readers)
        model.train()
        moving = _proved(model, readers)
    for buffer, before in buffers:  # a trace runs what a model does to its buffers in training
        if not torch.equal(buffer, before):
            buffer.copy_(before)
    places = {m: (parent, name, m) for parent in model.modules() for name, m in parent._modules.items() if m is not None}
    for relu, reader in readers.items():
        relu.__class__ = QuantReLU  # in place: whoever holds the module, or has a hook on it, keeps it
        object.__setattr__(relu, "reader", reader)
        relu.places = places[relu], places[reader]
        relu.alone, relu.overwrites = relu in still.alone & moving.alone, relu.inplace and relu in still.fresh
    for norm, (relu, added) in still.norms.items():
        if moving.norms.get(norm) == (relu, added):
            norm.__class__ = QuantNorm if type(norm) is nn.BatchNorm2d else QuantNormAct
            object.__setattr__(norm, "relu", relu)
            norm.adds, norm.overwrites = added, norm in still.own & moving.own
