"""The machine-readable logs of a run, beside what is shown."""

from __future__ import annotations

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
        rows = sorted([*progress.steps, *progress.rows], key=lambda row: row["epoch"])
        write_text(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in rows), parents=False)
        table = io.StringIO()
        sheet = csv.DictWriter(table, list(progress.rows[0]) if progress.rows else [], lineterminator="\n")
        sheet.writeheader()
        sheet.writerows(progress.rows)
        write_text(self.folder / "summary.csv", table.getvalue(), parents=False)

    def say(self, text: str) -> None:
        """Shown."""
        self.show.say(text)
