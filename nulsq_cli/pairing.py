"""Which modules of a model may do the work of others after them: found in a small pass, proved by a trace.

What they then are is in `rectified.py`.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from nulsq_cli.layers import QuantLayer, evaluating, on_input, quant_layers
from nulsq_cli.methods.base import watched, watched_anywhere
from nulsq_cli.ops.remake import checkpointed
from nulsq_cli.rectified import BehindNorm, QuantAct, QuantNorm, QuantNormAct, QuantReLU, QuantReLU6, Switch

_ACTS: dict[type[nn.Module], type[QuantAct]] = {nn.ReLU: QuantReLU, nn.ReLU6: QuantReLU6}
_NORMS: dict[type[nn.Module], type[BehindNorm]] = {nn.BatchNorm2d: QuantNorm, BatchNormAct2d: QuantNormAct}
_PLAIN = {ours: plain for plain, ours in (_ACTS | _NORMS).items()}


class _Part(NamedTuple):
    """A module as it was when its model was paired."""

    module: nn.Module
    kind: type
    forward: Any
    children: tuple[nn.Module | None, ...]
    facts: dict[str, Any]

    def same(self) -> bool:
        """Whether it is still so."""
        m = self.module
        return (type(m) is self.kind and self.kind.forward is self.forward and _children(m) == self.children
                and _facts(m) == self.facts)  # fmt: skip


def _children(m: nn.Module) -> tuple[nn.Module | None, ...]:
    return () if isinstance(m, QuantLayer) else tuple(m._modules.values())  # inside of layers much may change


def _facts(m: nn.Module) -> dict[str, Any]:
    """What may decide which way a forward goes, as timm's `grad_checkpointing`: simple values, and the kinds of all others."""
    if isinstance(m, (QuantAct, BehindNorm)):
        return {"switch": m.__dict__.get("switch")}
    if isinstance(m, QuantLayer) or type(m).__module__.startswith("torch.nn."):
        return {}
    found: dict[str, Any] = {}
    for key, value in m.__dict__.items():
        if isinstance(value, (bool, int, float, str)):
            found[key] = value
        elif key[0] != "_":
            found[key] = type(value), len(value) if isinstance(value, (list, tuple, dict, set)) else 0
    for own in ("training", "forward"):
        found.pop(own, None)
    return found


def _parts(model: nn.Module) -> list[_Part]:
    found, left = [], [model]
    while left:
        m = left.pop()
        found.append(_Part(m, type(m), type(m).forward, _children(m), _facts(m)))
        left += [child for child in found[-1].children if child is not None]
    return found


class _Tracer(fx.Tracer):
    """Goes into what holds a layer, a BatchNorm or a ReLU, and through what does nothing.

    Not into a part that a model checkpoints, in either form: it ends where nobody else sees it.
    """

    def create_proxy(self, *what: Any, **more: Any) -> fx.Proxy:
        if checkpointed() or not torch.is_grad_enabled():
            raise fx.proxy.TraceError("gradient checkpointing")
        return super().create_proxy(*what, **more)

    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        if type(m) is nn.Identity:
            return False
        whole = isinstance(m, (QuantLayer, _BatchNorm)) or super().is_leaf_module(m, name)
        return whole or not any(isinstance(part, (QuantLayer, _BatchNorm, *_ACTS)) for part in m.modules())


class _Proved(NamedTuple):
    """What is certain about the modules of a model, by name, in one mode."""

    alone: set[str]
    """ReLUs of which only the reader reads the result."""
    fresh: set[str]
    """ReLUs that read what a BatchNorm made for nobody else."""
    norms: dict[str, tuple[str, bool]]
    """BatchNorms: only this ReLU reads the result, or, if that is so, the sum of it and something else, for nobody else."""
    own: set[str]
    """Those of them that read what a layer made for nobody else."""


