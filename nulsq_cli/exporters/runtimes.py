"""ONNX Runtime and OpenVINO: whether they are here, how a file is run in them, and what they made of it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nulsq_cli.exporters.onnx_file import SESSION

Run = Callable[[Tensor], Tensor]
"""(N, C, H, W) images to logits."""

INTEGER_OPERATORS = {"QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"}
"""What ONNX Runtime calls a layer that multiplies bytes."""

AS_WRITTEN = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""OpenVINO on processors with VNNI would round the input of a linear layer that it computes in float to 8 bits of its own, and
without f32 those with bf16 would round everything. The first setting travels in OpenVINO's own file, the second cannot."""

OPTIMIZERS_OFF, OPTIMIZERS_ON = "onnxruntime, optimizers off", "onnxruntime"
OPENVINO, OPENVINO_ANY = "openvino", "openvino, any batch"


def here(name: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(name) is not None


def onnxruntime(content: bytes | Path, *, optimized: bool = True, threads: int = 0, dump: Path | None = None,
                session: Mapping[str, Any] = SESSION) -> Run:  # fmt: skip
    """A session on the processor.

    Args:
        content: the file, or where it is.
        optimized: else all of the runtime's optimizers are off.
        threads: 0 leaves the choice to the runtime.
        dump: file for the graph that the optimizers arrive at.
        session: further arguments of the session.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = content if isinstance(content, bytes) else str(content)
    started = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"], **session)
    name = started.get_inputs()[0].name
    return lambda images: torch.from_numpy(started.run(None, {name: images.numpy()})[0])


@cache
def openvino_core() -> Any:
    """OpenVINO's entry, one for the life of the process: its threads may outlive what an entry unloads when it goes."""
    os.environ.setdefault("OPENVINO_TELEMETRY", "0")
    import openvino as ov

    return ov.Core()


def openvino(content: bytes | Path, *, threads: int = 0, any_batch: bool = False) -> tuple[Run, object]:
    """(a compiled model on the processor, OpenVINO's own object of it).

    Args:
        content: the file, or where it is.
        threads: 0 leaves the choice to the runtime.
        any_batch: compile once, with the batch left open; else for each size that comes, of which OpenVINO fuses more, and
            the object is that for one image.
    """
    settings = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, **AS_WRITTEN}
    if threads:
        settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
    core = openvino_core()

    @cache
    def request(batch: int | None) -> Any:
        model = core.read_model(content if isinstance(content, bytes) else str(content))
        if batch is not None:
            fix_batch(model, batch)
        return core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(np.array(request(None if any_batch else len(images)).infer({0: images.numpy()})[0]))

    return run, request(None if any_batch else 1).get_compiled_model()


def fix_batch(model: Any, batch: int) -> None:
    """Make a model of OpenVINO one for batches of one size; it can be given another size again."""
    shape = model.inputs[0].partial_shape
    shape[0] = batch
    model.reshape(shape)


def integer_layers_of_onnxruntime(content: bytes | Path) -> int:
    """How many layers multiply bytes in the graph that ONNX Runtime's optimizers arrive at."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimized.onnx"
        onnxruntime(content, dump=dump)
        return sum(node.op_type in INTEGER_OPERATORS for node in onnx.load(dump).graph.node)


def integer_layers_of_openvino(compiled: object) -> int:
    """How many layers OpenVINO computes by a kernel for bytes.

    The kernel's own name says so; `runtimePrecision` also says u8 where bytes are converted back to float.
    """
    count = 0
    for operator in compiled.get_runtime_model().get_ops():  # type: ignore[attr-defined]
        info = operator.get_rt_info()
        kind, kernel = (info[key].astype(str) for key in ("layerType", "primitiveType"))
        count += kind in ("Convolution", "FullyConnected") and kernel.upper().endswith("_I8")
    return count
