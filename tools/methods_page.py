"""Writes docs/methods.md from the code: `python tools/methods_page.py > docs/methods.md`."""

from __future__ import annotations

import inspect
import re
import sys

from nulsq_cli.methods import METHODS, quantizer_class
from nulsq_cli.methods.notes import NOTES

HEAD = """# Methods

Made by `tools/methods_page.py` from the code. Any of them: `--method NAME`, or `quant.method` in a recipe, or per layer
in `quant.rules`; options go under `quant.options`. All leave as the same packed file: levels and thresholds in float32,
codes of b bits; what a formula does before or after rounding is folded into the tables. g is the gradient of the loss to
y; b the bits; N, in `grad_scale`, the entries of the tensor; "unsigned" inputs are those without negatives, as after ReLU.
How to add one: [add-a-method.md](add-a-method.md).

With `--grid int8` (`quant.grid`) every level is a scale times an integer of 8 bits, in training as in evaluation: what
runtimes for int8 compute exactly. The scale keeps the proportion to the largest level that left the least error when the
steps started; levels go to the nearest integer, gradients to them straight through; thresholds are the midpoints where the
method rounds to the nearest level, else its own. Tables that keep their ratios lie on such a grid as they are. 256 levels
that are learned one by one, or have no zero, do not fit; a recipe that asks for that is refused.

| method | idea |
|---|---|
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


def page() -> str:
    """The whole page."""
    table = "".join(f"| [{name}](#{name}) | {line.idea} |\n" for name, line in METHODS.items())
    return HEAD + table + "\n" + "\n".join(section(name) for name in METHODS)


if __name__ == "__main__":
    sys.stdout.write(page())