def _proved(model: nn.Module, readers: dict[str, str], *, training: bool) -> _Proved:
    """By a symbolic trace, which fails where the way through a model depends on its data.

    It runs what a model does to itself, so a copy is traced, which has the same parameters.
    """
    proved = _Proved(set(), set(), {}, set())
    try:
        model = copy.deepcopy(model, {id(p): p for p in model.parameters()}).train(training)
        given = inspect.signature(type(model).forward).parameters.values()
        with torch.enable_grad():
            nodes = list(_Tracer().trace(model, {p.name: p.default for p in given if p.default is not p.empty}).nodes)
        if any(isinstance(value, fx.Proxy) for m in model.modules() for value in tree_leaves(m.__dict__)):
            return proved  # a model that keeps its features has readers that no trace knows
    except Exception:  # copying and torch.fx run the model's own code, the latter on symbols: anything may fail
        return proved
    modules = dict(model.named_modules())
    called = {node: node.target for node in nodes if node.op == "call_module"}
    times = Counter(called.values())

    def for_one(node: Any) -> bool:
        return isinstance(node, fx.Node) and len(node.users) == 1

    def read_by(node: fx.Node) -> fx.Node | None:
        return node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None

    def prove(name: str | None, node: fx.Node, relu: str, added: bool) -> None:
        norm = modules.get(name)
        if type(norm) not in _NORMS or not (norm.affine and norm.track_running_stats):
            return
        if times[name] > 1:
            return
        if added and not for_one(read_by(node)):  # what it reads may be another thing when something is added
            return
        proved.norms[name] = relu, added
        if for_one(read_by(node)) and isinstance(modules.get(called.get(read_by(node))), (QuantLayer, nn.Conv2d)):
            proved.own.add(name)

    for node, name in called.items():
        module = modules[name]
        inside = isinstance(module, BatchNormAct2d) and type(module.drop) is nn.Identity
        relu = f"{name}.act" if inside else name
        if relu not in readers:
            continue
        if [called.get(user) for user in node.users] == [readers[relu]]:
            proved.alone.add(relu)
        if inside:
            proved.fresh.add(relu)
            prove(name, node, relu, False)
            continue
        before = read_by(node)
        if not for_one(before):
            continue
        if isinstance(modules.get(called.get(before)), _BatchNorm):
            proved.fresh.add(relu)
        added = before.target in (operator.add, operator.iadd)
        terms = before.args[: 1 if before.target is operator.iadd else 2] if added else (before,)
        for term in terms:
            source = called.get(term) if for_one(term) and terms.count(term) == 1 else None
            norm = modules.get(source)
            if not isinstance(norm, BatchNormAct2d) or (type(norm.drop) is type(norm.act) is nn.Identity):
                prove(source, term, relu, added)
            if source in proved.norms:
                break
    return proved


@torch.inference_mode(False)
@torch.no_grad()
def pair(model: nn.Module, images: Tensor) -> None:
    """Find the ReLUs whose result goes into a quantized layer as it is, and tell them.

    Again only if a module was exchanged, or one of its simple values.

    A ReLU that runs more than once in a forward pass has no one reader. Where several layers read one, it is the
    first. Nothing else changes: parameters, names, hooks.

    Args:
        model: in any mode, on the device of the images.
        images: at least one that the model takes; two of them are run.
    """
    if not images.is_cpu or getattr(model, "_compiled_call_impl", None) is not None:
        return  # there are no such loops
    with torch.enable_grad():
        if checkpointed():
            return  # not now: a trace would seem to be checkpointed, too
    if hasattr(model, "_nulsq_paired") and all(part.same() for part in model._nulsq_paired[1]):
        return
    for m in model.modules():
        if type(m) in _PLAIN:  # from before
            m.__class__ = _PLAIN[type(m)]
            for told in ("reader", "relu", "switch", "alone", "overwrites", "adds"):
                m.__dict__.pop(told, None)
    switch = Switch()
    relus = [m for m in model.modules() if type(m) in _ACTS]
    if relus and quant_layers(model):
        _tell(model, images, relus, switch)
    model._nulsq_paired = switch, _parts(model)


