"""A file that nulsq exported for a runtime, read back: what it says of itself, and how it runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from nulsq_cli.artifact import Artifact
from nulsq_cli.errors import InputError, first_line
from nulsq_cli.exporters import runtimes
from nulsq_cli.exporters.lower import Options, lower
from nulsq_cli.exporters.onnx_file import METADATA, build, check_operators
from nulsq_cli.exporters.trace import trace

LARGEST_SIDE = 1 << 16


@dataclass(frozen=True)
class Exported:
    """A file of ours for a runtime: `meta` is what it says of itself, checked."""

    path: Path
    meta: dict[str, Any]

    def run(self, runtime: str, threads: int = 0) -> runtimes.Run:
        """The file in a runtime, with the session options that it asks for.

        Raises:
            InputError: the runtime does not take it.
        """
        return start(self.path, runtime, threads, self.path, self.meta["session"])


def read(path: Path) -> Exported:
    """Read what an exported file says of itself; its graph is left to the runtimes.

    Raises:
        InputError: missing, damaged, or none of ours.
    """
    text, name = (_said_in_ir if path.suffix == ".xml" else _said_in_onnx)(path)
    if text is None:
        raise InputError(f"is an {name}, but not one that nulsq wrote: it does not say how images are prepared", where=path,
                         fix="write one with `nulsq export RUN`")  # fmt: skip
    try:
        meta = json.loads(text)
        sizes, optimizers = meta["data_cfg"]["input_size"], meta["session"]["disabled_optimizers"]
        good = meta["format"] == "nulsq-onnx" and isinstance(meta["arch"], str) and len(sizes) == 3 and set(meta["session"]) == {
            "disabled_optimizers"} and isinstance(optimizers, list) and all(isinstance(o, str) for o in optimizers)  # fmt: skip
        if not good or not all(type(n) is int and 0 < n <= LARGEST_SIDE for n in (*sizes, meta["num_classes"])):
            raise ValueError("it contradicts itself")
    except (ValueError, KeyError, TypeError, RecursionError) as reason:
        raise InputError(f"is damaged: what it says of itself cannot be used ({reason})", where=path,
                         fix="export the run again") from reason  # fmt: skip
    return Exported(Path(path), meta)


def _said_in_onnx(path: Path) -> tuple[str | None, str]:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror or reason}", where=path) from reason
    except Exception as reason:  # protobuf has a class of its own for this, under names that change
        raise InputError("is truncated or no ONNX file", where=path) from reason
    return {p.key: p.value for p in model.metadata_props}.get(METADATA), "ONNX file"


def _said_in_ir(path: Path) -> tuple[str | None, str]:
    try:
        model = runtimes.openvino_core().read_model(str(path))
    except Exception as reason:  # OpenVINO raises what C++ threw
        raise InputError("is damaged or no model of OpenVINO, or its .bin file is not beside it", where=path,
                         fix="export the run again") from reason  # fmt: skip
    return model.get_rt_info(METADATA).astype(str) if model.has_rt_info(METADATA) else None, "OpenVINO model"


def start(content: bytes | Path, runtime: str, threads: int, where: Any, session: dict[str, Any] | None = None) -> runtimes.Run:
    """A network in a runtime.

    Args:
        content: the file, or where it is.
        runtime: a name in `exporters.RUNTIMES`, installed.
        threads: 0 leaves the choice to the runtime.
        where: for complaints.
        session: further arguments of ONNX Runtime's session.

    Raises:
        InputError: the runtime does not take it.
    """
    try:
        if runtime == "openvino":
            return runtimes.openvino(content, threads=threads)[0]
        return runtimes.onnxruntime(content, threads=threads, **({} if session is None else {"session": session}))
    except Exception as reason:  # each runtime has classes of its own
        raise InputError(f"{runtime} does not take it: {first_line(reason)}", where=where,
                         fix="export it again with `nulsq export`") from reason  # fmt: skip


class Deployed(nn.Module):
    """A network that computes in a runtime, wherever its images lie.

    Args:
        run: as `Exported.run` gives it.
        num_classes: how many outputs it has.
        runtime: its name.
    """

    def __init__(self, run: runtimes.Run, num_classes: int, runtime: str) -> None:
        super().__init__()
        self.run, self.num_classes, self.runtime = run, num_classes, runtime

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, classes)."""
        return self.run(x.float().cpu().contiguous()).to(x.device)


def float_file(model: nn.Module, size: list[int]) -> bytes:
    """A float network as an ONNX file.

    Raises:
        UsageError: it has an operator without a translation.
    """
    traced = trace(model, tuple(size))
    check_operators(traced)
    meta = {"arch": "", "num_classes": 0, "data_cfg": {}, "bits": "32/32", "method": "float", "layers": {}}
    artifact = Artifact(Path(), meta, {})
    return build(lower(traced, artifact, Options(grid="none", outputs=False)), artifact, size).SerializeToString()
