"""The tables of one layer as integers: what is stored for a weight, and what for an input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nulsq_cli.artifact import Artifact
from nulsq_cli.errors import UsageError
from nulsq_cli.exporters.trace import Site
from nulsq_cli.ops import codebook, integer

PAIR = 32767
"""Processors without VNNI add two products of bytes in 16 bits, and saturate beyond this."""

COMPARED_BITS = 4
"""Up to this width a comparison for each threshold is a form that compiles and pays."""


@dataclass(frozen=True)
class Weights:
    """A weight as integers: weight = scale * sign * integers[code], per output channel.

    Args:
        codes: uint8, (O, ...), as packed.
        bits: 2..8.
        integers: (K,) or (O, K) int32.
        scale: (O,) float32, positive but for a channel whose sign cannot go into its integers.
        sign: (O,) int32: -1 where a folded BatchNorm has a negative gain, 0 where the channel is switched off.
        even: the codes are the integers but for an offset, so that no table is needed.
        offset: 128: stored as uint8 with this zero point, exact on every processor but slower; else 0, as int8.
        exact: what was trained, (K,) or (O, K) float32.
    """

    codes: Tensor
    bits: int
    integers: Tensor
    scale: Tensor
    sign: Tensor
    even: bool
    offset: int
    exact: Tensor

    def per_output(self, values: Tensor) -> Tensor:
        """(O,) values so that they multiply the weight."""
        return values.view(-1, *[1] * (self.codes.ndim - 1))

    def integer(self) -> Tensor:
        """(O, ...) int32: the integers that the layer multiplies with, zero point taken off."""
        return codebook.decode(self.codes, self.integers) * self.per_output(self.sign)

    def largest(self) -> int:
        """The largest magnitude of an integer."""
        return int(self.integers.abs().max())


@dataclass(frozen=True)
class Inputs:
    """An input as a uint8: value = scale * (stored[code] - zero), code = how many thresholds x exceeds.

    Args:
        bits: 2..8.
        levels, thresholds: (K,) and (K-1,) float32, as trained.
        stored: (K,) int32, 0..255, ascending.
        scale, zero: of the stored values.
        form: `even`: rounding alone, `where`: float thresholds, `sum8` and `table`: thresholds in cells of a fine grid.
        cell: width of those cells.
        cell_zero: the cell of 0.
        cells: (K-1,) int32: code = how many of them the input's cell exceeds.
    """

    bits: int
    levels: Tensor
    thresholds: Tensor
    stored: Tensor
    scale: float
    zero: int
    form: str
    cell: float = 0.0
    cell_zero: int = 0
    cells: Tensor | None = None

    @property
    def top(self) -> int:
        """The largest stored value."""
        return int(self.stored.max())

    def place(self, x: Tensor) -> Tensor:
        """The stored value of every entry of a float32 x, as float32, zero point taken off."""
        if self.form == "even":
            return (torch.round(x / self.scale) + self.zero).clamp(0, self.top) - self.zero
        if self.form == "where":
            codes = codebook.encode(x, self.thresholds)
        else:
            cells = (torch.round(x / self.cell) + self.cell_zero).clamp(0, 255)
            codes = codebook.encode(cells, self.cells.float())
        return (self.stored - self.zero).float()[codes.int()]


def weights(artifact: Artifact, site: Site, top: int, reach: int) -> Weights:
    """The integers of a layer's weight, its BatchNorm folded in.

    Args:
        artifact: the packed file.
        site: the layer.
        top: the largest stored value of its input.
        reach: 7: exact also where products are added in 16 bits; 8: int8 throughout.
    """
    entry, levels = artifact.meta["layers"][site.layer], artifact.tensors[f"{site.layer}.weight.levels"]
    codes, bits = artifact.codes(site.layer), entry["weight_bits"]
    outputs = codes.shape[0]
    counts = torch.stack([torch.bincount(row.flatten().int(), minlength=levels.shape[-1]) for row in
                          (codes if levels.ndim == 2 else codes[None])]).view(levels.shape)  # fmt: skip
    lowest, highest = (-128, 127) if bits == 8 else integer.SIGNED_WEIGHTS
    coherence = integer.coherence_of(codes[0].numel())
    known = f"{site.layer}.weight.levels_i8"  # trained on a grid: these very integers
    if known in artifact.tensors:
        scale, integers = artifact.tensors[f"{site.layer}.weight.scale"], artifact.tensors[known].short()
    else:
        scale, integers = integer.snap(levels, counts, lowest=lowest, highest=highest, coherence=coherence)
    safe = reach == 8 or 2 * top * int(integers.abs().max()) <= PAIR
    if not safe and 2**bits <= 2 * (most := PAIR // 2 // top) + 1 and not _on_grid(levels, scale, integers):
        scale, integers = integer.snap(levels, counts, lowest=-most, highest=most, coherence=coherence)
        safe = True
    gain = torch.ones(outputs, dtype=torch.float64) if site.gain is None else site.gain
    full = (scale.double() * gain.abs()).expand(outputs).float()
    sign = torch.sign(gain).int()
    even = integers.ndim == 1 and bits == 8 and len(integers) == 256 and bool((integers.diff() == 1).all())
    found = Weights(codes, bits, integers.int(), full, sign, even, 0 if safe else 128, levels)
    return _switched_off(_without_overflow(found))


def _on_grid(levels: Tensor, scale: Tensor, integers: Tensor) -> bool:
    return bool(torch.allclose(integer.values(integers, scale), levels, rtol=1e-5, atol=0))


def _without_overflow(w: Weights) -> Weights:
    """-128 has no opposite among bytes: such a channel keeps its integers and gets a negative scale."""
    negated = w.integer()
    beyond = (negated.view(negated.shape[0], -1) > 127).any(1)
    return replace(w, sign=torch.where(beyond, -w.sign, w.sign), scale=torch.where(beyond, -w.scale, w.scale))


def _switched_off(w: Weights) -> Weights:
    """A channel that BatchNorm multiplies by 0 gets integers 0 and any scale."""
    dead = (w.sign == 0) | (w.scale == 0)
    if not dead.any():
        return w
    some = w.scale[~dead].abs().max() if not dead.all() else torch.tensor(1.0)
    return replace(w, sign=torch.where(dead, 0, w.sign), scale=torch.where(dead, some, w.scale))


def with_room(w: Weights, bias: Tensor | None, x: Inputs) -> Weights:
    """Switch off the channels whose bias does not fit into 32 bits beside the sum of products.

    BatchNorm all but switched them off: against the bias, what an integer of their sum stands for is nothing.

    Args:
        w: the weight.
        bias: (O,), or None.
        x: the input.
    """
    if bias is None:
        return w
    room = 2**31 - 1 - w.integer().abs().flatten(1).sum(1).double() * x.top
    beyond = bias.double().abs() > room * w.scale.double().abs() * x.scale
    if not beyond.any():
        return w
    wide = (bias.double().abs() / x.scale / 2**24).float()  # then the bias alone has as many digits as a float32
    return replace(w, sign=torch.where(beyond, 0, w.sign), scale=torch.where(beyond, wide, w.scale))


def inputs(artifact: Artifact, site: Site, act: str, reach: int) -> Inputs:
    """The integers of a layer's input.

    Args:
        artifact: the packed file.
        site: the layer.
        act: the form of what is not even: `where`, `sum8` or `table`; `auto` takes `sum8` up to 3 bits, beyond `table`.
        reach: as in `weights`.

    Raises:
        UsageError: `where` or `sum8` at a width at which that form does not pay.
    """
    entry = artifact.meta["layers"][site.layer]
    levels, thresholds = (artifact.tensors[f"{site.layer}.act.{part}"] for part in ("levels", "thresholds"))
    bits, count = entry["act_bits"], len(levels)
    wide = 255 if reach == 8 or _narrow_weight(artifact, site.layer) else 127
    wide = max(wide, count - 1)
    zero = round(wide * float(-levels[0] / (levels[-1] - levels[0]))) if levels[0] < 0 else 0
    zero = min(max(zero, 0), wide - 1)
    counts = None if entry.get("act_counts") is None else torch.tensor(entry["act_counts"])
    known = f"{site.layer}.act.levels_q8"
    if known in artifact.tensors:
        scale, zero = (artifact.tensors[f"{site.layer}.act.{part}"] for part in ("scale", "zero_point"))
        zero = int(zero)
        integers = artifact.tensors[known].int() - zero
    else:
        scale, integers = integer.snap(levels, counts, lowest=-zero, highest=wide - zero)
        integers = integers.int()
    if _is_even(integers, scale, thresholds) and integers[0] <= 0:
        zero = int(-integers[0])
        return Inputs(bits, levels, thresholds, integers + zero, float(scale), zero, "even")
    form = ("sum8" if bits <= 3 else "table") if act == "auto" else act
    if form in ("where", "sum8") and bits > COMPARED_BITS:
        raise UsageError(f"--act {form} has {count - 1} comparisons at {bits} bits, more than runtimes compile", where=site.layer,
                         fix="use --act table, which takes any width")  # fmt: skip
    found = Inputs(bits, levels, thresholds, integers + zero, float(scale), zero, form)
    return found if form == "where" else replace(found, **_cells(thresholds))


def _narrow_weight(artifact: Artifact, layer: str) -> bool:
    """Whether a weight's table is even and small, so that the input may take the whole byte."""
    levels = artifact.tensors.get(f"{layer}.weight.levels")
    if levels is None:
        return True
    scale, integers = integer.snap(levels, lowest=-128, highest=127)
    return _on_grid(levels, scale, integers) and 2 * 255 * int(integers.abs().max()) <= PAIR


