"""An ONNX graph that grows node by node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from nulsq_cli.ops import bits as packing

OPSET, IR = 21, 10
KINDS = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int32": TensorProto.INT32,
         "int64": TensorProto.INT64, "bool": TensorProto.BOOL}  # fmt: skip


class Writer:
    """Nodes and constants of a graph; names are made as they are needed, constants stored once."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.known: dict[Any, str] = {}
        self.used: set[str] = set()

    def name(self, wish: str) -> str:
        """A name that is still free, near the one wished for."""
        found, number = wish, 1
        while found in self.used:
            found, number = f"{wish}_{number}", number + 1
        self.used.add(found)
        return found

    def add(self, op: str, *inputs: str, near: str = "", **attributes: Any) -> str:
        """A node with one result, whose name comes back."""
        return self.several(op, inputs, 1, near=near, **attributes)[0]

    def several(self, op: str, inputs: tuple[str, ...], results: int, *, near: str = "", **attributes: Any) -> list[str]:
        """A node with several results."""
        names = [self.name(f"{near or op.lower()}") for _ in range(results)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=self.name(f"{near or 'nulsq'}/{op}"), **attributes))
        return names

    def dequantized(self, name: str) -> tuple[str, str, str] | None:
        """The bytes, the scale and the zero point that a value stands for; None if it is no such value."""
        node = next((n for n in reversed(self.nodes) if name in n.output), None)
        return tuple(node.input) if node is not None and node.op_type == "DequantizeLinear" and len(node.input) == 3 else None

    def constant(self, value: Any, kind: str | None = None, *, near: str = "c") -> str:
        """A constant by value: a tensor, a number or a list; small ones that are equal are stored once."""
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if kind is None and array.dtype == np.float64:
            kind = "float32"
        array = np.ascontiguousarray(array.astype(kind)).reshape(array.shape) if kind else array
        key = (array.dtype.str, array.shape, array.tobytes()) if array.size <= 64 else None
        if key is not None and key in self.known:
            return self.known[key]
        name = self.name(near)
        self.constants[name] = numpy_helper.from_array(array, name)
        if key is not None:
            self.known[key] = name
        return name

    def codes(self, codes: Tensor, bits: int, *, near: str) -> str:
        """Weight codes, in the smallest type that runtimes read: uint4 up to 4 bits, else uint8."""
        name = self.name(near)
        tensor = TensorProto(name=name, dims=list(codes.shape))
        flat = codes.contiguous().numpy()
        small = bits <= 4
        tensor.data_type = TensorProto.UINT4 if small else TensorProto.UINT8
        tensor.raw_data = packing.pack(flat, 4 if small else 8).tobytes()
        self.constants[name] = tensor
        return name

    def cast(self, x: str, kind: str) -> str:
        """x as another type."""
        return self.add("Cast", x, to=KINDS[kind])

    def model(self, image: tuple[str, list[Any]], result: str, metadata: dict[str, str]) -> onnx.ModelProto:
        """The finished file.

        Args:
            image: name and shape of the input; a string in the shape is a free dimension.
            result: name of the value that is the output, which is called `logits`.
            metadata: strings.
        """
        self.nodes.append(helper.make_node("Identity", [result], ["logits"], name="logits"))
        graph = helper.make_graph(
            self.nodes, "nulsq", [helper.make_tensor_value_info(image[0], TensorProto.FLOAT, image[1])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)], list(self.constants.values()))  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="nulsq")
        helper.set_model_props(model, metadata)
        return model


def tensor_of(model: onnx.ModelProto, name: str) -> Tensor:
    """A constant of a file by name; codes of 4 bits come as uint8."""
    found = next(t for t in model.graph.initializer if t.name == name)
    if found.data_type == TensorProto.UINT4:
        count = int(np.prod(found.dims))
        flat = packing.unpack(np.frombuffer(found.raw_data, np.uint8), 4, count)
        return torch.from_numpy(flat).view(list(found.dims))
    return torch.from_numpy(numpy_helper.to_array(found).copy())
