"""From a packed file to a proven file for a runtime."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from nulsq_cli.artifact import Artifact
from nulsq_cli.errors import CheckFailedError, UsageError, first_line, pick
from nulsq_cli.exporters import EXPORTERS, layer_proof, runtimes
from nulsq_cli.exporters.latency import compare, static_int8
from nulsq_cli.exporters.lower import Network, Options, float_layers, lower
from nulsq_cli.exporters.onnx_file import METADATA, build, check_operators
from nulsq_cli.exporters.proof import LEAST_SHARE, NOTABLE_LOSS, Trial
from nulsq_cli.exporters.trace import Traced, trace
from nulsq_cli.exporters.twin import Twin, settle
from nulsq_cli.files import write_atomically

OWN = {"onnx": (runtimes.OPTIMIZERS_ON, runtimes.OPTIMIZERS_OFF), "openvino": (runtimes.OPENVINO,)}
"""The ways to run a file in which it has to agree with its twin; any other runtime that is here is reported."""

GRIDS, ACTS, RANGES = ("int8", "float"), ("auto", "where", "sum8", "table"), (7, 8)


@dataclass(frozen=True)
class Material:
    """Images for an export.

    Args:
        calibration: batches from which outputs take their ranges.
        trial: batches, with classes where these are known, on which the file is compared with its twin.
        few: how many of those the slow ways to run the file see.
        real: whether the ranges come from images of the run, not from noise.
    """

    calibration: list[Tensor]
    trial: Iterable[tuple[Tensor, Tensor | None]]
    few: int = 1000
    real: bool = True


def options_for(target: str, grid: str, act: str, reach: int) -> Options:
    """What the user asked for, as the rooms take it.

    Raises:
        UsageError: no such target, grid, activation form or range.
    """
    exporter = pick(EXPORTERS, target, "export target")
    for name, value, known in (("--grid", grid, GRIDS), ("--act", act, ACTS), ("--range", reach, RANGES)):
        if value not in known:
            raise UsageError(f"{name} {value} does not exist", fix=f"choose from {', '.join(map(str, known))}")
    form = exporter.act if act == "auto" else act
    return Options(grid, str(form), reach, outputs=grid == "int8" and target == "onnx" and form != "where")


def deploy(target: str, model: nn.Module, artifact: Artifact, path: Path, options: Options, material: Material, *,
           rounds: int, say: Callable[[str], None]) -> dict[str, Any]:  # fmt: skip
    """Write a file for a runtime, once it is proven.

    Args:
        target: `onnx` or `openvino`.
        model, artifact: as `artifact.load` gives them.
        path: the file.
        options: how it is to be written.
        material: images.
        rounds: how often each network is timed; 0 leaves timing out.
        say: for people.

    Returns:
        The part of the result that is about the file.

    Raises:
        UsageError: the model or its tables have no such form.
        CheckFailedError: the file does not compute what it should; it is not left behind.
    """
    size = list(artifact.meta["data_cfg"]["input_size"])
    traced = trace(model, tuple(size))
    check_operators(traced)
    network = lower(traced, artifact, options)
    settle(network, material.calibration)
    twin = Twin(network)
    onnx_model = build(network, artifact, size)
    content = onnx_model.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        file = as_target(target, onnx_model, Path(folder))
        broken = layer_proof.wrong_codes(onnx_model, network)
        _refuse(path, "codes differ from those of the packed file in", broken)
        if options.grid == "int8":
            for runtime, layers in layer_proof.wrong_layers(onnx_model, network, _small_runs(target)).items():
                _refuse(path, f"{runtime} does not compute the integers of", layers, options.reach)
        whole = sum(x.integer for x in network.layers.values())
        say("  codes equal" + (f", {whole} layers equal integer by integer" if options.grid == "int8" else ""))
        trial, shares, doubts = _trial(target, file, path, material.few, len(network.layers))
        trial.hold(model, twin, material.trial)
        if failures := trial.failures(OWN[target]):
            raise CheckFailedError(f"the file does not agree with its twin in {'; '.join(failures)}", where=path,
                                   fix="nothing was written; give images of the model's own kind with --data-dir, or another "
                                       "--act")  # fmt: skip
        doubts += [f"does not agree with its twin in {words}" for words in trial.failures(trial.runs.keys() - set(OWN[target]))]
        if target == "openvino" and trial.failures([runtimes.OPENVINO_ANY]):
            file = as_target(target, onnx_model, Path(folder) / "fixed", batch=1)
            image = material.calibration[0][:1]
            if not torch.equal(runtimes.openvino(file)[0](image), trial.runs[runtimes.OPENVINO](image)):
                raise CheckFailedError("openvino computes something else with the batch fixed in the file", where=path,
                                       fix="nothing was written; use --to onnx")  # fmt: skip
            doubts.append("OpenVINO computes something else while the batch is open: the file is for batches of 1, "
                          "model.reshape() gives it another size")  # fmt: skip
        written = _place(target, file, path)
    verified: dict[str, Any] = {
        **next(iter(trial.files.values())).to_json(), "codes_equal": True, "layers_equal": options.grid == "int8",
        "runtimes": {name: c.to_json() for name, c in trial.files.items()},
        "twin_and_model": trial.twin.to_json(), "integer_layers": shares,
    }  # fmt: skip
    if trial.right is not None:
        verified["model_top1"] = 100 * trial.right / trial.twin.samples
    timed = {}
    if rounds:
        try:
            timed = _latency(target, content, traced, artifact, material, rounds)
        except Exception as reason:  # the file is good and written; each runtime has classes of its own
            doubts.append(f"latency was not measured: {first_line(reason)}")
    result = {"path": str(path), "format": target, "bytes": written, "grid": options.grid, "act": options.act,
              "range": options.reach, "float_layers": float_layers(network) if options.grid == "int8" else list(network.by_path),
              "wide_layers": wide_layers(network), "verified": verified, "latency": timed,
              "images": "real" if material.real else "noise"}  # fmt: skip
    return {**result, "warnings": doubts + _warnings(result, trained_so=artifact.meta["grid"] == options.grid)}


def wide_layers(network: Network) -> list[str]:
    """The layers whose weights are uint8, so that they stay exact without VNNI; OpenVINO computes these in float."""
    if network.options.grid != "int8":
        return []
    return [x.site.layer for x in network.layers.values() if x.integer and x.weights.offset]


def as_target(target: str, model: onnx.ModelProto, folder: Path, batch: int | None = None) -> Path:
    """The finished file in a folder of its own; `batch` is OpenVINO's alone, None leaves it open."""
    folder.mkdir(exist_ok=True)
    file = folder / f"model{EXPORTERS[target].suffix}"
    if target == "onnx":
        file.write_bytes(model.SerializeToString())
    else:
        import openvino as ov

        read = runtimes.openvino_core().read_model(model.SerializeToString())
        read.set_rt_info(model.metadata_props[0].value, METADATA)
        for name, value in runtimes.AS_WRITTEN.items():
            read.set_rt_info(str(value), ["runtime_options", name])
        if batch is not None:
            runtimes.fix_batch(read, batch)
        ov.save_model(read, str(file), compress_to_fp16=False)
    return file


