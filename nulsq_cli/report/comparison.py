"""Many runs as one table: methods down, bits across, mean and spread over seeds in every cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One method at one width.

    Args:
        method, bits: which.
        top1: best accuracy of each seed's run, percent, in the order of the seeds.
        init: accuracy of each before training.
        seeds: of the finished runs.
        failed: seed -> why it has no result.
        published: the paper's figure for this recipe, percent; never a measurement of ours.
    """

    method: str
    bits: str
    top1: list[float]
    init: list[float]
    seeds: list[int]
    failed: dict[str, str]
    published: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return mean(self.top1) if self.top1 else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds (n - 1); None below two seeds."""
        return stdev(self.top1) if len(self.top1) > 1 else None

    def words(self, count: bool = False) -> str:
        """As it stands in a table; with the number of finished runs where that is not one everywhere."""
        if self.mean is None:
            text = "failed" if self.failed else "-"
        else:
            text = f"{self.mean:.2f}"
            if self.spread is not None:
                text += f" ± {self.spread:.2f}"
            if count:
                text += f" (n={len(self.top1)})"
        return text if self.published is None else f"{text} (paper {self.published:.2f})"

    def to_json(self) -> dict[str, Any]:
        """All of it, with the two figures that are derived."""
        return {**asdict(self), "mean": self.mean, "spread": self.spread}


def gather(
    results: Iterable[dict[str, Any]], methods: Sequence[str], widths: Sequence[str], published: dict[tuple[str, str], float]
) -> list[Cell]:
    """Results of runs, sorted into cells.

    Args:
        results: each a finetune result, or {method, bits, seed, failed: why}.
        methods, widths: rows and columns; every pair becomes a cell.
        published: (method, bits) -> percent.
    """
    found = list(results)
    cells = []
    for method in methods:
        for bits in widths:
            here = sorted((r for r in found if (r["method"], r["bits"]) == (method, bits)), key=lambda r: r["seed"])
            done = [r for r in here if "failed" not in r]
            cells.append(Cell(
                method, bits, [r["best"]["top1"] for r in done], [r["init"]["top1"] for r in done], [r["seed"] for r in done],
                {str(r["seed"]): r["failed"] for r in here if "failed" in r}, published.get((method, bits)),
            ))  # fmt: skip
    return cells


def rows(cells: list[Cell]) -> tuple[list[str], list[list[str]]]:
    """(column titles, one row per method) of the accuracy table, best of each column marked."""
    methods, widths = (list(dict.fromkeys(getattr(c, key) for c in cells)) for key in ("method", "bits"))
    best = {bits: max((c.mean for c in cells if c.bits == bits and c.mean is not None), default=None) for bits in widths}
    by_place = {(c.method, c.bits): c for c in cells}
    several = any(len(c.seeds) + len(c.failed) > 1 for c in cells)
    table = []
    for method in methods:
        line = [method]
        for bits in widths:
            cell = by_place[method, bits]
            mark = " *" if cell.mean is not None and cell.mean == best[bits] and len(methods) > 1 else ""
            before = f"{mean(cell.init):.2f} → " if cell.init else ""
            line.append(before + cell.words(several) + mark)
        table.append(line)
    return ["method", *widths], table


def markdown(cells: list[Cell], title: str, notes: Sequence[str]) -> str:
    """The table as a Markdown page.

    Args:
        cells: as `gather` makes them.
        title: first line.
        notes: what a reader must know to trust the numbers, a line each.
    """
    columns, table = rows(cells)
    lines = [f"# {title}", "", *notes, "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(line) + " |" for line in table]
    failures = [f"- {c.method} {c.bits}, seed {seed}: {why}" for c in cells for seed, why in c.failed.items()]
    return "\n".join([*lines, *(["", *failures] if failures else []), ""])
