"""How fast a file is beside the same runtime's float and static int8 network, in turns within one process."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from nulsq_cli.exporters.runtimes import Run

Name = TypeVar("Name")


def times_in_turns(runs: dict[Name, Run], images: Tensor, rounds: int, *, warm: int = 2) -> dict[Name, list[float]]:
    """Milliseconds of each run; the rounds go through all of them, so that a busy machine slows all alike."""
    times: dict[Name, list[float]] = {name: [] for name in runs}
    for number in range(rounds + warm):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            if number >= warm:
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def in_turns(runs: dict[Name, Run], images: Tensor, rounds: int) -> dict[Name, float]:
    """The medians of `times_in_turns`."""
    return {name: statistics.median(found) for name, found in times_in_turns(runs, images, rounds).items()}


def compare(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds per call and ratios to `float32`, for files in the same runtime.

    Args:
        runs: by name, on one thread; `float32` is what the others are compared with.
        images: one batch.
        rounds: how often each is timed.
    """
    found = in_turns(runs, images, rounds)
    return {name: {"ms": ms, "ratio": ms / found["float32"]} for name, ms in found.items()}


def static_int8(content: bytes, images: Tensor) -> bytes:
    """ONNX Runtime's own static quantization of a float network: even 8-bit steps, ranges from some images."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = list(images.split(1))

        def get_next(self) -> dict[str, Any] | None:
            return {"image": self.left.pop().numpy()} if self.left else None

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a step of its own that would change the network
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(content)
            quantize_static(str(source), str(target), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
            return target.read_bytes()
    finally:
        root.setLevel(level)
