"""How quantized weights, inputs and layers are spelled so that stock runtimes compute them in integers."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from nulsq_cli.exporters.grids import Inputs, Weights
from nulsq_cli.exporters.lower import Layer, Network, Output
from nulsq_cli.exporters.trace import aten
from nulsq_cli.exporters.twin import float_weight
from nulsq_cli.exporters.writer import Writer, tensor_of
from nulsq_cli.ops import bits as packing

STREAMED = {2: 1, 3: 3}
"""Widths that are stored as a stream of bits, and in how many bytes of it a whole number of codes ends."""


def codes_name(layer: str) -> str:
    """The constant that holds a layer's codes."""
    return f"{layer}.weight.codes"


def integer_weight(w: Writer, layer: Layer) -> str:
    """Codes, a table lookup that runtimes do once when they load the file, and an ordinary DequantizeLinear."""
    weights, name = layer.weights, layer.site.layer
    axis, turned = (0, False) if layer.convolution else (1, True)
    scale = w.constant(weights.scale, near=f"{name}.weight.scale")
    kind = "uint8" if weights.offset else "int8"
    zero = w.constant(torch.full_like(weights.sign, weights.offset), kind, near=f"{name}.weight.zero")
    if weights.even:
        whole = weights.integer() + weights.offset
        stored = w.constant(whole.T if turned else whole, kind, near=codes_name(name))
        return w.add("DequantizeLinear", stored, scale, zero, axis=axis, near=f"{name}.weight")
    found = _looked_up(w, weights, weights.integers, "int32", name, turned)
    if (weights.sign != 1).any():
        sign = weights.sign[None] if turned else weights.per_output(weights.sign)
        found = w.add("Mul", found, w.constant(sign, "int32", near=f"{name}.weight.sign"))
    if weights.offset:
        found = w.add("Add", found, w.constant(weights.offset, "int32"))
    return w.add("DequantizeLinear", w.cast(found, kind), scale, zero, axis=axis, near=f"{name}.weight")


def _looked_up(w: Writer, weights: Weights, table: Tensor, kind: str, name: str, turned: bool) -> str:
    """table[code] for every weight, in the weight's shape; a linear map's lies turned around, (I, O)."""
    codes = weights.codes.T if turned else weights.codes
    index = _index(w, codes, weights.bits, codes_name(name))
    values = w.constant(table.T if turned and table.ndim == 2 else table, kind, near=f"{name}.weight.levels")
    if table.ndim == 1:
        return w.add("Gather", values, index, axis=0)
    if turned:
        return w.add("GatherElements", values, index, axis=0)
    rows = w.add("Reshape", index, w.constant([len(codes), -1], "int64"))
    return w.add("Reshape", w.add("GatherElements", values, rows, axis=1), w.constant(list(codes.shape), "int64"))


