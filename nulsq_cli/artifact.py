"""The packed file: b-bit codes, level tables, activation tables and the untouched rest. `docs/format.md` is its promise."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from nulsq_cli import header, tensorfile
from nulsq_cli.errors import InputError, first_line
from nulsq_cli.files import write_atomically
from nulsq_cli.layers import LAYERS, QuantLayer, quant_layers
from nulsq_cli.methods.base import Quantizer, Table
from nulsq_cli.models import rebuild
from nulsq_cli.ops import bits as packing
from nulsq_cli.ops import codebook, integer
from nulsq_cli.ops.integer import ZERO_POINT
from nulsq_cli.values import Codebook, QuantSpec

VERSION = "1.1"
PARTS = ("weight.codes", "weight.levels", "weight.levels_i8", "weight.scale", "act.levels", "act.thresholds",
         "act.levels_q8", "act.scale", "act.zero_point")  # fmt: skip
"""What the file holds of a quantized layer in place of its weight."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of the file and of its parts; `ideal` counts the codes without the last byte's rounding, per layer."""

    file: int
    float_model: int
    packed_weights: int
    ideal_weights: int


@dataclass(frozen=True)
class Artifact:
    """A packed file, read and checked but not yet a model."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def codes(self, layer: str) -> Tensor:
        """The weight codes of a layer in the weight's own shape, uint8."""
        entry = self.meta["layers"][layer]
        packed = self.tensors[f"{layer}.weight.codes"].numpy()
        stream = packing.unpack(packed, entry["weight_bits"], header.elements(entry))
        return torch.from_numpy(stream).view(entry["shape"])


def save(path: Path, model: nn.Module, meta: dict[str, Any]) -> Sizes:
    """Write a converted model. The same model and notes give the same bytes.

    Args:
        path: the file.
        model: a model whose quantizers have been trained, in any mode.
        meta: what the reader needs besides the layers: arch, arch_kwargs, num_classes, data_cfg, bits,
            method, and whatever else is worth keeping; plain JSON.

    Raises:
        InputError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    ideal = 0
    quantized = quant_layers(model)
    for name, layer in quantized.items():
        entries[name] = entry = _describe(name, layer, meta.get("counts", {}).get(name))
        if layer.weight_quantizer is not None:
            tables, codes = layer.weight_codes()
            codes = codes.cpu()
            stream = packing.pack(codes.numpy(), entry["weight_bits"])
            tensors[f"{name}.weight.codes"] = torch.from_numpy(stream)
            tensors |= _tables(f"{name}.weight", tables)
            ideal += codes.numel() * entry["weight_bits"]
        if layer.input_quantizer is not None:
            tables = layer.input_quantizer.codebook(torch.zeros(1))
            tensors |= _tables(f"{name}.act", tables, layer.input_quantizer.spec)
    packed = sum(t.numel() for key, t in tensors.items() if key.endswith(".weight.codes"))
    rest, float_bytes = _rest(model, quantized)
    tensors |= rest
    note = {
        **{key: value for key, value in meta.items() if key != "counts"},
        "format": "nulsq", "format_version": VERSION, "packing": "lsb0", "tie": "strict_greater", "grid": _grid(quantized),
        "layers": entries, "float_bytes": float_bytes, "sha256": _digest(tensors),
    }  # fmt: skip
    tensors = {key: value.contiguous().clone() for key, value in sorted(tensors.items())}
    canonical = json.dumps(note, sort_keys=True, separators=(",", ":"), allow_nan=False)
    content = safetensors.torch.save(tensors, metadata={tensorfile.KEY: canonical})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return Sizes(len(content), float_bytes, packed, (ideal + 7) // 8)


def _grid(layers: dict[str, QuantLayer]) -> str:
    """`int8` where every level table lies on an integer grid."""
    sides = [q for layer in layers.values() for q in (layer.weight_quantizer, layer.input_quantizer) if q is not None]
    return "int8" if sides and all(q.spec.grid == "int8" for q in sides) else "float"


def _tables(key: str, tables: Codebook, inputs: QuantSpec | None = None) -> dict[str, Tensor]:
    """One side's tables under their names; thresholds are those of inputs alone."""
    found = {"levels": tables.levels}
    if inputs is not None:
        found["thresholds"] = tables.thresholds
    if tables.integers is not None:
        zero_point = ZERO_POINT if inputs is not None and inputs.signed else 0
        if inputs is None:
            found["levels_i8"] = tables.integers.to(torch.int8)
        else:
            found["levels_q8"] = (tables.integers + zero_point).to(torch.uint8)
            found["zero_point"] = torch.tensor(zero_point, dtype=torch.uint8)
        found["scale"] = tables.scale
    return {f"{key}.{part}": value.detach().cpu() for part, value in found.items()}


