"""ReLUs that quantize what they hand on, for the layer that reads it: `ops/relu.py` in the place of modules of a model."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from nulsq_cli.layers import QuantLayer, evaluating, prepare, quant_layers


class QuantReLU(nn.ReLU):
    """A ReLU that knows a layer which reads its result. What comes out is the same, and so are all gradients.

    Made from a ReLU by `pair`. The layer is no child of it: it has its own place in the model.
    """

    reader: QuantLayer

    def forward(self, x: Tensor) -> Tensor:
        """(...) to the same shape."""
        quantizer = None if torch.compiler.is_compiling() else self.reader.input_quantizer
        both = None if quantizer is None else quantizer.behind_relu(x, self.inplace)
        return super().forward(x) if both is None else prepare(both[0], self.reader, both[1])


@torch.no_grad()
def pair(model: nn.Module, images: Tensor) -> None:
    """Find the ReLUs whose result goes into a quantized layer as it is, and tell them. Once for a model; later calls return.

    A ReLU that runs more than once in a forward pass has no one reader. Where several layers read one, it is the
    first. Nothing else changes: parameters, names, hooks.

    Args:
        model: in any mode, on the device of the images.
        images: at least one that the model takes; two of them are run.
    """
    if getattr(model, "_nulsq_paired", False):
        return
    layers = quant_layers(model).values()
    relus = [m for m in model.modules() if type(m) is nn.ReLU]
    if not layers or not relus:
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
    for relu, reader in readers.items():
        if runs[relu] == 1:
            relu.__class__ = QuantReLU  # in place: whoever holds the module, or has a hook on it, keeps it
            object.__setattr__(relu, "reader", reader)
    model._nulsq_paired = True
