"""Who teaches whom, in which phases. One name, one line. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nulsq_cli.schemes import kd, plain, profit, qkd
from nulsq_cli.values import Bits, Phase


@dataclass(frozen=True)
class Scheme:
    """A way to train.

    Args:
        phases: (bits, epochs, **options) -> the phases, in order.
        idea: one line for `nulsq ls schemes`.
        needs_teacher: whether it is nothing without one.
    """

    phases: Callable[..., list[Phase]]
    idea: str
    needs_teacher: bool


SCHEMES: dict[str, Scheme] = {
    "plain": Scheme(plain.phases, "labels alone", needs_teacher=False),
    "kd": Scheme(kd.phases, "labels and a frozen teacher", needs_teacher=True),
    "qkd": Scheme(qkd.phases, "self-study, co-study with a teacher that learns too, tutoring by it", needs_teacher=True),
    "profit": Scheme(profit.phases, "bits step by step, then the most unstable layers frozen third by third", needs_teacher=True),
}


def phases(name: str, bits: Bits, epochs: int, options: dict[str, Any]) -> list[Phase]:
    """The phases of a scheme, those without epochs left out.

    Args:
        name: in `SCHEMES`.
        bits: the widths that the run ends with.
        epochs: the recipe's `schedule.epochs`; what it counts is the scheme's business.
        options: the scheme's own.

    Raises:
        ValueError: an option that the scheme does not take, or a value that it cannot use.
    """
    try:
        found = SCHEMES[name].phases(bits, epochs, **options)
    except TypeError as reason:
        raise ValueError(f"{name}: {str(reason).removeprefix('phases() ')}") from reason
    left = [phase for phase in found if phase.epochs]
    return [replace(phase, continues=phase.continues and number > 0) for number, phase in enumerate(left)]
