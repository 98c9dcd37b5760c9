"""Building the network that a file names, when the file may come from anybody: no downloads, no surprises, no larger than it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nulsq_cli.errors import InputError, NulsqError, first_line
from nulsq_cli.models.create import create_float_model

NOT_OURS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
"""Arguments of timm's factory that read files or the network."""
LARGEST_INTEGER = 1 << 16
LONGEST_TEXT = 200
MOST_VALUES, DEEPEST = 1000, 8


def rebuild(name: Any, arguments: Any, *, elements: int, tensors: int, where: object) -> nn.Module:
    """The float network that a packed file or a run names, with random weights.

    Args:
        name: of an architecture of timm or of this package; nothing is downloaded or read.
        arguments: of its constructor.
        elements: how many numbers the file has for it, in how many `tensors`: a bound for what is built.
        where: the file, for messages.

    Raises:
        InputError: it names no network, or one that is much larger than its tensors, or cannot be built.
    """
    try:
        _check(name, arguments)
        with _Frugal(elements, tensors):
            return create_float_model(name, kwargs=arguments)
    except (NulsqError, TooLargeError) as reason:
        what = reason.what if isinstance(reason, NulsqError) else str(reason)
        raise InputError(f"names a network that is not built: {what[:300]}", where=where) from reason
    except Exception as reason:  # a thousand constructors, with arguments that none of them was made for
        raise InputError(f"names a network that cannot be built: {first_line(reason)}", where=where) from reason


def _check(name: Any, arguments: Any) -> None:
    if not isinstance(name, str) or ":" in name or len(name) > LONGEST_TEXT:
        raise InputError(f"{str(name)[:80]!r} is no architecture")
    if not isinstance(arguments, Mapping):
        raise InputError("its arguments are no mapping")
    left = MOST_VALUES

    def walk(value: Any, depth: int) -> bool:
        nonlocal left
        left -= 1
        if depth > DEEPEST or left < 0:
            return False
        if isinstance(value, dict):
            return all(len(key) <= LONGEST_TEXT and walk(inner, depth + 1) for key, inner in value.items())
        if isinstance(value, list | tuple):
            return all(walk(inner, depth + 1) for inner in value)
        if isinstance(value, str):
            return len(value) <= LONGEST_TEXT
        return value is None or isinstance(value, bool) or (isinstance(value, int | float) and abs(value) <= LARGEST_INTEGER)

    for key, value in arguments.items():
        if key in NOT_OURS or not walk({key: value}, 0):
            raise InputError(f"its argument {str(key)[:80]!r} is not taken from a file")


class TooLargeError(Exception):
    """More would be allocated than the file has numbers for."""


class _Frugal(TorchFunctionMode):
    """Lets constructors allocate about as much as a network of so many elements needs, and stops them before they take more.

    Args:
        elements, tensors: of the network's state. Beyond it, constructors make position tables, masks and passing values.
    """

    def __init__(self, elements: int, tensors: int) -> None:
        super().__init__()
        self.largest = 4 * elements + (1 << 20)
        self.left = 8 * elements + (4 << 20)
        self.tensors, self.calls = 4 * tensors + 1000, 100 * tensors + 20_000

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at a call before, and at what it returns."""
        kwargs = kwargs or {}
        self.calls -= 1
        if func in FACTORIES:
            # What it would be like, without its memory.
            planned = func(*args, **{k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"})
            self.tensors -= 1
            self.left -= planned.numel()
            self._bound(planned.numel())
        elif planner := PLANNED.get(func.__name__.strip("_")):
            self._bound(planner(args))
        made = func(*args, **kwargs)
        for each in made if isinstance(made, list | tuple) else (made,):
            if isinstance(each, Tensor):
                self._bound(each.numel())
        return made

    def _bound(self, elements: int) -> None:
        if elements > self.largest or min(self.left, self.tensors, self.calls) < 0:
            raise TooLargeError("it is much larger than the tensors of the file")


def _product(args: Any) -> int:
    return math.prod(a.numel() for a in _flat(args) if isinstance(a, Tensor))


def _repeated(args: Any) -> int:
    return _product(args) * math.prod(a for a in _flat(args) if isinstance(a, int))


def _broadcast(args: Any) -> int:
    shapes = [a.shape for a in args if isinstance(a, Tensor)]
    axes = max(map(len, shapes), default=0)
    return math.prod(max(sizes) for sizes in zip(*((1,) * (axes - len(s)) + tuple(s) for s in shapes), strict=True))


def _flat(args: Any) -> list[Any]:
    return [inner for a in args for inner in (_flat(a) if isinstance(a, list | tuple) else [a])]


_ELEMENTWISE = [
    "add", "radd", "sub", "rsub", "mul", "rmul", "div", "truediv", "rtruediv", "floordiv", "mod", "remainder", "pow", "rpow",
    "eq", "ne", "lt", "le", "gt", "ge", "maximum", "minimum", "where", "and", "or", "xor", "logical_and", "logical_or", "atan2",
]  # fmt: skip
PLANNED: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast), **dict.fromkeys(("outer", "ger", "einsum", "kron"), _product),
    **dict.fromkeys(("repeat", "tile"), _repeated),
}  # fmt: skip
"""Functions whose results can be larger than all that went in, and an upper bound for each, from its arguments."""
FACTORIES = frozenset({
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm, torch.arange,
    torch.linspace, torch.logspace, torch.eye, torch.empty_strided, torch.empty_permuted, torch.tril_indices, torch.triu_indices,
    Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full,
})  # fmt: skip
