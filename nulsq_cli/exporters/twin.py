"""The integer twin: in PyTorch, exactly the numbers that a runtime has to come to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from nulsq_cli.exporters.lower import Layer, Network, calibrate, ranged
from nulsq_cli.exporters.trace import INPUT, MARK, aten

EXACT_FLOAT = 2**24
"""Sums of integers below this are exact in float32, in any order."""


class Twin(fx.Interpreter):
    """Computes a network as its file will: integer tables, integer biases, outputs rounded to bytes.

    Args:
        network: as lowered.
        watch: called with (node, value) after each operator.
    """

    def __init__(self, network: Network, watch: Callable[[fx.Node, Any], None] | None = None) -> None:
        super().__init__(torch.nn.Module(), graph=network.traced.graph)
        self.network, self.watch = network, watch
        self.whole = network.options.grid == "int8"
        self.weights = {name: self._weight(layer) for name, layer in network.layers.items()}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) to (N, classes)."""
        values = self.network.traced.values
        places = (n for n in self.network.traced.graph.nodes if n.op == "placeholder")
        return self.run(*(images if n.meta.get("path") == INPUT else values.get(n.name) for n in places))[0]

    def run_node(self, node: fx.Node) -> Any:
        """An operator; those that stand for quantized layers as integers."""
        value = self._value(node)
        if (rounded := self.network.outputs.get(node.name)) is not None:
            value = rounded.rounded(value)
        if self.watch is not None:
            self.watch(node, value)
        return value

    def _value(self, node: fx.Node) -> Any:
        if node.op != "call_function" or not (node.target is MARK or node.name in self.network.layers):
            return super().run_node(node)
        args = self.fetch_args_kwargs_from_env(node)[0]
        if node.target is MARK:
            layer = self.network.by_path[node.args[1]]
            if layer.inputs is None:
                return args[0]
            if not self.whole and layer.inputs.form == "where":
                return layer.inputs.levels[torch.bucketize(args[0].contiguous(), layer.inputs.thresholds, out_int32=True)]
            place = layer.inputs.place(args[0])
            return place if self.whole and layer.integer else place * layer.inputs.scale
        layer, weight = self.network.layers[node.name], self.weights[node.name]
        if not (self.whole and layer.integer):
            return _apply(node, args, weight, layer.bias)
        total = _apply(node, args, weight, None).double()
        shape = (-1, 1, 1) if layer.convolution else (-1,)
        if not layer.convolution:
            total = total * layer.unit
            return (total if layer.bias is None else total + layer.bias).float()
        if layer.bias is not None:
            total = total + layer.integer_bias.view(shape)
        return (total * layer.unit.view(shape)).float()

    def _weight(self, layer: Layer) -> Tensor:
        """Integers where both sides are, else float32."""
        if not (self.whole and layer.integer):
            return float_weight(self.network, layer)
        integers = layer.weights.integer()
        reach = int(integers.abs().flatten(1).sum(1).max()) * layer.inputs.top
        return integers.to(torch.float32 if reach < EXACT_FLOAT else torch.float64)


def float_weight(network: Network, layer: Layer) -> Tensor:
    """(O, ...) float32: a weight as float, BatchNorm folded in."""
    w, gain = layer.weights, layer.site.gain
    if w is not None and network.options.grid == "int8":
        return w.integer().float() * w.per_output(w.scale)
    if w is None:
        weight = network.traced.values[layer.site.node.args[1].name]
    else:
        weight = w.exact[w.codes.int()] if w.exact.ndim == 1 else w.exact.gather(1, w.codes.flatten(1).long()).view(w.codes.shape)
    return weight if gain is None else (weight.double() * gain.view(-1, *[1] * (weight.ndim - 1))).float()


def _apply(node: fx.Node, args: tuple[Any, ...], weight: Tensor, bias: Tensor | None) -> Tensor:
    x = args[0].to(weight.dtype)
    return F.linear(x, weight, bias) if node.target == aten.linear.default else node.target(x, weight, bias, *args[3:])


def measure(network: Network, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """The least and the largest value of each output that becomes a byte, by node name."""
    wanted = {name: (float("inf"), float("-inf")) for name in ranged(network)}

    def watch(node: fx.Node, value: Any) -> None:
        if node.name in wanted:
            low, high = torch.aminmax(value)
            wanted[node.name] = min(wanted[node.name][0], float(low)), max(wanted[node.name][1], float(high))

    twin = Twin(network, watch)
    for images in batches:
        twin(images)
    return wanted


def settle(network: Network, batches: Iterable[Tensor]) -> None:
    """Give outputs that become bytes their scales, as some images need them."""
    if network.options.outputs and ranged(network):
        calibrate(network, measure(network, batches))
