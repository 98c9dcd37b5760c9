"""Torch operators as ONNX nodes. Constants are folded before; shapes are known but for the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from nulsq_cli.errors import UsageError
from nulsq_cli.exporters.lower import bounds
from nulsq_cli.exporters.trace import aten, normalization
from nulsq_cli.exporters.writer import Writer


class Emit:
    """What an operator's translation needs: the graph, and the names of values that are already there."""

    def __init__(self, writer: Writer, values: dict[str, Tensor], image: str) -> None:
        self.w, self.values, self.image = writer, values, image
        self.names: dict[fx.Node, Any] = {}

    def of(self, value: Any) -> str:
        """The name of an argument; a number or a folded tensor becomes a constant."""
        if isinstance(value, fx.Node):
            if value not in self.names:
                self.names[value] = self.w.constant(self.values[value.name], near=value.meta.get("path", value.name))
            return self.names[value]
        return self.w.constant(value, "float32")

    def ints(self, values: Any) -> str:
        """Whole numbers as a constant."""
        return self.w.constant(list(values), "int64")

    def reshaped(self, x: str, node: fx.Node) -> str:
        """x in the shape of a node's result."""
        shape = [int(d) if not isinstance(d, torch.SymInt) else -1 for d in shape_of(node)]
        if shape.count(-1) > 1:
            raise unknown(node, "a shape with two free sizes")
        return self.w.add("Reshape", x, self.ints(shape))


def shape_of(node: fx.Node) -> torch.Size:
    """The shape of a node's result; the batch is symbolic."""
    return node.meta["val"].shape


def unknown(node: fx.Node, what: str | None = None) -> UsageError:
    """An operator that has no translation."""
    name = what or str(node.target).removeprefix("aten.").removesuffix(".default")
    return UsageError(f"no ONNX form of {name}", where=node.name, fix="export this model with --to safetensors")


def _argument(node: fx.Node, name: str) -> Any:
    """An argument by its name in the operator's schema, wherever it was given."""
    for place, known in enumerate(node.target._schema.arguments):
        if known.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, known.default_value)
    raise KeyError(name)


def _plain(op: str, **attributes: Any) -> Callable[[Emit, fx.Node], str]:
    return lambda e, n: e.w.add(op, e.of(n.args[0]), **attributes)


def _binary(op: str) -> Callable[[Emit, fx.Node], str]:
    def emit(e: Emit, n: fx.Node) -> str:
        other = e.of(n.args[1])
        if n.kwargs.get("alpha", 1) != 1:
            other = e.w.add("Mul", other, e.of(n.kwargs["alpha"]))
        return e.w.add(op, e.of(n.args[0]), other)

    return emit


def _rectify(e: Emit, n: fx.Node) -> str:
    low, high = bounds(n)
    if (low, high) == (0.0, float("inf")):
        return e.w.add("Relu", e.of(n.args[0]))
    return e.w.add("Clip", e.of(n.args[0]), e.of(low), e.of(high))


def _batch_norm(e: Emit, n: fx.Node) -> str:
    gain, shift = (v.float().view(-1, *[1] * (len(shape_of(n)) - 2)) for v in normalization(n, e.values))
    return e.w.add("Add", e.w.add("Mul", e.of(n.args[0]), e.w.constant(gain)), e.w.constant(shift))


def _layer_norm(e: Emit, n: fx.Node) -> str:
    weight, bias = _argument(n, "weight"), _argument(n, "bias")
    shape = list(_argument(n, "normalized_shape"))
    scale = e.w.constant(torch.ones(shape)) if weight is None else e.of(weight)
    inputs = [e.of(n.args[0]), scale, *([] if bias is None else [e.of(bias)])]
    return e.w.add("LayerNormalization", *inputs, axis=-len(shape), epsilon=_argument(n, "eps"))


def _gelu(e: Emit, n: fx.Node) -> str:
    return e.w.add("Gelu", e.of(n.args[0]), approximate=_argument(n, "approximate"))


def _hard_swish(e: Emit, n: fx.Node) -> str:
    return e.w.add("HardSwish", e.of(n.args[0]))


def _silu(e: Emit, n: fx.Node) -> str:
    x = e.of(n.args[0])
    return e.w.add("Mul", x, e.w.add("Sigmoid", x))


def _mean(e: Emit, n: fx.Node, op: str = "ReduceMean") -> str:
    dims = n.args[1] if len(n.args) > 1 and n.args[1] is not None else range(len(shape_of(n.args[0])))
    return e.w.add(op, e.of(n.args[0]), e.ints(dims), keepdims=int(_argument(n, "keepdim")))


def _norm(e: Emit, n: fx.Node) -> str:
    if _argument(n, "ord") != 2:
        raise unknown(n)
    return e.w.add("ReduceL2", e.of(n.args[0]), e.ints(_argument(n, "dim")), keepdims=int(_argument(n, "keepdim")))


