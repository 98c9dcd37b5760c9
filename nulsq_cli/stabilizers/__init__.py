"""The table of stabilizers: what steadies training but is no quantizer. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nulsq_cli.errors import pick

if TYPE_CHECKING:
    from torch import nn

    from nulsq_cli.stabilizers.base import Stabilizer


@dataclass(frozen=True)
class Line:
    """One stabilizer.

    Args:
        place: `module:Class`.
        idea: one line for `nulsq ls stabilizers`.
        options: the constructor's keyword arguments and what they are when nobody says otherwise. All have
            `begin`, the share of training before which nothing happens; `first` and `last`, between which the
            scheduled number then moves; and `widest`, in bits: wider weights are left alone.
    """

    place: str
    idea: str
    options: Mapping[str, Any]


# `dampening` and `freezing` as their authors run them. Of `bin-reg` only the late start is known, and that from
# others; its strength is our choice.
STABILIZERS: dict[str, Line] = {
    "bin-reg": Line(
        "bin_reg:BinReg", "pulls the weights of every bin onto its level, all bins alike",
        {"begin": 0.25, "first": 1.0, "last": 1.0, "widest": 8},
    ),
    "dampening": Line(
        "dampening:Dampening", "pulls every weight towards its level, more and more",
        {"begin": 0.25, "first": 0.0, "last": 0.1, "widest": 8, "aggregate": "kernel_mean"},
    ),
    "freezing": Line(
        "freezing:Freezing", "fixes the codes of weights that keep jumping between levels",
        {"begin": 0.25, "first": 0.1, "last": 0.01, "widest": 4, "momentum": 0.001},
    ),
}  # fmt: skip


def make_stabilizers(layers: Mapping[str, nn.Module], wanted: Iterable[Mapping[str, Any]]) -> list[Stabilizer]:
    """Build stabilizers for the quantized layers of a model; `freezing` puts its state into them.

    Args:
        layers: quantized layers by module path, their quantizers started.
        wanted: a `name` each, and options of it.

    Raises:
        UsageError: no such stabilizer or option, or no layer for it.
    """
    made = []
    for options in wanted:
        given = dict(options)
        name = given.pop("name")
        line = pick(STABILIZERS, name, "stabilizer")
        for option in given:
            pick(line.options, option, f"option of {name}")
        module, kind = line.place.split(":")
        made.append(getattr(import_module(f"nulsq_cli.stabilizers.{module}"), kind)(layers, **{**line.options, **given}))
    return made
