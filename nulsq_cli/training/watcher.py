"""The loop's two links to the people outside: who shows what it does, and their signals."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any, Protocol

from nulsq_cli.errors import Stopped
from nulsq_cli.training.state import Progress

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watcher(Protocol):
    """Whoever shows progress to people and keeps the logs."""

    def step(self, row: dict[str, Any]) -> None:
        """After some updates, with their metrics."""

    def epoch(self, progress: Progress) -> None:
        """After every epoch, with the metrics of all so far."""

    def write(self, progress: Progress) -> None:
        """The logs again, when a run goes on."""

    def say(self, text: str) -> None:
        """Anything worth knowing."""


class Signals:
    """SIGINT and SIGTERM: the first is noted, to be obeyed after an update; a second one interrupts at once.

    Args:
        echo: each of several processes may be told twice, by a cluster's scheduler and by torchrun: that is one signal.
    """

    def __init__(self, *, echo: bool) -> None:
        self.echo_seconds = 10.0 if echo else 0.0
        self.told: dict[int, float] = {}  # when

    def note(self, number: int) -> None:
        """Called with each signal."""
        now = time.monotonic()
        if self.told and now - min(self.told.values()) >= self.echo_seconds:
            raise Stopped(number)
        self.told.setdefault(number, now)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note them inside; nothing changes outside the main thread of a process."""
        try:
            old = {number: signal.signal(number, lambda n, _: self.note(n)) for number in SIGNALS}
        except ValueError:  # not the main thread
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