def _describe(name: str, layer: QuantLayer, counts: list[int] | None) -> dict[str, Any]:
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    return {
        "op": type(layer).__name__.removeprefix("Quant").lower(), "shape": list(layer.weight.shape),
        "weight_bits": weights.spec.bits if weights else 32, "act_bits": inputs.spec.bits if inputs else 32,
        "weight_kind": type(weights).__name__.lower() if weights else "float",
        "act_kind": type(inputs).__name__.lower() if inputs else "float",
        "axis": 0 if weights is not None and weights.spec.granularity == "channel" else None,
        "signed": bool(inputs.spec.signed) if inputs else None, "act_counts": counts,
    }  # fmt: skip


def _rest(model: nn.Module, quantized: dict[str, QuantLayer]) -> tuple[dict[str, Tensor], int]:
    """Everything that is not quantized, under its float name, and the bytes of the float model."""
    packed = {f"{name}.weight" for name, layer in quantized.items() if layer.weight_quantizer is not None}
    inner = tuple(f"{name}.{own}." for name in quantized for own in ("weight_quantizer", "input_quantizer", "weight_freezer"))
    rest, total = {}, 0
    for key, tensor in model.state_dict().items():
        if key.startswith(inner):
            continue
        total += tensor.numel() * tensor.element_size()
        if key not in packed:
            rest[key] = tensor.detach().cpu()
    return rest, total


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(key.encode() + b"\0")
        total.update(tensors[key].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read(path: Path) -> Artifact:
    """Read and check a packed file; nothing in it is ever executed.

    Raises:
        InputError: missing, truncated, damaged, no nulsq file, of a newer version, or in contradiction with itself.
    """
    path = Path(path)

    def look(meta: Any) -> None:
        version = str(meta["format_version"])
        if version.split(".")[0] != VERSION.split(".")[0]:
            raise InputError(f"has format version {version[:20]}, this nulsq reads {VERSION}", where=path,
                             fix="install a newer nulsq")  # fmt: skip
        header.check(meta)

    try:
        tensors, meta = tensorfile.read(path, look)
        artifact = Artifact(path, meta, tensors)
        if meta["sha256"] != _digest(tensors):
            raise ValueError("its content does not match its checksum")
        for name, entry in meta["layers"].items():
            _check_layer(artifact, name, entry)
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror or reason}", where=path) from reason
    except tensorfile.ForeignError as reason:
        raise InputError("is a safetensors file, but not one that nulsq wrote", where=path) from reason
    except tensorfile.DamagedError as reason:
        raise InputError(f"is truncated or damaged: {reason}", where=path) from reason
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as reason:
        what = f"{str(reason)[:100]} is missing" if isinstance(reason, KeyError) else first_line(reason)
        raise InputError(f"is damaged: {what}", where=path, fix="export the run again") from reason
    return artifact


def _check_layer(artifact: Artifact, name: str, entry: dict[str, Any]) -> None:
    shape = entry["shape"]
    if entry["weight_bits"] < 32:
        levels = artifact.tensors[f"{name}.weight.levels"]
        if levels.ndim != 1 and tuple(levels.shape[:-1]) != (shape[0],):
            raise ValueError(f"{name}: its level table does not fit its shape")
        _check_table(name, levels, entry["weight_bits"])
        if int(artifact.codes(name).max()) >= levels.shape[-1]:
            raise ValueError(f"{name}: a code has no level")
        _integers(artifact, f"{name}.weight", levels, "levels_i8", torch.int8)
    if entry["act_bits"] < 32:
        levels, thresholds = (artifact.tensors[f"{name}.act.{part}"] for part in ("levels", "thresholds"))
        _check_table(name, levels, entry["act_bits"])
        if levels.ndim != 1 or thresholds.shape != (len(levels) - 1,) or not _ascending(thresholds):
            raise ValueError(f"{name}: its activation tables do not fit each other")
        if thresholds.dtype != torch.float32 or len(entry["act_counts"] or levels) != len(levels):
            raise ValueError(f"{name}: its activation thresholds or counts do not fit its levels")
        _integers(artifact, f"{name}.act", levels, "levels_q8", torch.uint8)


