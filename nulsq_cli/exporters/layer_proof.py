"""One layer of a file at a time: what the runtime's kernel multiplies is what PyTorch multiplies, integer by integer."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional as F

from nulsq_cli.exporters.lower import Layer, Network
from nulsq_cli.exporters.patterns import stored_codes
from nulsq_cli.exporters.runtimes import Run
from nulsq_cli.exporters.writer import IR, OPSET

COPIES = 6
"""The same patch of an input is laid out this often each way: kernels for one row differ from those for many."""


def wrong_codes(model: onnx.ModelProto, network: Network) -> list[str]:
    """The layers whose codes, unpacked from the file, are not those of the packed file."""
    wrong = []
    for layer in network.layers.values():
        w = layer.weights
        if w is None:
            continue
        stored = stored_codes(model, layer)
        if w.even and network.options.grid == "int8":
            integers = (stored.int() - w.offset) * w.per_output(w.sign)
            lowest = int(w.integers[0])
            same = torch.equal(torch.where(w.per_output(w.sign) == 0, 0, integers - lowest),
                               torch.where(w.per_output(w.sign) == 0, 0, w.codes.int()))  # fmt: skip
        else:
            same = torch.equal(stored, w.codes)
        if not same:
            wrong.append(layer.site.layer)
    return wrong


def wrong_layers(model: onnx.ModelProto, network: Network, runtimes: dict[str, Callable[[bytes], Run]]) -> dict[str, list[str]]:
    """By runtime, the layers whose integers come out otherwise than as integers in PyTorch.

    Args:
        model: the file.
        network: what it was made of.
        runtimes: each makes a run from a small file.
    """
    wrong: dict[str, list[str]] = {name: [] for name in runtimes}
    producers = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    noise = torch.Generator().manual_seed(0)
    for layer in network.layers.values():
        if not layer.integer:
            continue
        codes = torch.randint(0, len(layer.inputs.stored), _patch(layer), generator=noise)
        stored = layer.inputs.stored[codes]
        total = _sum(layer, stored - layer.inputs.zero)
        small = _alone(model, layer, total, producers, constants).SerializeToString()
        images = stored.to(torch.uint8)
        images = images.repeat(1, 1, COPIES, COPIES) if layer.convolution else images.repeat(COPIES, 1)
        for name, start in runtimes.items():
            found = start(small)(images)
            expected = torch.zeros_like(found) if layer.convolution else total.to(found.dtype).expand_as(found)
            if not torch.equal(found, expected):
                wrong[name].append(layer.site.layer)
    return wrong


def _patch(layer: Layer) -> tuple[int, ...]:
    """The shape of what one output is computed from."""
    shape = layer.weights.codes.shape
    if not layer.convolution:
        return 1, shape[1]
    groups = (*layer.site.node.args[6:7], 1)[0]
    return 1, shape[1] * groups, *shape[2:]


def _sum(layer: Layer, integers: Tensor) -> Tensor:
    """(1, O[, 1, 1]) int64: the layer's sum of products."""
    x, weight = integers.double(), layer.weights.integer().double()
    if not layer.convolution:
        return F.linear(x, weight).long()
    return F.conv2d(x, weight, groups=(*layer.site.node.args[6:7], 1)[0]).long()


def _alone(model: onnx.ModelProto, layer: Layer, total: Tensor, producers: dict[str, onnx.NodeProto],
           constants: dict[str, TensorProto]) -> onnx.ModelProto:  # fmt: skip
    """The layer as it stands in the file, scales 1, behind an input of bytes.

    A convolution gets minus its sum as bias, so that bytes at its output, which make runtimes take
    their kernels for bytes, hold all that is left: 0.
    """
    name, op = layer.site.layer, "Conv" if layer.convolution else "MatMul"
    node = next(n for n in model.graph.node if n.name == f"{name}/{op}")
    nodes, used = _ancestors(node.input[1], producers, constants)
    ones = torch.ones(len(layer.weights.scale))
    extra = {"one": torch.tensor(1.0), "zero": torch.tensor(layer.inputs.zero, dtype=torch.uint8), "ones": ones,
             "middle": torch.tensor(128, dtype=torch.uint8)}  # fmt: skip
    last = nodes[-1]
    last.input[1] = "ones"
    nodes = [helper.make_node("DequantizeLinear", ["bytes", "one", "zero"], ["x"]), *nodes]
    if layer.convolution:
        extra["minus"] = -total.flatten().int()
        nodes.append(helper.make_node("DequantizeLinear", ["minus", "ones"], ["bias"], axis=0))
        shape = list(layer.weights.codes.shape[2:])
        nodes.append(helper.make_node("Conv", ["x", last.output[0], "bias"], ["sum"], kernel_shape=shape, strides=shape,
                                      group=(*layer.site.node.args[6:7], 1)[0]))  # fmt: skip
        nodes.append(helper.make_node("QuantizeLinear", ["sum", "one", "middle"], ["rest"]))
        nodes.append(helper.make_node("DequantizeLinear", ["rest", "one", "middle"], ["y"]))
    else:
        nodes.append(helper.make_node("MatMul", ["x", last.output[0]], ["y"]))
    tensors = [t for t in used if t.name != "ones"] + [numpy_helper.from_array(t.numpy(), n) for n, t in extra.items()]
    patch = list(_patch(layer))
    free = ["n", patch[1], *(COPIES * k for k in patch[2:])]
    graph = helper.make_graph(nodes, name, [helper.make_tensor_value_info("bytes", TensorProto.UINT8, free)],
                              [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], tensors)  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)


def _ancestors(name: str, producers: dict[str, onnx.NodeProto],
               constants: dict[str, TensorProto]) -> tuple[list[onnx.NodeProto], list[TensorProto]]:  # fmt: skip
    """All that a constant of the file is computed from, in order."""
    nodes: list[onnx.NodeProto] = []
    used: dict[str, TensorProto] = {}
    seen: set[str] = set()

    def visit(value: str) -> None:
        if value in seen:
            return
        seen.add(value)
        if value in constants:
            used[value] = constants[value]
            return
        copied = onnx.NodeProto()
        copied.CopyFrom(producers[value])
        for source in copied.input:
            visit(source)
        nodes.append(copied)

    visit(name)
    return nodes, list(used.values())