def _place(target: str, file: Path, path: Path) -> int:
    """Put the file where it belongs, and say how many bytes it takes."""
    parts = [(file, path)] if target == "onnx" else [(file.with_suffix(".bin"), path.with_suffix(".bin")), (file, path)]
    for source, to in parts:
        write_atomically(to, lambda temporary, source=source: shutil.copyfile(source, temporary))
    return sum(to.stat().st_size for _, to in parts)


def _small_runs(target: str) -> dict[str, Callable[[bytes], runtimes.Run]]:
    if target == "openvino":
        return {runtimes.OPENVINO: lambda content: runtimes.openvino(content, threads=1)[0]}
    return {runtimes.OPTIMIZERS_OFF: lambda content: runtimes.onnxruntime(content, optimized=False, threads=1),
            runtimes.OPTIMIZERS_ON: lambda content: runtimes.onnxruntime(content, threads=1)}  # fmt: skip


def _refuse(path: Path, what: str, layers: list[str], reach: int = 7) -> None:
    if layers:
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        way_out = "use --range 7, which processors without VNNI need" if reach > 7 else "try --grid float"
        raise CheckFailedError(f"{what} {', '.join(layers[:3])}{more}", where=path, fix=f"nothing was written; {way_out}")


def _trial(target: str, file: Path, path: Path, few: int, layers: int) -> tuple[Trial, dict[str, float], list[str]]:
    """The ways to run a file, the target's own first; which share of its layers each computes in integers; who refuses it."""
    runs: dict[str, runtimes.Run] = {}
    shares, doubts = {}, []
    engines = [_in_onnxruntime] * (target == "onnx") + [_in_openvino] * runtimes.here("openvino")
    for engine in engines:
        try:
            found, whole = engine(file)
        except Exception as reason:  # each runtime has classes of its own
            if engine is engines[0]:
                raise CheckFailedError(
                    f"{target} does not take the file: {first_line(reason)}", where=path,
                    fix="nothing was written; try --grid float, which has ordinary operators only",
                ) from reason  # fmt: skip
            doubts.append(f"OpenVINO does not take it: {first_line(reason)}")
        else:
            runs |= found
            shares[next(iter(found))] = whole / layers
    slow = tuple(name for name in runs if name != next(iter(runs)))
    return Trial(runs, slow, few), shares, doubts


