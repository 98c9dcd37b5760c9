"""ReLUs that quantize what they hand on, for the layer that reads it: `ops/relu.py` in the place of modules of a model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nulsq_cli.layers import QuantLayer, evaluating, prepare, quant_layers


class QuantReLU(nn.ReLU):
    """A ReLU that knows a layer which reads its result. What comes out is the same, and so are all gradients.

    Of those that reach the result the layer's is added last; where there are more than two, that may be another order
    than a plain ReLU's. Made from a ReLU by `pair`. The layer is no child of it: it has its own place in the model.
    """

    reader: QuantLayer
    alone: bool
    """Whether nobody else reads the result, nor what it is made from."""

    def forward(self, x: Tensor) -> Tensor:
        """(...) to the same shape."""
        reader = self.reader
        quantizer = None if torch.compiler.is_compiling() else reader.input_quantizer
        if quantizer is None:
            return super().forward(x)
        watched = self._forward_hooks or reader._forward_pre_hooks or reader._forward_hooks
        both = quantizer.behind_relu(x, self.inplace, self.alone and not watched)
        return super().forward(x) if both is None else prepare(*both, reader)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, name: str) -> bool:
        return isinstance(m, QuantLayer) or (super().is_leaf_module(m, name) and type(m) is not nn.Identity)


def _read_by_one(model: nn.Module, readers: dict[nn.ReLU, QuantLayer]) -> set[nn.ReLU]:
    """Those of the ReLUs in place, in evaluation mode, whose result and whose own input are certainly read by nobody else.

    What is certain is what a symbolic trace proves, for it fails where the way through a model depends on its data.
    """
    try:
        with evaluating(model):
            graph = _Tracer().trace(model)
    except Exception:  # torch.fx runs the model's code on symbols: anything may fail
        return set()
    modules = dict(model.named_modules())
    called = lambda node: modules[node.target] if node.op == "call_module" else None  # noqa: E731
    found = set()
    for node in graph.nodes:
        relu = called(node)
        if relu in readers and relu.inplace and [called(user) for user in node.users] == [readers[relu]]:
            before = node.args[0]
            fresh = isinstance(called(before), nn.modules.batchnorm._BatchNorm) or before.target is F.batch_norm
            if fresh and len(before.users) == 1:
                found.add(relu)
    return found


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

    hooks = [relu.register_forward_hook(ran) for relu in relus]
    hooks += [layer.register_forward_pre_hook(reads) for layer in layers]
    try:
        with evaluating(model):
            model.forward(images[:2])
    finally:
        for hook in hooks:
            hook.remove()
    readers = {relu: reader for relu, reader in readers.items() if runs[relu] == 1}
    alone = _read_by_one(model, readers)
    for relu, reader in readers.items():
        relu.__class__ = QuantReLU  # in place: whoever holds the module, or has a hook on it, keeps it
        object.__setattr__(relu, "reader", reader)
        relu.alone = relu in alone
