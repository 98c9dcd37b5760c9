"""What no single key of a recipe can know: whether its sections fit together. Each complaint is `key: what`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulsq_cli.errors import suggest
from nulsq_cli.methods import METHODS
from nulsq_cli.schemes import SCHEMES
from nulsq_cli.values import FLOAT_BITS

if TYPE_CHECKING:
    from nulsq_cli.recipe.schema import Recipe


def across(r: Recipe) -> list[str]:
    """Every complaint about several sections at once."""
    return [*_numbers(r), *_methods(r), *_stabilizers(r), *_scheme(r)]


def _numbers(r: Recipe) -> list[str]:
    wrong = []
    size, rate = r.data.input_size, r.optimizer.weights.lr
    for name, values in (("mean", r.data.mean), ("std", r.data.std)):
        if values is not None and size is not None and len(values) not in (1, size[0]):
            wrong.append(f"data.{name}: has {len(values)} values for images of {size[0]} channels")
    if r.schedule.min_lr > rate:
        wrong.append(f"schedule.min_lr: must not exceed optimizer.weights.lr, {rate:g}, got {r.schedule.min_lr:g}")
    return wrong


def _methods(r: Recipe) -> list[str]:
    """What is asked of a method that it cannot do, layer rules included."""
    q = r.quant
    signed = q.signed if isinstance(q.signed, bool) else None
    asked = [("quant.method", q.method, q.bits, q.granularity, signed)]
    asked += [("quant.first_last.method", q.first_last.method, q.first_last.bits, q.granularity, signed)]
    asked += [
        (f"quant.rules.{i}", x.method or q.method, x.bits or q.bits, x.granularity or q.granularity,
         signed if x.signed is None else x.signed) for i, x in enumerate(q.rules) if not x.skip
    ]  # fmt: skip
    wrong = []
    for key, method, *wanted in asked:
        if what := METHODS[method].complaint(*wanted, q.grid):
            wrong.append(f"{key}: {method} {what}")
    told = {f"quant.rules.{i}" for i, x in enumerate(q.rules) if x.signed is not None}
    for key, method, bits, *_ in asked:
        if q.signed is False and key not in told and METHODS[method].two_forms and bits.activations != FLOAT_BITS:
            wrong.append(f"{key}: {method} has one form for signed inputs and another for unsigned ones, and quant.signed: false"
                         " leaves it no rule to tell them apart (leave auto, or declare layers in quant.rules)")  # fmt: skip
    known = METHODS[q.method].options
    for name in q.options:
        if name not in known:
            near = suggest(name, known) if known else "it takes none"
            wrong.append(f"quant.options.{name}: no option of {q.method} ({near})")
    return wrong


def _stabilizers(r: Recipe) -> list[str]:
    """Those that are named twice, or find no weight to act on."""
    q = r.quant
    narrowest = min(b.weights for b in (q.bits, q.first_last.bits, *(x.bits for x in q.rules if x.bits)))
    wrong = []
    for i, s in enumerate(q.stabilizers):
        key = f"quant.stabilizers.{i}"
        if s.name in (before.name for before in q.stabilizers[:i]):
            wrong.append(f"{key}: {s.name} is there already")
        if str(q.bits) == "32/32" or narrowest > s.widest:
            wrong.append(f"{key}: {s.name} is for weights of at most {s.widest} bits, and none are quantized to that")
    return wrong


def _scheme(r: Recipe) -> list[str]:
    """A scheme without the teacher that it needs, or with options that it does not take."""
    name = r.scheme_name
    if SCHEMES[name].needs_teacher and r.teacher.name is None:
        return [f"scheme.name: {name} needs a teacher (set teacher.name, `self` is the float model itself)"]
    if name == "plain" and r.teacher.name is not None:
        return ["scheme.name: plain has no teacher, but teacher.name is set (leave scheme out, or choose kd)"]
    try:
        r.phases()
    except (ValueError, TypeError, ArithmeticError, AttributeError) as reason:
        return [f"scheme.options: {reason}"]
    return []
