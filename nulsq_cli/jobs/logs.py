"""The machine-readable logs of a run, beside what is shown."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

from nulsq_cli.files import append_line, write_text
from nulsq_cli.training.state import Progress

METRICS = "metrics.jsonl"


class Logs:
    """Passes progress on to the display, and writes the two machine-readable logs of a run."""

    def __init__(self, folder: Path, show: Any, primary: bool) -> None:
        self.folder, self.show, self.primary = folder, show, primary

    def step(self, row: dict[str, Any]) -> None:
        """Shown, and kept for whoever follows the run."""
        self.show.step(row)
        if self.primary:
            append_line(self.folder / METRICS, json.dumps(row))

    def epoch(self, progress: Progress) -> None:
        """Shown and kept."""
        self.show.epoch(progress.rows[-1])
        self.write(progress)

    def write(self, progress: Progress) -> None:
        """Both logs from the run's own rows, so that a run that went on or went back has each of them once."""
        if not self.primary:
            return
        # A stable order: the steps of an epoch, then the epoch.
        rows = sorted([*self._before(progress.steps), *progress.steps, *progress.rows], key=lambda row: row["epoch"])
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows), parents=False)
        if not progress.rows:
            return
        table = io.StringIO()
        sheet = csv.DictWriter(table, list(progress.rows[0]), lineterminator="\n")
        sheet.writeheader()
        sheet.writerows(progress.rows)
        write_text(self.folder / "summary.csv", table.getvalue(), parents=False)

    def _before(self, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows of steps in the log from before those that the progress has."""
        path, found = self.folder / METRICS, []
        if not steps or not path.exists():
            return []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # half a line of a machine that stopped
                row = json.loads(line)
                if "batch" in row and (row["epoch"], row["batch"]) < (steps[0]["epoch"], steps[0]["batch"]):
                    found.append(row)
        return found

    def say(self, text: str) -> None:
        """Shown."""
        self.show.say(text)
