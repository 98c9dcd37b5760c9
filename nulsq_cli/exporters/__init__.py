"""The table of export targets. Importing this loads no torch, no onnx and no runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from nulsq_cli.errors import UsageError, pick


@dataclass(frozen=True)
class Exporter:
    """A format that a run can be written in.

    Args:
        idea: one line for people.
        suffix: of the file.
        act: which form of activations `auto` stands for; None where there are none.
        needs: modules beyond nulsq's own.
        extra: of `pip install 'nulsq[extra]'`, which brings them.
    """

    idea: str
    suffix: str
    act: str | None = None
    needs: tuple[str, ...] = ()
    extra: str = ""

    def check_installed(self) -> None:
        """Refuse at once what cannot be done without a package that is not here.

        Raises:
            UsageError: one is missing; it says which extra brings it.
        """
        for name in self.needs:
            if find_spec(name) is None:
                raise UsageError(f"needs {name}, which is not installed", fix=f"pip install 'nulsq[{self.extra}]'")


EXPORTERS: dict[str, Exporter] = {
    "safetensors": Exporter("codes and tables packed, computes exactly what the run computes", ".safetensors"),
    "onnx": Exporter("integers for ONNX Runtime, and others that read ONNX", ".onnx", "auto", ("onnx", "onnxruntime"), "onnx"),
    "openvino": Exporter("integers for OpenVINO, as its own IR", ".xml", "where", ("onnx", "openvino"), "openvino"),
}

EXPORTED = ("onnx", "openvino")
"""The kinds of files that a runtime computes."""

RUNTIMES: dict[str, Exporter] = {"onnxruntime": EXPORTERS["onnx"], "openvino": EXPORTERS["openvino"]}
"""What runs an exported file, by name: an ONNX file any of them, OpenVINO's own file the second."""


def need(runtime: str) -> None:
    """Refuse a runtime that does not exist or is not here.

    Raises:
        UsageError: it says what there is, or which extra brings it.
    """
    pick(RUNTIMES, runtime, "runtime").check_installed()


def installed() -> list[str]:
    """The runtimes that are here."""
    return [name for name, line in RUNTIMES.items() if all(find_spec(module) for module in line.needs)]


def runtimes_of(kind: str, asked: Sequence[str], where: object) -> list[str]:
    """The runtimes that are to run an exported file; all are installed.

    Args:
        kind: of `EXPORTED`.
        asked: what the user named; empty takes all that read such a file and are here.
        where: the file, for complaints.

    Raises:
        UsageError: one that does not exist, is not here or does not read such a file; or none is here.
    """
    readers = list(RUNTIMES) if kind == "onnx" else [kind]
    for name in asked:
        need(name)
    found = [name for name in asked or installed() if name in readers]
    if asked and not found:
        raise UsageError(f"is OpenVINO's own file, which {asked[0]} does not read", where=where, fix="leave out --runtime")
    if not found:
        need(readers[0])
    return found
