"""The machine-readable logs of a run, beside what is shown."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from nulsq_cli.files import write_text


class Logs:
    """Passes progress on to the display, and writes the two machine-readable logs of a run."""

    def __init__(self, folder: Path, show: Any, primary: bool) -> None:
        self.folder, self.show, self.primary = folder, show, primary

    def step(self, epoch: int, batch: int, batches: int, loss: float, rates: tuple[float, float | None],
             images_per_second: float) -> None:  # fmt: skip
        """Shown; not kept."""
        self.show.step(epoch, batch, batches, loss, rates, images_per_second)

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        """Shown and kept."""
        self.show.epoch(rows[-1])
        self.write(rows)

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Both logs from the run's own rows, so that a resumed run has each epoch once."""
        if not self.primary or not rows:
            return
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows), parents=False)
        table = io.StringIO()
        sheet = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        sheet.writeheader()
        sheet.writerows(rows)
        write_text(self.folder / "summary.csv", table.getvalue(), parents=False)

    def say(self, text: str) -> None:
        """Shown."""
        self.show.say(text)