def _is_even(integers: Tensor, scale: Tensor, thresholds: Tensor) -> bool:
    """Rounding alone makes these codes: integers in a row, thresholds in the middle between them."""
    middles = (integers[1:] + integers[:-1]).double() / 2 * scale.double()
    return bool((integers.diff() == 1).all()) and bool(((middles - thresholds).abs() <= 1e-3 * scale).all())


def _cells(thresholds: Tensor) -> dict[str, Any]:
    """A grid of 256 cells on which rounding, then comparing, comes nearest to the thresholds."""
    t = thresholds.double()
    below = t[0] < 0
    low = min(float(t[0]), 0.0)
    span = max(float(t[-1]) - low, 1e-30)
    best: tuple[float, dict[str, Any]] | None = None
    for count in range(127, 254):
        cell = float(torch.tensor(span / (count + (1 if below else 0.5))).float())
        zero = int(-low / cell + 1) if below else 0
        cells = (t / cell - 0.5).round() + zero
        if cells[0] < 0 or cells[-1] > 254:
            continue
        error = float(((cells - zero + 0.5) * cell - t).square().sum())
        if best is None or error < best[0] * (1 - 1e-9):
            best = error, {"cell": cell, "cell_zero": zero, "cells": cells.int()}
    assert best is not None
    return best[1]


def float_inputs(artifact: Artifact, site: Site) -> Inputs:
    """The tables of a layer's input as they are, for a file that computes in float."""
    found = inputs(artifact, site, "table", 8)
    if found.form == "even":
        return found
    if found.bits > COMPARED_BITS:
        what = f"--grid float has {len(found.levels) - 1} comparisons for {found.bits} bits, more than runtimes compile"
        raise UsageError(what, where=site.layer, fix="use --grid int8 --act table")
    return replace(found, form="where")