def _index(w: Writer, codes: Tensor, bits: int, name: str) -> str:
    """Codes as int32. Those of 2 and 3 bits lie in the file as the packed file's own stream of bits.

    Runtimes read uint4, but no uint3, and not all of them uint2. A few bytes that hold a whole number
    of codes make a number each, and division takes it apart; once, when the file is loaded.
    """
    if bits not in STREAMED:
        return w.cast(w.codes(codes, bits, near=name), "int32")
    group = STREAMED[bits]
    count = codes.numel()
    stream = torch.from_numpy(packing.pack(codes.contiguous().numpy(), bits))
    stream = F.pad(stream, (0, -len(stream) % group)).view(-1, group)
    stored = w.cast(w.constant(stream, near=name), "int32")
    # Column by column: bytes, Cast and Mul in a row would be a dequantization to OpenVINO, which it does not fold.
    columns = [w.add("Gather", stored, w.constant([k], "int64"), axis=1) for k in range(group)]
    number = columns[0]
    for k in range(1, group):
        number = w.add("Add", number, w.add("Mul", columns[k], w.constant(256**k, "int32")))
    shares = w.constant([2 ** (bits * k) for k in range(8 * group // bits)], "int32")
    found = w.add("Mod", w.add("Div", number, shares), w.constant(2**bits, "int32"))
    if stream.numel() * 8 // bits != count:
        flat = w.add("Reshape", found, w.constant([-1], "int64"))
        found = w.add("Slice", flat, w.constant([0], "int64"), w.constant([count], "int64"))
    return w.add("Reshape", found, w.constant(list(codes.shape), "int64"))


def stored_codes(model: onnx.ModelProto, layer: Layer) -> Tensor:
    """The codes of a layer as uint8 in the weight's shape, unpacked from a file; of an even weight, what is stored."""
    weights = layer.weights
    found = tensor_of(model, codes_name(layer.site.layer))
    shape = weights.codes.shape if layer.convolution else weights.codes.T.shape
    if weights.bits in STREAMED:
        count, bits = weights.codes.numel(), weights.bits
        stream = found.flatten().numpy()[: -(-count * bits // 8)]
        found = torch.from_numpy(packing.unpack(stream, bits, count)).view(shape)
    return found if layer.convolution else found.T


def exact_weight(w: Writer, layer: Layer) -> str:
    """Codes and the float table as it was trained; a folded BatchNorm is multiplied on."""
    weights, name, turned = layer.weights, layer.site.layer, not layer.convolution
    found = _looked_up(w, weights, weights.exact, "float32", name, turned)
    if layer.site.gain is None:
        return found
    return w.add("Mul", found, w.constant(weights.per_output(layer.site.gain.float()), near=f"{name}.weight.gain"))


def quantized_input(w: Writer, x: str, inputs: Inputs, *, whole: bool, name: str, shape: Sequence[int | torch.SymInt]) -> str:
    """An input as the level that it is rounded to; `shape` is its own, of which the batch may be open."""
    if not whole and inputs.form == "where":
        return _chain(w, x, inputs.levels, "float32", inputs.thresholds)
    scale, zero = w.constant(inputs.scale, "float32"), w.constant(inputs.zero, "uint8")
    if inputs.form == "even":
        y = w.add("QuantizeLinear", x, scale, zero, near=f"{name}.input")
        y = y if inputs.top == 255 else w.add("Min", y, w.constant(inputs.top, "uint8"))
    elif inputs.form == "where":
        y = _stairs(w, x, inputs)
    else:
        cell, middle = w.constant(inputs.cell, "float32"), w.constant(inputs.cell_zero, "uint8")
        cells = w.add("QuantizeLinear", x, cell, middle, near=f"{name}.input")
        y = _sum(w, cells, inputs) if inputs.form == "sum8" else _table(w, cells, inputs, shape)
    return w.add("DequantizeLinear", y, scale, zero)


def _chain(w: Writer, x: str, values: Tensor, kind: str, thresholds: Tensor) -> str:
    """Comparisons with float thresholds, one select each."""
    y = w.constant(values[0], kind)
    for threshold, value in zip(thresholds, values[1:], strict=True):
        y = w.add("Where", w.add("Greater", x, w.constant(threshold)), w.constant(value, kind), y)
    return y


ROUNDING = 0.25
"""Added to a sum of whole floats before it is cut to bytes: OpenVINO takes Cast and Mul for a dequantization and moves its scale
behind the sum, and what ends a last bit below a whole number would lose one. Right for a runtime that rounds, too."""


def _stairs(w: Writer, x: str, inputs: Inputs) -> str:
    """The lowest level plus the gap behind every float threshold that is exceeded, as float: OpenVINO computes one kernel of it,
    which takes a third to a half of the time that it takes for selects between bytes."""
    y = w.constant(float(inputs.stored[0]) + ROUNDING, "float32")
    for threshold, gap in zip(inputs.thresholds, inputs.stored.diff(), strict=True):
        passed = w.cast(w.add("Greater", x, w.constant(threshold)), "float32")
        y = w.add("Add", y, w.add("Mul", passed, w.constant(gap, "float32")))
    return w.cast(y, "uint8")


def _sum(w: Writer, cells: str, inputs: Inputs) -> str:
    """The lowest level plus the gap behind every threshold that is exceeded; never beyond a byte."""
    gaps = inputs.stored.diff()
    y = ""
    for cell, gap in zip(inputs.cells, gaps, strict=True):
        step = w.add("Mul", w.cast(w.add("Greater", cells, w.constant(cell, "uint8")), "uint8"), w.constant(gap, "uint8"))
        y = w.add("Add", y, step) if y else step
    return w.add("Add", y, w.constant(inputs.stored[0], "uint8")) if inputs.stored[0] else y


def _table(w: Writer, cells: str, inputs: Inputs, shape: Sequence[int | torch.SymInt]) -> str:
    """One lookup in 256 entries. GatherElements on a flat tensor: Gather copies every byte by a call of its own."""
    codes = torch.bucketize(torch.arange(256), inputs.cells.contiguous())
    flat = w.add("Reshape", w.cast(cells, "int32"), w.constant([-1], "int64"))
    y = w.add("GatherElements", w.constant(inputs.stored[codes], "uint8", near="table"), flat, axis=0)
    known = all(isinstance(size, int) for size in shape[1:])
    return w.add("Reshape", y, w.constant([-1, *shape[1:]], "int64") if known else w.add("Shape", cells))


def as_bytes(w: Writer, y: str, output: Output) -> str:
    """An output rounded to bytes and back, which lets ONNX Runtime keep the convolution in integers."""
    scale, zero = w.constant(output.scale, "float32"), w.constant(output.zero, "uint8")
    return w.add("DequantizeLinear", w.add("QuantizeLinear", y, scale, zero), scale, zero)


def weighted(w: Writer, network: Network, node: fx.Node, layer: Layer, x: str, pads: list[int] | None) -> str:
    """A convolution or linear map on an input that is already quantized.

    Args:
        w: the graph.
        network: what becomes of the model.
        node: the operator.
        layer: its weights.
        x: name of the input.
        pads: (top, left, bottom, right) of a padding that came before.
    """
    name = layer.site.layer
    if layer.weights is None:
        weight = float_weight(network, layer)
        stored = w.constant(weight if layer.convolution else weight.T, near=f"{name}.weight")
    else:
        stored = (integer_weight if network.options.grid == "int8" else exact_weight)(w, layer)
    if not layer.convolution:
        y = w.add("MatMul", x, stored, near=name)
        return y if layer.bias is None else w.add("Add", y, w.constant(layer.bias, near=f"{name}.bias"))
    inputs = [x, stored]
    if layer.bias is not None:
        inputs.append(integer_bias(w, layer) if layer.integer and network.options.grid == "int8"
                      else w.constant(layer.bias, near=f"{name}.bias"))  # fmt: skip
    return w.add("Conv", *inputs, near=name, **conv_attributes(node, layer, pads))


def integer_bias(w: Writer, layer: Layer) -> str:
    """An int32 bias in units of the sum of products."""
    name = layer.site.layer
    unit = w.constant(layer.unit, near=f"{name}.unit")
    return w.add("DequantizeLinear", w.constant(layer.integer_bias, "int32", near=f"{name}.bias"), unit, axis=0)


def conv_attributes(node: fx.Node, layer: Layer, pads: list[int] | None) -> dict[str, object]:
    """What ONNX calls the further arguments of a convolution."""
    stride, padding, dilation, groups = (*node.args[3:7], *([1, 1], [0, 0], [1, 1], 1)[len(node.args[3:7]) :])
    shape = layer.site.node.args[1].meta["val"].shape
    if node.target == aten.conv2d.padding:
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, shape[2:], strict=True)]
        low = [t // 2 for t in total]
        around = [*low, *(t - b for t, b in zip(total, low, strict=True))]
    else:
        around = [*padding, *padding]
    around = [a + b for a, b in zip(around, pads or [0] * 4, strict=True)]
    return {"kernel_shape": list(shape[2:]), "strides": list(stride), "pads": around, "dilations": list(dilation),
            "group": groups}  # fmt: skip
