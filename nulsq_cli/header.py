"""What the JSON inside a packed file must be, before anything is made of it."""

from __future__ import annotations

import math
import re
from typing import Any

from nulsq_cli.errors import NulsqError
from nulsq_cli.values import Bits

NAME = re.compile(r"[\w.-]{1,300}", re.ASCII)
"""Layers are attributes of modules, so their names are words."""
MOST_AXES, LONGEST_AXIS, MOST_COUNTED = 8, 2**31, 2**62


def check(meta: Any) -> None:
    """Check the types and ranges of all that readers use.

    Args:
        meta: parsed JSON.

    Raises:
        ValueError: something is missing, or is not what it must be; the message says what.
    """
    for key, kind in (("layers", dict), ("arch_kwargs", dict), ("data_cfg", dict), ("arch", str), ("bits", str), ("method", str),
                      ("sha256", str), ("num_classes", int)):  # fmt: skip
        if not isinstance(meta.get(key), kind):
            raise ValueError(f"{key} is missing, or not of its kind")
    if not isinstance(meta.get("recipe", ""), str):
        raise ValueError("its recipe is no text")
    if not NAME.fullmatch(meta["method"]):
        raise ValueError("its method is no name")
    try:
        Bits.parse(meta["bits"])
    except NulsqError as reason:
        raise ValueError("its bits are no widths") from reason
    for name, entry in meta["layers"].items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} is no name of a layer")
        if not isinstance(entry, dict):
            raise ValueError(f"{name}: nothing is said about it")
        if what := _layer(entry):
            raise ValueError(f"{name}: {what}")


def _layer(entry: dict[str, Any]) -> str | None:
    shape = entry.get("shape")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MOST_AXES or not all(_whole(n, 1, LONGEST_AXIS) for n in shape):
        return f"impossible shape {str(shape)[:80]}"
    for key in ("weight_bits", "act_bits"):
        bits = entry.get(key)
        if type(bits) is not int or (bits != 32 and not 2 <= bits <= 8):
            return f"impossible width {str(bits)[:80]}"
    if entry["act_bits"] < 32 and not isinstance(entry.get("signed"), bool):
        return "signed is missing, or neither true nor false"
    counts = entry.get("act_counts")
    if counts is not None and not (isinstance(counts, list) and all(_whole(n, 0, MOST_COUNTED) for n in counts)):
        return "its activation counts are no counts"
    if counts is not None and not (entry["act_bits"] < 32 and 0 < len(counts) <= 2 ** entry["act_bits"]):
        return "it has not as many activation counts as levels"
    return None


def _whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def elements(entry: dict[str, Any]) -> int:
    """How many weights a layer has, exactly, however many that is."""
    return math.prod(entry["shape"])