def _integers(artifact: Artifact, key: str, levels: Tensor, part: str, kind: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Scale and integers of a checked table, or None where it lies on no grid; the latter without the zero point."""
    names = [f"{key}.{part}", f"{key}.scale"] + ([f"{key}.zero_point"] if kind == torch.uint8 else [])
    if artifact.meta["grid"] != "int8" and not any(name in artifact.tensors for name in names):
        return None
    stored, scale, *rest = (artifact.tensors[name] for name in names)
    zero_point = rest[0] if rest else torch.zeros((), dtype=torch.int8)
    if stored.dtype != kind or stored.shape != levels.shape or scale.dtype != torch.float32 or scale.shape != levels.shape[:-1]:
        raise ValueError(f"{key}: its integers and their scale do not fit its levels")
    if zero_point.dtype != kind or zero_point.shape != () or not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{key}: its scale is not positive, or its zero point is none")
    integers = stored.short() - zero_point.short()
    if not torch.equal(integer.values(integers, scale), levels):
        raise ValueError(f"{key}: its levels are not its scale times its integers")
    return scale, integers


def _check_table(name: str, levels: Tensor, bits: int) -> None:
    if levels.dtype != torch.float32 or not 2 <= levels.shape[-1] <= 2**bits or not _ascending(levels):
        raise ValueError(f"{name}: its level table is not a sorted table of finite numbers")


def _ascending(values: Tensor) -> bool:
    return bool(values.isfinite().all()) and bool((values.diff(dim=-1) >= 0).all())


def load(path: Path) -> tuple[nn.Module, Artifact]:
    """A packed file as a model in evaluation mode, which computes what the run computed.

    Raises:
        InputError: as `read`, or the file does not fit the architecture that it names.
    """
    artifact = read(path)
    meta = artifact.meta
    try:
        coded = {f"{n}.weight.codes": header.elements(e) for n, e in meta["layers"].items() if e["weight_bits"] < 32}
        elements = sum(coded.get(key, tensor.numel()) for key, tensor in artifact.tensors.items())
        model = rebuild(meta["arch"], {**meta["arch_kwargs"], "num_classes": meta["num_classes"]}, elements=elements,
                        tensors=len(artifact.tensors), where=path)  # fmt: skip
        modules = dict(model.named_modules())
        for name, entry in meta["layers"].items():
            layer = modules[name]
            if list(layer.weight.shape) != entry["shape"]:
                raise ValueError(f"{name}: the architecture has shape {list(layer.weight.shape)}")
            quantized = LAYERS[type(layer)](layer, None, _table(artifact, name, entry))
            if entry["weight_bits"] < 32:
                weight = codebook.decode(artifact.codes(name), artifact.tensors[f"{name}.weight.levels"])
                quantized.weight = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, quantized)
        _fill(model, artifact)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as reason:
        raise InputError(f"does not fit its architecture: {first_line(reason)}", where=path) from reason
    return model.eval(), artifact


def _table(artifact: Artifact, name: str, entry: dict[str, Any]) -> Quantizer | None:
    if entry["act_bits"] == 32:
        return None
    levels, thresholds = (artifact.tensors[f"{name}.act.{part}"] for part in ("levels", "thresholds"))
    on_grid = _integers(artifact, f"{name}.act", levels, "levels_q8", torch.uint8)
    spec = QuantSpec(entry["act_bits"], bool(entry["signed"]), grid="int8" if on_grid else "float")
    return Table(spec, Codebook(levels, thresholds, *(on_grid or ())))


def _fill(model: nn.Module, artifact: Artifact) -> None:
    own = {f"{n}.{part}" for n in artifact.meta["layers"] for part in PARTS}
    rest = {key: tensor for key, tensor in artifact.tensors.items() if key not in own}
    result = model.load_state_dict(rest, strict=False)
    derived = {f"{n}.weight" for n, entry in artifact.meta["layers"].items() if entry["weight_bits"] < 32}
    missing = [k for k in result.missing_keys if k not in derived and ".input_quantizer." not in k]
    if missing or result.unexpected_keys:
        raise ValueError(f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}")
