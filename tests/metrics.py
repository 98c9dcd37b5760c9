"""What a run logged, without what the clock says."""

from __future__ import annotations

import json
from pathlib import Path

CLOCK = {"seconds", "images_per_second"}


def rows(run: Path) -> list[dict]:
    """All rows of `metrics.jsonl`, those of epochs and those of steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in lines]


def epochs(run: Path) -> list[dict]:
    """Those of epochs."""
    return [row for row in rows(run) if "batch" not in row]


def steps(run: Path) -> list[dict]:
    """Those of steps."""
    return [row for row in rows(run) if "batch" in row]
