"""Writes docs/methods.md from the code: `python tools/methods_page.py > docs/methods.md`."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module

from nulsq_cli.methods import METHODS, quantizer_class
from nulsq_cli.methods.notes import EQUATIONS, NOTES
from nulsq_cli.schemes import SCHEMES
from nulsq_cli.stabilizers import STABILIZERS

HEAD = """# Methods

Made by `tools/methods_page.py` from the code. Any of them: `--method NAME`, or `quant.method` in a recipe, or per layer
in `quant.rules`; options go under `quant.options`. All leave as the same packed file: levels and thresholds in float32,
codes of b bits; what a formula does before or after rounding is folded into the tables. g is the gradient of the loss to
y; b the bits; N, in `grad_scale`, the weights that share a table, or the features of one sample; "unsigned" inputs are
those without negatives, as after ReLU. How to add one: [add-a-method.md](add-a-method.md).

Gradients are those of training mode. In evaluation mode tables are looked up, quantizers learn nothing, and what flows back
to x passes unchanged between the outermost levels and not beyond.

With `--grid int8` (`quant.grid`) every level is a scale times an integer of 8 bits, in training as in evaluation: what
runtimes for int8 compute exactly. The scale keeps the proportion to the largest level that left the least error when the
steps started; levels go to the nearest integer, gradients to them straight through; thresholds are the midpoints where the
method rounds to the nearest level, else its own. Tables that keep their ratios lie on such a grid as they are. 256 levels
that are learned one by one, or have no zero, do not fit; a recipe that asks for that is refused.

| method | idea |
|---|---|
"""

STEADY = """## Stabilizers

With any method: `--stabilizer NAME`, or `quant.stabilizers`. λ or the threshold goes from `first` to `last` by a cosine, from
the share `begin` of training on; weights of more than `widest` bits are left alone. The poster's LSQ+BR and LSQ+Dp/Fz are lsq
with these.
"""

SCHOOL = """## Schemes

Who teaches, in which phases: `scheme.name`, options under `scheme.options`; the teacher is `--kd-model-name` (`self`: the float
model), its weights and temperature stand under `teacher`. With any method, but for two limits: `profit`, which quantizes
activations first, refuses ewgs, which keeps the scale of its activations in the weights' quantizer; and its `ladder` may hold no
widths that a method lacks (apot: weights up to 7 bits, activations up to 6).
"""


def text(docstring: str) -> tuple[str, list[str]]:
    """A class docstring as (its prose, its options as list items)."""
    body, _, arguments = inspect.cleandoc(docstring).partition("\nArgs:\n")
    items = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", arguments.split("\n\n")[0] + "\n", flags=re.S | re.M)
    options = [f"- `{name}`: {' '.join(words.split())}" for name, words in items if name != "spec"]
    return " ".join(body.replace("\n\n", "\n").split()), options


def section(name: str) -> str:
    """One method."""
    line, note = METHODS[name], NOTES.get(name)
    classes = {side: quantizer_class(getattr(line, side)) for side in ("weights", "activations")}
    lines = [f"## {name}", "", f"{line.idea[0].upper()}{line.idea[1:]}.", ""]
    options: list[str] = []
    two = len(set(classes.values())) == 2
    for side, kind in classes.items():
        if side == "activations" and kind is classes["weights"]:
            continue
        prose, own = text(kind.__doc__ or "")
        source = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
        who = f"**{side.capitalize()}**: " if two else ""
        lines += [f"{who}{prose} *{source}*", ""]
        defaults = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.default is not p.empty}
        of = f", for {side}" if two else ""
        for item in own:
            if (option := item.split("`")[1]) in defaults:
                options.append(item.replace("`: ", f"`{of}: ", 1) + f" Default: `{defaults[option]}`.")
    if note is not None:
        lines += [f"- {what}: {getattr(note, what)}" for what in ("formula", "gradient", "learned", "start")]
        lines.append(f"- checked against: {note.checked}")
    lines += options
    limits = [f"weights of at most {line.largest_weights} bits"] * (line.largest_weights < 8)
    limits += [f"activations of at most {line.largest_activations} bits"] * (line.largest_activations < 8)
    limits += ["one weight table per tensor only"] * (not line.per_channel) + ["no signed inputs"] * (not line.signed)
    if limits:
        lines.append(f"- limits: {', '.join(limits)}")
    return "\n".join(lines) + "\n"


def steadier(name: str) -> str:
    """One stabilizer."""
    line = STABILIZERS[name]
    module, kind = line.place.split(":")
    kind = getattr(import_module(f"nulsq_cli.stabilizers.{module}"), kind)
    source = inspect.cleandoc(sys.modules[kind.__module__].__doc__ or "").splitlines()[0]
    options = ", ".join(f"`{key}` {value}" for key, value in line.options.items())
    return (f"### {name}\n\n{line.idea[0].upper()}{line.idea[1:]}. {text(kind.__doc__)[0]} *{source}*\n\n"
            f"- equation: {EQUATIONS[name]}\n- options: {options}\n")  # fmt: skip


def scheme(name: str) -> str:
    """One scheme."""
    line = SCHEMES[name]
    source = inspect.cleandoc(sys.modules[line.phases.__module__].__doc__ or "").splitlines()[0]
    prose = text(line.phases.__doc__.partition("Raises:")[0])[0]
    defaults = [f"`{p.name}` {p.default}" for p in inspect.signature(line.phases).parameters.values() if p.default is not p.empty]
    options = f"- options: {', '.join(defaults)}\n" if defaults else ""
    return f"### {name}\n\n{line.idea[0].upper()}{line.idea[1:]}. {prose} *{source}*\n\n- equation: {EQUATIONS[name]}\n{options}"


def page() -> str:
    """The whole page."""
    table = "".join(f"| [{name}](#{name}) | {line.idea} |\n" for name, line in METHODS.items())
    parts = [section(name) for name in METHODS]
    parts += [STEADY, *map(steadier, STABILIZERS), SCHOOL, *(scheme(name) for name in SCHEMES if name != "plain")]
    return HEAD + table + "\n" + "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
