"""What no single key of a recipe can know: whether its sections fit together. Each complaint is `key: what`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nulsq_cli.errors import suggest
from nulsq_cli.methods import METHODS
from nulsq_cli.schemes import SCHEMES
from nulsq_cli.values import FLOAT_BITS, Bits

if TYPE_CHECKING:
    from nulsq_cli.recipe.schema import Recipe
    from nulsq_cli.values import Phase


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
    q, asked, wrong = r.quant, _asked(r, r.quant.bits), []
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


def _asked(r: Recipe, bits: Bits) -> list[tuple[str, str, Bits, str, bool | None]]:
    """(key, method, widths, granularity, sign) of all that is asked for while the model has these widths."""
    q = r.quant
    signed = q.signed if isinstance(q.signed, bool) else None
    asked = [("quant.method", q.method, bits, q.granularity, signed)]
    asked += [("quant.first_last.method", q.first_last.method, q.first_last.bits, q.granularity, signed)]
    return asked + [
        (f"quant.rules.{i}", x.method or q.method, x.bits or bits, x.granularity or q.granularity,
         signed if x.signed is None else x.signed) for i, x in enumerate(q.rules) if not x.skip
    ]  # fmt: skip


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
        phases = r.phases()
    except (ValueError, TypeError, ArithmeticError, AttributeError) as reason:
        return [f"scheme.options: {reason}"]
    return _on_the_way(r, [phase for phase in phases if phase.bits != r.quant.bits])


def _on_the_way(r: Recipe, phases: list[Phase]) -> list[str]:
    """What phases at other widths than the last ones ask of a method that it cannot do; once for each method."""
    q, wrong = r.quant, {}
    say = lambda method, *wanted: METHODS[method].complaint(*wanted, q.grid)  # noqa: E731
    for phase in phases:
        # Either a width of the ladder is at fault, or that one side is quantized before the other.
        sides = Bits(*(FLOAT_BITS if now == FLOAT_BITS else last for now, last in
                       ((phase.bits.weights, q.bits.weights), (phase.bits.activations, q.bits.activations))))  # fmt: skip
        for (_, *now), (_, *alike), (_, *last) in zip(*(_asked(r, bits) for bits in (phase.bits, sides, q.bits)), strict=True):
            if (what := say(*now)) and not say(*last):
                key = "scheme.name" if say(*alike) else "scheme.options.ladder"
                wrong.setdefault(now[0], f"{key}: {now[0]} {what} in the phase {phase.name!r} of {r.scheme_name}")
    return list(wrong.values())