def _in_onnxruntime(file: Path) -> tuple[dict[str, runtimes.Run], int]:
    """Its ways to run a file, the usual one first, and how many layers that one computes in integers."""
    runs = {runtimes.OPTIMIZERS_ON: runtimes.onnxruntime(file),
            runtimes.OPTIMIZERS_OFF: runtimes.onnxruntime(file, optimized=False)}  # fmt: skip
    return runs, runtimes.integer_layers_of_onnxruntime(file)


def _in_openvino(file: Path) -> tuple[dict[str, runtimes.Run], int]:
    """The same of OpenVINO."""
    run, compiled = runtimes.openvino(file)
    runs = {runtimes.OPENVINO: run, runtimes.OPENVINO_ANY: runtimes.openvino(file, any_batch=True)[0]}
    return runs, runtimes.integer_layers_of_openvino(compiled)


def _latency(target: str, content: bytes, traced: Traced, artifact: Artifact, material: Material,
             rounds: int) -> dict[str, Any]:  # fmt: skip
    plain = lower(traced, artifact, Options(grid="none", outputs=False))
    files = {"float32": build(plain, artifact, list(artifact.meta["data_cfg"]["input_size"])).SerializeToString()}
    images = torch.cat(material.calibration)[:8]
    if runtimes.here("onnxruntime"):
        files["static int8"] = static_int8(files["float32"], images)
    files["this file"] = content
    found: dict[str, Any] = {"threads": 1, "batch": 1, "rounds": rounds}
    if target == "onnx":
        runs = {name: runtimes.onnxruntime(c, threads=1) for name, c in files.items()}
        found["onnxruntime"] = compare(runs, images[:1], rounds)
    if runtimes.here("openvino"):
        runs = {name: runtimes.openvino(c, threads=1)[0] for name, c in files.items()}
        runs["this file, any batch"] = runtimes.openvino(content, threads=1, any_batch=True)[0]
        found["openvino"] = compare(runs, images[:1], rounds)
    return found


def _warnings(result: dict[str, Any], *, trained_so: bool) -> list[str]:
    """What a user has to know before using the file, one sentence each.

    Args:
        result: of the export.
        trained_so: whether the run's levels lie where the file needs them.
    """
    found = []
    own = OWN[result["format"]][0]
    verified = result["verified"]
    shares = verified["integer_layers"]
    lost = verified["model_top1"] - verified["twin_and_model"]["top1"] if "model_top1" in verified else 0
    if lost > NOTABLE_LOSS:
        way_out = "" if trained_so else "; levels were moved to integers of 8 bits, where a run with --grid int8 has them"
        found.append(f"top-1 on these images is {lost:.2f} points below that of the run{way_out}")
    if result["images"] == "noise":
        found.append("the run's images were not at hand: ranges come from noise; --data-dir names the folder of the images")
    if result["grid"] == "float":
        return [*found, "computes in float: small on disk, but slower than float32 in ONNX Runtime"]
    for runtime, share in shares.items():
        if share < LEAST_SHARE:
            target = "" if runtime == own else f" (write it with --to {runtime.split(',')[0]})"
            found.append(f"only {100 * share:.0f} % of the layers compute in integers in {runtime}{target}")
    if result["float_layers"]:
        found.append(f"in float: {', '.join(result['float_layers'])}")
    if result["wide_layers"]:
        found.append(f"weights as uint8, for OpenVINO in float, to be exact without VNNI: {', '.join(result['wide_layers'])}; "
                     "--range 8 writes int8")  # fmt: skip
    return found
