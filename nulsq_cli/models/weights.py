"""Float checkpoints: read without ever running code, and put into a model without dropping anything."""

from __future__ import annotations

import argparse
import logging
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nulsq_cli.errors import InputError, first_line

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict", "model", "model_state_dict", "net")
"""Keys under which training scripts keep the weights, in order of preference."""
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
"""Keys of averaged weights, used only if there are no others."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every name."""
SHOWN = 10
"""How many names an error lists before it says how many more there are."""

_CODE = re.compile(
    r"GLOBAL|allowlist|function|class|must be imported|Can only|operand (105|111|146|147)\b"
)  # the last four are the pickle instructions INST, OBJ, NEWOBJ_EX and STACK_GLOBAL
_FORMATS = "expected .safetensors, or a .pth/.pt/.th/.tar/.bin written by torch.save"


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint, by plain module path, and what was done to get at them."""

    path: Path
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def read_weights(path: str | Path) -> Weights:
    """Read a float checkpoint; what it is is decided by its content, not by its name.

    Args:
        path: a safetensors file, or a file written by `torch.save` (zip or older form).

    Returns:
        Plain tensors on the CPU; wrappers and prefixes removed, each with a note.

    Raises:
        InputError: missing, empty, truncated, of another kind, with code or with values that are not numbers.
    """
    path = Path(path)
    content = _read(path)
    notes: list[str] = []
    tensors = _unwrap(path, content, notes)
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in tensors)), None):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        notes.append(f"the prefix {prefix!r} was removed from its names")
    log.info("%s: %s", path, "; ".join(notes) or "plain weights")
    for name, tensor in tensors.items():
        _check_numbers(path, name, tensor)
    return Weights(path, tensors, notes)


def fit(model: nn.Module, weights: Weights, *, model_name: str) -> None:
    """Load every tensor into the model; all names and shapes must agree.

    Raises:
        InputError: tensors are missing, left over, or of another shape or kind; they are listed.
    """
    wanted, given = model.state_dict(), dict(weights.tensors)
    for name, value in wanted.items():
        if name not in given and name.endswith("num_batches_tracked"):
            given[name] = value  # BatchNorm did not count its batches before torch 0.4.1
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    shared = [name for name in wanted if name in given]
    misshapen = [
        f"{name} is {_shape(given[name])}, the model has {_shape(wanted[name])}"
        for name in shared
        if given[name].shape != wanted[name].shape
    ]
    complaints = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(complaints.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in complaints.items() if names)
        lines = [f"  {kind}: {listed(names)}" for kind, names in complaints.items() if names]
        raise InputError(
            "\n".join([f"the checkpoint does not fit {model_name}: {counts}", *lines]),
            where=weights.path,
            fix="give the architecture of the file (--model), or another --initial-checkpoint",
        )
    for name in shared:
        if wanted[name].is_floating_point() and not given[name].is_floating_point():
            raise InputError(
                f"{name} holds {_dtype(given[name])} where the model has float numbers",
                where=weights.path,
                fix="give the float checkpoint, before quantization",
            )
    model.load_state_dict(given)


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _read(path: Path) -> Any:
    """What the file holds: a flat dict of tensors, or whatever torch.save was given."""
    if path.is_dir():
        raise InputError("this is a folder, not a checkpoint file", where=path, fix=_FORMATS)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise InputError("no such checkpoint", where=path, fix="check the path") from None
    except OSError as error:
        raise InputError(f"cannot read the checkpoint: {error.strerror}", where=path) from None
    if not head:
        raise InputError("the checkpoint is empty (0 bytes)", where=path, fix="copy or download it again")
    if head.startswith(b"version https://git-lfs"):
        raise InputError("this is a Git LFS pointer, not the file", where=path, fix="run: git lfs pull")
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return _read_torch(path)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise InputError("this is not a checkpoint", where=path, fix=_FORMATS)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the safetensors file is truncated or damaged ({first_line(error)})",
            where=path,
            fix="copy or download it again",
        ) from None


def _read_torch(path: Path) -> Any:
    """torch.load with weights_only=True, and nothing else when that refuses."""
    try:
        # timm's own training checkpoints keep their arguments in a Namespace: a plain bag of values
        # a file object, not its path: torch would decide by the suffix what to expect
        with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if not _CODE.search(text):
            raise _damaged(path, error) from None
        named = re.search(r"GLOBAL (\S+)", text)
        inside = f" ({named[1]})" if named else ""
        raise InputError(
            f"the checkpoint contains code{inside}; it was refused and nothing in it was run",
            where=path,
            fix="if you trust its source, load it in a script of your own and save only its state_dict",
        ) from None
    except Exception as error:  # a damaged pickle fails anywhere inside the reader, with any exception
        raise _damaged(path, error) from None


def _damaged(path: Path, error: BaseException) -> InputError:
    return InputError(
        f"not a checkpoint, or truncated or damaged ({first_line(error)})",
        where=path,
        fix=f"copy or download it again; {_FORMATS}",
    )


def _unwrap(path: Path, content: Any, notes: list[str]) -> dict[str, Tensor]:
    """The mapping of names to tensors inside what a training script saved."""
    if not isinstance(content, dict):
        raise InputError(
            f"not a checkpoint: it holds a {type(content).__name__}, not named tensors",
            where=path,
            fix=_FORMATS,
        )
    ema = next((key for key in EMA_WRAPPERS if isinstance(content.get(key), dict)), None)
    plain = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), None)
    if plain or ema:
        chosen = plain or ema
        notes.append(f"the weights were taken from {chosen!r}")
        if plain and ema:
            notes.append(f"the averaged weights in {ema!r} were not used")
        content = content[chosen]
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    others = [str(key) for key in content if str(key) not in tensors]
    if not tensors:
        keys = listed(map(str, content)) or "nothing"
        raise InputError(f"no tensors in this file; it holds {keys}", where=path, fix=_FORMATS)
    if others:
        raise InputError(
            f"entries that are not tensors stand among the weights: {listed(others)}",
            where=path,
            fix="save only model.state_dict()",
        )
    return tensors


def _check_numbers(path: Path, name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
        raise InputError(
            f"{name} is a {_dtype(tensor)} tensor of a kind that float models do not have",
            where=path,
            fix="give the float checkpoint, before quantization",
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise InputError(
            f"{name} holds values that are not finite numbers (NaN or infinite)",
            where=path,
            fix="the training that wrote it diverged, or the file is damaged: use an earlier checkpoint",
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"