def _tell(model: nn.Module, images: Tensor, relus: list[nn.Module], switch: Switch) -> None:
    layers = quant_layers(model).values()
    runs: Counter[nn.Module] = Counter()
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # by identity of the tensor, which is kept so that no other gets it
    found: dict[nn.Module, QuantLayer] = {}

    def ran(relu: nn.Module, _: tuple[Tensor], y: Tensor) -> None:
        runs[relu] += 1
        made[id(y)] = relu, y, y._version

    def reads(layer: QuantLayer, x: Tensor) -> None:
        relu, y, version = made.get(id(x), (None, None, None))
        if relu is not None and y._version == version:
            found.setdefault(relu, layer)

    hooks = [relu.register_forward_hook(ran) for relu in relus]
    hooks += [on_input(layer, partial(reads, layer)) for layer in layers]
    with torch.random.fork_rng(devices=[]):
        try:
            with evaluating(model):
                type(model).forward(model, images[:2].clone())  # one of inference mode could not be changed in place
        finally:
            for hook in hooks:
                hook.remove()
        modules = dict(model.named_modules())
        names = {m: name for name, m in modules.items()}
        readers = {names[relu]: names[reader] for relu, reader in found.items() if runs[relu] == 1}
        still, moving = _proved(model, readers, training=False), _proved(model, readers, training=True)
    for name, reader in readers.items():
        relu = modules[name]
        relu.__class__ = _ACTS[type(relu)]  # in place: whoever holds the module, or has a hook on it, keeps it
        object.__setattr__(relu, "reader", modules[reader])
        relu.switch, relu.alone = switch, name in still.alone & moving.alone
        relu.overwrites = relu.inplace and name in still.fresh
    for name, (relu, added) in still.norms.items():
        if moving.norms.get(name) == (relu, added):
            norm = modules[name]
            norm.__class__ = _NORMS[type(norm)]
            object.__setattr__(norm, "relu", modules[relu])
            norm.switch, norm.adds, norm.overwrites = switch, added, name in still.own & moving.own


def _whole(model: nn.Module, *args: Any, **named: Any) -> Any:
    """A model's forward: what was proved is about the whole of it, not about parts that somebody else calls or checkpoints."""
    if torch.compiler.is_compiling():
        return type(model).forward(model, *args, **named)
    switch, parts = model._nulsq_paired
    usual = len(args) == 1 and not named and switch.of == id(model) and all(part.same() for part in parts)
    if not usual or watched_anywhere() or any(watched(part.module) for part in parts if part.module is not model):
        return type(model).forward(model, *args, **named)
    with switch:
        return type(model).forward(model, *args)


_entering = Lock()


@contextmanager
def one_operation(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Inside, BatchNorms whose results only a ReLU reads do its work, and that of the quantizer behind it.

    While the model itself runs, on one positional argument, and not where somebody has a hook in it, or has put another
    forward in the place of a class's. Whether it is done depends on the model as it is now, not on what was before: a
    resumed run has the same bits. What a forward reads that is no simple value of a module (a number in a configuration, a
    global, a random number of Python) must not decide which module reads which result.

    Args:
        model: which `pair` gets, if it had not yet.
        images: as for `pair`.
    """
    pair(model, images)
    switch = model._nulsq_paired[0] if hasattr(model, "_nulsq_paired") else None
    if switch is None or (watched(model) and not switch.entered):
        yield
        return
    with _entering:
        switch.entered += 1
        switch.of = id(model)  # a copy that is made inside is another model
        model.__dict__.setdefault("forward", partial(_whole, model))
    try:
        yield
    finally:
        with _entering:
            switch.entered -= 1
            if not switch.entered:
                model.__dict__.pop("forward", None)
