"""Every expected failure: what happened, where, and the way out. One class per exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class NulsqError(Exception):
    """A failure that ends in two lines on stderr and an exit code, never in a traceback.

    Args:
        what: one sentence, lower case, without a full stop.
        where: file:line, layer name, path ... put in front of the sentence.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.fix = fix

    def __str__(self) -> str:
        first = f"{self.where}: {self.what}" if self.where else self.what
        text = f"{first}\n  fix: {self.fix}" if self.fix else first
        # Names come from files, and a terminal obeys what is not printable.
        return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


class UsageError(NulsqError):
    """The command line or the recipe asks for something that cannot be."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that cannot be run. Several complaints are joined, one per line."""


class InputError(NulsqError):
    """A file, folder or download that is missing, unreadable or damaged."""

    exit_code = 3


class DivergedError(NulsqError):
    """Training produced a value that is not a number, and could not go on."""

    exit_code = 4


class CheckFailedError(NulsqError):
    """A check that the user asked for did not hold (accuracy gate, export verification)."""

    exit_code = 5


class Stopped(BaseException):
    """SIGINT or SIGTERM, where nothing waits for them. Not KeyboardInterrupt: typer would end the process without a word."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class Interrupted(NulsqError):
    """SIGINT or SIGTERM, after a recovery checkpoint was written."""

    def __init__(self, signal_number: int, what: str, *, fix: str | None = None) -> None:
        super().__init__(what, fix=fix)
        self.exit_code = 128 + signal_number


def suggest(name: str, choices: Iterable[str]) -> str:
    """The way out for a name that does not exist: the nearest good one, else the whole list."""
    known = list(choices)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """Look `name` up in one of the project's tables.

    Raises:
        UsageError: no such name; the fix names the nearest one.
    """
    if name in table:
        return table[name]
    raise UsageError(f"no {kind} called {name!r}", fix=suggest(name, table))


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough for one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
