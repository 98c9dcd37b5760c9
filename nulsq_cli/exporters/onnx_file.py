"""A lowered network as an ONNX file."""

from __future__ import annotations

import hashlib
import json
import operator
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from nulsq_cli.artifact import Artifact
from nulsq_cli.exporters import patterns
from nulsq_cli.exporters.lower import Network
from nulsq_cli.exporters.operators import OPERATORS, Emit, padding_of, shape_of, unknown
from nulsq_cli.exporters.trace import INPUT, MARK, Traced, aten
from nulsq_cli.exporters.writer import Writer

SESSION = {"disabled_optimizers": ["MatMulAddFusion"]}
"""Arguments of onnxruntime.InferenceSession: that optimizer would take linear maps out of the integers."""


METADATA = "nulsq"
"""The key under which a file says what it is."""


def build(network: Network, artifact: Artifact, input_size: list[int]) -> onnx.ModelProto:
    """The file, in memory.

    Raises:
        UsageError: an operator that has no translation.
    """
    check_operators(network.traced)
    w = Writer()
    image = w.name(INPUT)
    values = dict(network.traced.values)
    emit = Emit(w, values, image)
    for node in network.traced.graph.nodes:
        if node.op == "placeholder" and node.meta.get("path") == INPUT:
            emit.names[node] = image
        elif node.op == "call_function" and node.name not in values:
            _emit(emit, network, node)
    result = emit.of(network.traced.output)
    return w.model((image, ["batch", *input_size]), result, _metadata(network, artifact))


def check_operators(traced: Traced) -> None:
    """Refuse what has no translation before anything is computed; what depends on no image is computed here.

    Raises:
        UsageError: an operator that has no translation.
    """
    values = traced.values
    for node in traced.calls():
        arguments = node.all_input_nodes
        if node.name in values or node.target is MARK or node.name in traced.sites or node.target is operator.getitem:
            continue
        if arguments and all(a.name in values for a in arguments):
            with torch.no_grad():
                value = node.target(*fx.map_arg(node.args, lambda a: values[a.name]), **node.kwargs)
            if isinstance(value, Tensor):
                values[node.name] = value
                continue
        if node.target not in OPERATORS and not isinstance(node.meta.get("val"), torch.SymInt):
            raise unknown(node)


def _emit(e: Emit, network: Network, node: fx.Node) -> None:
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, int)):
        return  # sizes: whatever needs one reads it off its own result
    layer = network.layers.get(node.name)
    whole = network.options.grid == "int8"
    if node.target is MARK:
        name: Any = e.of(node.args[0])
        if (inputs := network.inputs_of(node)) is not None:
            name = patterns.quantized_input(e.w, name, inputs, whole=whole, name=node.args[1], shape=shape_of(node))
    elif layer is not None:
        source, pads = node.args[0], None
        if source.target == aten.pad.default and len(source.users) == 1 and _spatial(source):
            around, _ = padding_of(source)
            source, pads = source.args[0], [*around[2:4], *around[6:8]]
        name = patterns.weighted(e.w, network, node, layer, e.of(source), pads)
    elif node.name in network.idle:
        name = e.of(node.args[0])
    elif node.target == operator.getitem:
        name = e.names[node.args[0]][node.args[1]]
    elif node.target == aten.pad.default and _spatial(node) and all(u.name in network.layers for u in node.users) \
            and len(node.users) == 1:  # fmt: skip
        return  # the convolution pads by itself
    else:
        name = OPERATORS[node.target](e, node)
    if (output := network.outputs.get(node.name)) is not None:
        name = patterns.as_bytes(e.w, name, output)
    e.names[node] = name


def _spatial(node: fx.Node) -> bool:
    """Whether a padding is one that a convolution can do itself: zeros around height and width, none taken away."""
    around, value = padding_of(node)
    return len(around) == 8 and value == 0 and around[:2] == around[4:6] == [0, 0] and min(around) >= 0 \
        and next(iter(node.users)).target in (aten.conv2d.default, aten.conv2d.padding)  # fmt: skip


def _metadata(network: Network, artifact: Artifact) -> dict[str, str]:
    meta, options = artifact.meta, network.options
    layers = {
        layer.site.layer: {"weight_bits": layer.weights.bits if layer.weights else 32,
                           "act_bits": layer.inputs.bits if layer.inputs else 32,
                           "form": layer.inputs.form if layer.inputs else "float", "integer": layer.integer,
                           "linear": not layer.convolution}
        for layer in network.layers.values()
    }  # fmt: skip
    return {
        METADATA: json.dumps({
            "format": "nulsq-onnx", "arch": meta["arch"], "arch_kwargs": meta.get("arch_kwargs", {}),
            "num_classes": meta["num_classes"], "data_cfg": meta["data_cfg"],
            "bits": meta["bits"], "method": meta["method"], "grid": options.grid, "act": options.act, "range": options.reach,
            "session": SESSION, "codes_sha256": codes_digest(artifact), "layers": layers, "recipe": meta.get("recipe"),
        }, sort_keys=True),
    }  # fmt: skip


def codes_digest(artifact: Artifact) -> str:
    """SHA-256 over the codes of all layers, in sorted order of names, one byte per code."""
    total = hashlib.sha256()
    for name, entry in sorted(artifact.meta["layers"].items()):
        if entry["weight_bits"] < 32:
            total.update(artifact.codes(name).numpy().tobytes())
    return total.hexdigest()
