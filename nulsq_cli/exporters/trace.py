"""A packed model as one graph of torch operators, BatchNorm folded, with a mark where each input is quantized."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from nulsq_cli.errors import UsageError, first_line
from nulsq_cli.layers import quant_layers

aten = torch.ops.aten
INPUT = "image"
SAME = {
    aten.contiguous.default, aten.clone.default, aten.alias.default, aten.dropout.default, aten.dropout_.default,
    aten.detach.default, aten.detach_.default, aten.lift_fresh_copy.default, aten.feature_dropout.default,
}  # fmt: skip
"""Operators that hand on what they are given, in evaluation mode."""


@torch.library.custom_op("nulsq::quantized", mutates_args=())
def mark(x: Tensor, layer: str) -> Tensor:
    """Stands in a traced graph for the quantizer at the input of a layer."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, layer: str) -> Tensor:
    return torch.empty_like(x)


MARK = torch.ops.nulsq.quantized.default


class _Mark(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return mark(x, self.layer)


@dataclass
class Site:
    """Where a layer with weights stands in the graph.

    Args:
        node: the convolution or linear map.
        layer: module path.
        gain, shift: (O,) float64, what a folded BatchNorm multiplies and adds; None without one.
        bias: (O,) float64 or None, the layer's own.
    """

    node: fx.Node
    layer: str
    gain: Tensor | None = None
    shift: Tensor | None = None
    bias: Tensor | None = None

    @property
    def folded_bias(self) -> Tensor | None:
        """(O,) float64: the bias behind the folded BatchNorm, or None where nothing is added."""
        if self.gain is None:
            return self.bias
        return self.shift if self.bias is None else self.shift + self.gain * self.bias


@dataclass
class Traced:
    """The graph of a model in evaluation mode.

    Args:
        graph: torch operators; the one input that is no parameter is called `image`.
        values: what the placeholders of parameters, buffers and constants hold.
        sites: by node name, every convolution and linear map whose weight is a parameter.
    """

    graph: fx.Graph
    values: dict[str, Tensor]
    sites: dict[str, Site] = field(default_factory=dict)

    @property
    def output(self) -> fx.Node:
        """The node whose value is the model's result."""
        return next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0][0]

    def calls(self) -> Iterator[fx.Node]:
        """All operators, in order."""
        return (n for n in self.graph.nodes if n.op == "call_function")


CONVOLUTIONS = {aten.conv2d.default, aten.conv2d.padding}
WEIGHTED = CONVOLUTIONS | {aten.linear.default}


def trace(model: nn.Module, input_size: tuple[int, ...]) -> Traced:
    """Trace a packed model.

    Args:
        model: as `artifact.load` gives it.
        input_size: (C, H, W).

    Raises:
        UsageError: the model does not have a single graph for all images and batch sizes.
    """
    marked = copy.deepcopy(model).eval()
    for name, layer in quant_layers(marked).items():
        layer.weight_quantizer = None
        layer.input_quantizer = None if layer.input_quantizer is None else _Mark(name)
    images = torch.zeros(2, *input_size)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            batch = ({0: torch.export.Dim.DYNAMIC},)
            program = torch.export.export(marked, (images,), dynamic_shapes=batch, strict=False)
    except Exception as reason:  # whatever a model's own code does that a graph cannot hold
        raise UsageError(f"the model has no single graph for any batch: {first_line(reason)}",
                         fix="export it with --to safetensors") from reason  # fmt: skip
    return _fold(_unlifted(program))


def _unlifted(program: Any) -> Traced:
    signature, graph = program.graph_signature, program.graph_module.graph
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    if len(signature.user_outputs) != 1 or len(signature.user_inputs) != 1:
        raise UsageError("the model has more than one input or output", fix="export it with --to safetensors")
    values: dict[str, Tensor] = {}
    found = Traced(graph, values)
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in names:
            name = names[node.name]
            values[node.name] = (program.state_dict[name] if name in program.state_dict else program.constants[name]).detach()
            node.meta["path"] = name
        elif node.name in constants:
            values[node.name] = program.constants[constants[node.name]].detach()
        else:
            node.meta["path"] = INPUT
    _functional(graph)
    for node in list(found.calls()):
        if node.target == aten.view.default:  # copies are left out below, and a view may have needed one
            node.target = aten.reshape.default
        if node.target in SAME:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    for node in found.calls():
        path = node.args[1].meta.get("path", "") if node.target in WEIGHTED and isinstance(node.args[1], fx.Node) else ""
        if path.endswith(".weight"):
            bias = node.args[2] if len(node.args) > 2 else None
            found.sites[node.name] = Site(node, path.removesuffix(".weight"),
                                          bias=None if bias is None else values[bias.name].double())  # fmt: skip
    return found


def _functional(graph: fx.Graph) -> None:
    """What reads a tensor after an operator changed it in place reads that operator's result."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and schema.name.endswith("_"):
            changed = node.args[0]
            later = [u for u in changed.users if order[u] > order[node]]
            for user in later:
                user.replace_input_with(changed, node)


def _fold(traced: Traced) -> Traced:
    """BatchNorm right behind a convolution becomes its gain and shift."""
    often = [site.layer for site in traced.sites.values()]
    for node in list(traced.calls()):
        if node.target != aten.batch_norm.default:
            continue
        site = traced.sites.get(getattr(node.args[0], "name", ""))
        if site is None or site.node.target not in CONVOLUTIONS or len(site.node.users) > 1 or often.count(site.layer) > 1:
            continue
        gain, shift = normalization(node, traced.values)
        site.gain, site.shift = gain, shift
        node.replace_all_uses_with(site.node)
        traced.graph.erase_node(node)
    return traced


def normalization(node: fx.Node, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(gain, shift), (C,) float64: what a BatchNorm in evaluation mode multiplies by and then adds."""
    weight, bias, mean, var = (None if a is None else values[a.name].double() for a in node.args[1:5])
    gain = (var + node.args[7]).rsqrt()
    gain = gain if weight is None else gain * weight
    shift = -mean * gain
    return gain, shift if bias is None else shift + bias
