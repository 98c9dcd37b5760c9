"""All that a run needs to go on exactly where it stopped, in one safetensors file. No pickle."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from nulsq_cli.errors import InputError
from nulsq_cli.files import write_atomically

KEY = "nulsq"


def save(path: Path, tensors: dict[str, dict[str, Tensor]], notes: dict[str, Any]) -> None:
    """Write groups of tensors and JSON notes as one file, atomically.

    Args:
        path: the file.
        tensors: group -> name -> tensor; `model`, `ema`, `optimizer.weights`, `rng`, ...
        notes: plain JSON: position, scores, optimizer groups.
    """
    flat = {
        f"{group}/{name}": t.detach().cpu().contiguous().clone()
        for group, members in tensors.items() for name, t in members.items()
    }  # fmt: skip
    content = safetensors.torch.save(flat, metadata={KEY: json.dumps(notes, sort_keys=True)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The inverse of `save`.

    Raises:
        InputError: missing, truncated, damaged, or not written by `save`.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            notes = json.loads((file.metadata() or {})[KEY])
            tensors: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 not a dict
                group, name = key.split("/", 1)
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror or reason}", where=path) from reason
    except (SafetensorError, KeyError, ValueError) as reason:
        raise InputError("is truncated or damaged", where=path, fix="delete it to use an older checkpoint") from reason
    return tensors, notes


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
    """Put saved state into an optimizer of the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *notes["rest"].items()]:
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    groups = [{k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in g.items()} for g in notes["groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of torch's, numpy's and Python's global generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors, {"numpy": [kind, position, has_gauss, cached], "python": [version, list(internal), gauss]}


def restore_random(tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    kind, position, has_gauss, cached = notes["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = notes["python"]
    random.setstate((version, tuple(internal), gauss))
