"""What people see: tables and one live line on a terminal, plain lines elsewhere; JSON alone on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from math import prod
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from nulsq_cli.files import append_line

VIOLET = "medium_purple1"


class Show:
    """Shows a command's progress to people, and keeps a plain copy in a run's `train.log`.

    Args:
        as_json: stdout belongs to one JSON object, so people read stderr.
        quiet: only results and errors: what is shown inside `outcome`.
        color: False forces plain text; `NO_COLOR` is honoured in any case.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, color: bool = True) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.mute = False  # not even results: someone else shows them
        plain = not color or bool(os.environ.get("NO_COLOR"))
        self.console = Console(stderr=as_json, no_color=plain, highlight=False, soft_wrap=not sys.stdout.isatty())
        self.log: Path | None = None
        self.before: list[str] = []  # what was shown before there was a log
        self.chosen_on = ""
        self.live: Progress | None = None
        self.task: TaskID | None = None

    # ---- words ----------------------------------------------------------------------------------

    def log_to(self, path: Path) -> None:
        """Keep a copy of all lines in this file, also of those so far."""
        self.log, before = path, self.before
        self.before = []
        for text in before:
            append_line(path, text)

    def _keep(self, text: str) -> None:
        if self.log is None:
            self.before.append(text)
        else:
            append_line(self.log, text)

    @contextmanager
    def outcome(self) -> Iterator[bool]:
        """What is shown inside is the result of the command, which -q leaves; with --json that is the object alone.

        Yields:
            Whether nothing else is shown.
        """
        quiet = self.quiet
        self.quiet = quiet and (self.mute or self.as_json)
        try:
            yield quiet
        finally:
            self.quiet = quiet

    def say(self, text: str, style: str | None = None) -> None:
        """One line."""
        if not self.quiet:
            (self.live.console if self.live else self.console).print(text, style=style, markup=False)
        self._keep(text)

    def silent(self) -> Show:
        """For one run of many: it writes its own log, and of all of them people want the results."""
        other = Show(as_json=self.as_json, quiet=True)
        other.mute = True
        return other

    def heading(self, text: str) -> None:
        """Opens a stage of the run."""
        if self.console.is_terminal and not self.quiet:
            self.console.print()
        self.say(f"● {text}", style=f"bold {VIOLET}")

    def score(self, label: str, top1: float, top5: float, samples: int) -> None:
        """An accuracy with a bar that makes two of them comparable at a glance."""
        filled = round(top1 / 100 * 30)
        self.say(f"  {label:<28} {top1:6.2f} %  {'━' * filled}{'╌' * (30 - filled)}  top-5 {top5:.2f} %, {samples} images")

    # ---- tables ---------------------------------------------------------------------------------

    def table(self, title: str, columns: list[str], rows: list[list[str]], right: set[int] = frozenset()) -> None:
        """A table; on something that is no terminal the same, without colour and as wide as it needs."""
        table = Table(title=escape(title) or None, title_justify="left", title_style="bold", header_style="bold", box=None,
                      pad_edge=False, padding=(0, 2, 0, 0))  # fmt: skip
        for index, name in enumerate(columns):
            table.add_column(name, justify="right" if index in right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))  # a name may hold brackets
        copy = StringIO()
        Console(file=copy, width=200, no_color=True, highlight=False).print(table)
        if not self.quiet and self.console.is_terminal:
            self.console.print(table)
        elif not self.quiet:
            self.console.file.write(copy.getvalue())
        self._keep(copy.getvalue().rstrip("\n"))

    def plan(self, plan: dict[str, Any]) -> None:
        """The plan as a table and, below it, what it comes to."""
        rows = [
            [
                p["name"], p["type"], "×".join(map(str, p["shape"])),
                "float" if p["method"] == "float" else f"{p['weight_bits']}/{p['input_bits']}",
                "-" if p["signed"] is None or p["method"] == "float" else "signed" if p["signed"] else "unsigned",
                p["granularity"] if p["method"] != "float" else "-", p["method"],
                p["reason"] + ("" if p["input_learned"] else "; image step fixed"),
            ]
            for p in plan["layers"]
        ]  # fmt: skip
        self.table("", ["layer", "type", "shape", "bits W/A", "input", "weights per", "method", "why"], rows)
        left: dict[tuple[str, str], list[int]] = {}
        for p in plan["layers"]:
            if p["reason"].startswith("float: "):
                left.setdefault((p["type"], p["reason"].removeprefix("float: ")), []).append(prod(p["shape"]))
        total = sum(prod(p["shape"]) for p in plan["layers"])
        for (kind, reason), sizes in left.items():
            share = 100 * sum(sizes) / total
            self.say(f"  ! left in float: {len(sizes)} {kind}, {share:.1f} % of the weights ({reason})", "yellow")
        grids = {p["grid"] for p in plan["layers"] if p["method"] != "float"} - {"float"}
        self.say(
            f"  {plan['average_weight_bits']:.2f} bits per weight on average · float {size(plan['float_bytes'])}"
            f" · packed {size(plan['packed_bytes'])} ({plan['float_bytes'] / max(plan['packed_bytes'], 1):.1f}× smaller)"
            + "".join(f" · levels on an {grid} grid" for grid in sorted(grids))
        )

    # ---- training -------------------------------------------------------------------------------

    def start_training(self, epochs: int, batches: int, done: int) -> None:
        """Open the live display, where there is a terminal."""
        if self.quiet or not self.console.is_terminal:
            return
        self.live = Progress(
            TextColumn("  {task.description}"), BarColumn(bar_width=24, complete_style=VIOLET),
            TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(),
            console=self.console, transient=True,
        )  # fmt: skip
        now = done // max(batches, 1) + 1
        self.task = self.live.add_task(f"epoch {now}/{epochs}", total=epochs * batches, completed=done, numbers="")
        self.epochs = epochs
        self.live.start()

    def stop_training(self) -> None:
        """Close the live display."""
        if self.live is not None:
            self.live.stop()
            self.live = None

    def step(self, row: dict[str, Any]) -> None:
        """After some updates: move the bar, or print a line now and then."""
        epoch, batch, batches = row["epoch"], row["batch"], row["batches"]
        numbers = f"loss {row['train_loss']:.3f}  lr {row['lr_weights']:.2e}"
        if row["lr_steps"] is not None:
            numbers += f"  steps lr {row['lr_steps']:.2e}"
        numbers += f"  {row['images_per_second']:.0f} images/s"
        if self.live is not None and self.task is not None:
            self.live.update(self.task, completed=epoch * batches + batch, numbers=numbers,
                             description=f"epoch {epoch + 1}/{self.epochs}  step {batch}/{batches}")  # fmt: skip
        elif batches > 100:
            self.say(f"  epoch {epoch + 1}, batch {batch}/{batches}: {numbers}")

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch."""
        self.say(
            f"  epoch {row['epoch'] + 1:<3} loss {row['train_loss']:.3f}   {self.chosen_on}top-1 {row['eval_top1']:6.2f} %"
            f"   lr {row['lr_weights']:.1e}   {row['seconds']:.1f} s"
        )

    # ---- results --------------------------------------------------------------------------------

    def result(self, value: Any) -> None:
        """The JSON object of the command, if it was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(value) + "\n")


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
