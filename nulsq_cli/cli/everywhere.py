"""What every command takes, and how flags with several values are read."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Annotated, Any

import typer

from nulsq_cli.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results and errors.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Plain text; NO_COLOR does the same.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A traceback with every error.")]

SEVERAL = ("--mean", "--std")
"""Flags that take as many numbers as images have channels."""


def everywhere(command: Callable[..., None]) -> Callable[..., None]:
    """The command with -q, -v and --no-color; those that it does not know itself change nothing in it."""
    own = inspect.signature(command, eval_str=True).parameters
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose), ("no_color", NoColor)) if name not in own
    ]  # fmt: skip

    def run(**values: Any) -> None:
        for parameter in added:
            values.pop(parameter.name)
        command(**values)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature([*own.values(), *added])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


def together(arguments: Sequence[str]) -> list[str]:
    """The command line with the numbers after --mean and --std in one word each: the parser wants a fixed count."""
    found: list[str] = []
    rest = deque(arguments)
    while rest:
        found.append(rest.popleft())
        if found[-1] in SEVERAL:
            values = list(takewhile(_is_number, rest))
            if values:
                found.append(" ".join(rest.popleft() for _ in values))
    return found


def numbers(flag: str, text: str | None) -> list[float] | None:
    """What `together` has joined, as numbers again.

    Raises:
        UsageError: something among them is no number.
    """
    if text is None:
        return None
    if not all(map(_is_number, text.split())):
        raise UsageError(f"{flag} takes a number for each channel, got {text!r}", fix=f"write {flag} 0.5 0.5 0.5")
    return [float(word) for word in text.split()]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