def _pool(op: str) -> Callable[[Emit, fx.Node], str]:
    def emit(e: Emit, n: fx.Node) -> str:
        pair = lambda name, default: ([*v, *v][:2] if (v := _argument(n, name)) else default)  # noqa: E731
        kernel = pair("kernel_size", None)
        padding = pair("padding", [0, 0])
        how = {"kernel_shape": kernel, "strides": pair("stride", kernel), "pads": [*padding, *padding],
               "ceil_mode": int(_argument(n, "ceil_mode"))}  # fmt: skip
        if op == "AveragePool":
            if _argument(n, "divisor_override") is not None:
                raise unknown(n)
            how["count_include_pad"] = int(_argument(n, "count_include_pad"))
        else:
            how["dilations"] = pair("dilation", [1, 1])
            if (found := e.w.dequantized(e.of(n.args[0]))) is not None:  # the largest byte is that of the largest value
                stored, scale, zero = found
                return e.w.add("DequantizeLinear", e.w.add(op, stored, **how), scale, zero)
        return e.w.add(op, e.of(n.args[0]), **how)

    return emit


def _adaptive(e: Emit, n: fx.Node) -> str:
    size, shape = list(n.args[1]), shape_of(n.args[0])
    if size == [1, 1]:
        return e.w.add("GlobalAveragePool", e.of(n.args[0]))
    if any(int(s) % t for s, t in zip(shape[2:], size, strict=True)):
        raise unknown(n, f"pooling {list(map(int, shape[2:]))} to {size}")
    kernel = [int(s) // t for s, t in zip(shape[2:], size, strict=True)]
    return e.of(n.args[0]) if kernel == [1, 1] else e.w.add("AveragePool", e.of(n.args[0]), kernel_shape=kernel, strides=kernel)


def padding_of(node: fx.Node) -> tuple[list[int], float]:
    """(all begins, then all ends) and the value of a constant padding."""
    pads, rank = list(node.args[1]), len(shape_of(node))
    if len(node.args) > 2 and isinstance(node.args[2], str) and node.args[2] != "constant":
        raise unknown(node, f"{node.args[2]} padding")
    value = _argument(node, "value")
    begins, ends = [0] * rank, [0] * rank
    for place in range(len(pads) // 2):
        begins[rank - 1 - place], ends[rank - 1 - place] = pads[2 * place], pads[2 * place + 1]
    return [*begins, *ends], float(value or 0.0)


def _pad(e: Emit, n: fx.Node) -> str:
    around, value = padding_of(n)
    return e.w.add("Pad", e.of(n.args[0]), e.ints(around), e.of(value)) if any(around) else e.of(n.args[0])


def _slice(e: Emit, n: fx.Node) -> str:
    dim = _argument(n, "dim")
    start, end, step = (_argument(n, name) for name in ("start", "end", "step"))
    if isinstance(end, fx.Node) or isinstance(start, fx.Node):
        raise unknown(n, "a slice of free size")
    ends = 2**62 if end is None else end
    return e.w.add("Slice", e.of(n.args[0]), e.ints([start or 0]), e.ints([ends]), e.ints([dim]), e.ints([step or 1]))


def _select(e: Emit, n: fx.Node) -> str:
    return e.w.add("Gather", e.of(n.args[0]), e.w.constant(n.args[2], "int64"), axis=n.args[1])


def _cat(e: Emit, n: fx.Node) -> str:
    return e.w.add("Concat", *(e.of(a) for a in n.args[0]), axis=_argument(n, "dim"))


def _unbind(e: Emit, n: fx.Node) -> list[str]:
    dim = _argument(n, "dim")
    return [e.w.add("Gather", e.of(n.args[0]), e.w.constant(k, "int64"), axis=dim) for k in range(len(n.meta["val"]))]


def _pieces(e: Emit, n: fx.Node) -> list[str]:
    dim, values = _argument(n, "dim"), n.meta["val"]
    ends = torch.tensor([0, *(int(v.shape[dim]) for v in values)]).cumsum(0).tolist()
    return [e.w.add("Slice", e.of(n.args[0]), e.ints([a]), e.ints([b]), e.ints([dim]))
            for a, b in zip(ends[:-1], ends[1:], strict=True)]  # fmt: skip


def _permute(e: Emit, n: fx.Node) -> str:
    rank = len(shape_of(n))
    order = list(range(rank))
    if n.target == aten.permute.default:
        order = [d % rank for d in n.args[1]]
    else:
        a, b = (d % rank for d in (n.args[1:3] if n.target == aten.transpose.int else (0, 1)))
        order[a], order[b] = b, a
    return e.w.add("Transpose", e.of(n.args[0]), perm=order)


def _roll(e: Emit, n: fx.Node) -> str:
    x, shape = e.of(n.args[0]), shape_of(n)
    for shift, dim in zip(n.args[1], n.args[2], strict=True):
        at = -shift % int(shape[dim])
        if at:
            back = e.w.add("Slice", x, e.ints([at]), e.ints([2**62]), e.ints([dim]))
            x = e.w.add("Concat", back, e.w.add("Slice", x, e.ints([0]), e.ints([at]), e.ints([dim])), axis=dim)
    return x


def _expand(e: Emit, n: fx.Node) -> str:
    one = e.ints([1])
    sizes = []
    for size in shape_of(n):
        if not isinstance(size, torch.SymInt):
            sizes.append(e.ints([int(size)]))
            continue
        batch = e.w.add("Slice", e.w.add("Shape", e.image), e.ints([0]), one)
        sizes.append(e.w.add("Mul", batch, e.ints([int(size.node.hint) // 2])))  # traced with a batch of 2
    return e.w.add("Expand", e.of(n.args[0]), e.w.add("Concat", *sizes, axis=0))


def _softmax(e: Emit, n: fx.Node) -> str:
    return e.w.add("Softmax", e.of(n.args[0]), axis=n.args[1])


def _attention(e: Emit, n: fx.Node) -> str:
    q, k, v = (e.of(a) for a in n.args[:3])
    shape = shape_of(n.args[0])
    if _argument(n, "is_causal"):
        raise unknown(n, "causal attention")
    scale, mask = _argument(n, "scale"), _argument(n, "attn_mask")
    q = e.w.add("Mul", q, e.of(float(shape[-1]) ** -0.5 if scale is None else scale))
    order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
    scores = e.w.add("MatMul", q, e.w.add("Transpose", k, perm=order))
    if mask is not None:
        scores = e.w.add("Add", scores, e.of(mask))
    return e.w.add("MatMul", e.w.add("Softmax", scores, axis=-1), v)


def _addcmul(e: Emit, n: fx.Node) -> str:
    product = e.w.add("Mul", e.of(n.args[1]), e.of(n.args[2]))
    value = n.kwargs.get("value", 1)
    return e.w.add("Add", e.of(n.args[0]), product if value == 1 else e.w.add("Mul", product, e.of(value)))


def _shape(e: Emit, n: fx.Node) -> str:
    return e.reshaped(e.of(n.args[0]), n)


OPERATORS: dict[Any, Callable[[Emit, fx.Node], Any]] = {
    **dict.fromkeys((aten.relu.default, aten.relu_.default, aten.relu6.default, aten.relu6_.default, aten.hardtanh.default,
                     aten.hardtanh_.default, aten.clamp.default, aten.clamp_.default), _rectify),
    **dict.fromkeys((aten.silu.default, aten.silu_.default), _silu),
    **dict.fromkeys((aten.hardswish.default, aten.hardswish_.default), _hard_swish),
    **dict.fromkeys((aten.hardsigmoid.default, aten.hardsigmoid_.default), _plain("HardSigmoid", alpha=1 / 6, beta=0.5)),
    **dict.fromkeys((aten.sigmoid.default, aten.sigmoid_.default), _plain("Sigmoid")),
    **dict.fromkeys((aten.tanh.default, aten.tanh_.default), _plain("Tanh")),
    **dict.fromkeys((aten.add.Tensor, aten.add_.Tensor), _binary("Add")),
    **dict.fromkeys((aten.sub.Tensor, aten.sub_.Tensor), _binary("Sub")),
    **dict.fromkeys((aten.mul.Tensor, aten.mul_.Tensor), _binary("Mul")),
    **dict.fromkeys((aten.div.Tensor, aten.div_.Tensor), _binary("Div")),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default), _binary("MatMul")),
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
                     aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default), _shape),
    **dict.fromkeys((aten.permute.default, aten.transpose.int, aten.t.default), _permute),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default), _pieces),
    aten.gelu.default: _gelu, aten.softmax.int: _softmax, aten.scaled_dot_product_attention.default: _attention,
    aten.batch_norm.default: _batch_norm, aten.layer_norm.default: _layer_norm, aten.linalg_vector_norm.default: _norm,
    aten.mean.dim: _mean, aten.sum.dim_IntList: lambda e, n: _mean(e, n, "ReduceSum"), aten.addcmul.default: _addcmul,
    aten.max_pool2d.default: _pool("MaxPool"), aten.avg_pool2d.default: _pool("AveragePool"),
    aten.adaptive_avg_pool2d.default: _adaptive, aten.pad.default: _pad, aten.slice.Tensor: _slice, aten.select.int: _select,
    aten.cat.default: _cat, aten.unbind.int: _unbind, aten.roll.default: _roll, aten.expand.default: _expand,
}  # fmt: skip
"""The operators that have a translation."""
