"""Reading a safetensors file that holds tensors and one note in JSON, whoever wrote it, at a cost bounded by its size."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError
from torch import Tensor

KEY = "nulsq"
LARGEST_HEADER = 16 << 20
MOST_TENSORS = 20_000
MOST_VALUES = 200_000
"""In the note: a short text may mean many objects, `{}` is thirty times as large in memory."""
MOST_AXES, LONGEST_AXIS = 16, 2**31
DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})


class DamagedError(Exception):
    """The file is not what it says; the message is the reason."""


class ForeignError(Exception):
    """A safetensors file without our note."""


def read(path: Path, look: Callable[[Any], object] | None = None) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, and its note.

    Args:
        path: the file.
        look: given the note before any tensor is read; may raise what it likes.

    Raises:
        OSError: it cannot be opened.
        ForeignError: it has no such note.
        DamagedError: everything else that is wrong with it.
    """
    with path.open("rb") as file:
        start = file.read(8)
    if len(start) < 8 or int.from_bytes(start, "little") > min(LARGEST_HEADER, path.stat().st_size - 8):
        raise DamagedError("it is truncated, or no safetensors file")
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(KEY)
            if text is None:
                raise ForeignError
            note = parse(text)
            if look is not None:
                look(note)
            names = list(file.keys())
            if len(names) > MOST_TENSORS:
                raise DamagedError(f"it holds {len(names)} tensors")
            for name in names:
                part = file.get_slice(name)
                shape = part.get_shape()
                if part.get_dtype() not in DTYPES or len(shape) > MOST_AXES or any(n >= LONGEST_AXIS for n in shape):
                    raise DamagedError(f"{name[:80]!r} is a tensor of a kind or shape that is not used here")
            return {name: file.get_tensor(name) for name in names}, note
    except (SafetensorError, RuntimeError, ValueError, TypeError) as reason:
        raise DamagedError(str(reason).splitlines()[0][:200] if str(reason) else "it cannot be parsed") from reason


def parse(text: str) -> Any:
    """JSON within limits.

    Raises:
        DamagedError: it is none, or too much of it.
    """
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise DamagedError("its note is too long")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as reason:
        raise DamagedError(f"its note is no JSON ({str(reason)[:80]})") from reason
