"""All that a run needs to go on exactly where it stopped, in one safetensors file. No pickle.

A run keeps `last` (the end of an epoch), `previous` (the `last` before it), `best`, and inside an epoch `recovery`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.optim import Optimizer

from nulsq_cli import tensorfile
from nulsq_cli.errors import InputError
from nulsq_cli.files import write_atomically

NEWEST_FIRST = ("recovery", "last", "previous")

Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and whose checksum holds."""

    path: Path
    tensors: Groups
    notes: dict[str, Any]


def save(path: Path, tensors: Groups, notes: dict[str, Any]) -> None:
    """Write groups of tensors and JSON notes as one file, atomically, with a checksum over all of it.

    A `last` that is there already becomes `previous`.

    Args:
        path: the file; the folder above its own must be there.
        tensors: group -> name -> tensor; `model`, `ema`, `optimizer.weights`, ...
        notes: plain JSON: position, scores, optimizer groups.

    Raises:
        InputError: it cannot be written; older checkpoints are untouched.
    """
    flat = {
        f"{group}/{name}": t.detach().cpu().contiguous().clone()
        for group, members in tensors.items() for name, t in members.items()
    }  # fmt: skip
    notes = json.loads(json.dumps(notes))  # what a reader will see: the checksum is over that
    head = json.dumps({"notes": notes, "sha256": _digest(flat, notes)})
    content = safetensors.torch.save(flat, metadata={tensorfile.KEY: head})  # one key: the order of several is arbitrary
    keep = path.with_stem("previous") if path.stem == "last" else None
    write_atomically(path, lambda temporary: temporary.write_bytes(content), keep=keep, parents=False)


def load(path: Path) -> tuple[Groups, dict[str, Any]]:
    """The inverse of `save`.

    Raises:
        InputError: missing, truncated, damaged, or not written by `save`.
    """
    try:
        flat, head = tensorfile.read(path)
        notes, expected = head["notes"], head["sha256"]
        tensors: Groups = {}
        for key, tensor in flat.items():
            group, name = key.split("/", 1)
            tensors.setdefault(group, {})[name] = tensor
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror or reason}", where=path) from reason
    except (tensorfile.DamagedError, tensorfile.ForeignError, KeyError, TypeError, ValueError) as reason:
        raise InputError("is truncated or damaged", where=path, fix=_FIX) from reason
    if not isinstance(notes, dict) or _digest(flat, notes) != expected:
        raise InputError("is truncated or damaged (its checksum does not match)", where=path, fix=_FIX)
    return tensors, notes


_FIX = "--resume auto uses an older checkpoint of the run, where there is one"


def latest(folder: Path, say: Callable[[str], object], names: Sequence[str] = NEWEST_FIRST) -> Saved | None:
    """The newest checkpoint that is whole; None where there is none at all.

    Args:
        folder: where the checkpoints are.
        say: told about each one that is damaged.
        names: which to try, the newest first. A `recovery` is younger than `last`: an epoch's end removes it.

    Raises:
        InputError: there are checkpoints, but all of them are damaged.
    """
    damaged = []
    for path in (folder / f"{name}.safetensors" for name in names):
        if not path.exists():
            continue
        try:
            return Saved(path, *load(path))
        except InputError as reason:
            say(f"  {reason.where}: {reason.what}; trying an older checkpoint")
            damaged.append(path.name)
    if damaged:
        raise InputError(f"no checkpoint is whole: {', '.join(damaged)}", where=folder, fix="start a new run with -o")
    return None


def _digest(flat: dict[str, Tensor], notes: dict[str, Any]) -> str:
    """SHA-256 over the notes and each tensor's name, dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(notes).encode())
    for name in sorted(flat):
        tensor = flat[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def optimizer_state(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer as tensors and JSON; the inverse is `restore_optimizer`."""
    state = optimizer.state_dict()
    tensors, rest = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                rest[f"{index}.{key}"] = value
    return tensors, {"groups": state["param_groups"], "rest": rest}


def restore_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Put saved state into an optimizer of the same parameters.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is the state of another one.
    """
    own = optimizer.state_dict()["param_groups"]
    for mine, theirs in zip(own, notes["groups"], strict=True):
        if any(type(theirs[key]) is not type(value) and not _number(theirs[key], value) for key, value in mine.items()
               if not isinstance(value, tuple)):  # fmt: skip
            raise ValueError("a group of the optimizer has other options")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, tensor in tensors.items():
        shape = parameters[int(key.partition(".")[0])].shape
        if tensor.ndim > len(shape) or (tensor.ndim == len(shape) and tensor.shape != shape):
            raise ValueError(f"the optimizer's {key} has another shape than its parameter")
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *notes["rest"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in g.items()} for g in notes["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _number(one: Any, other: Any) -> bool:
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in (one, other))
