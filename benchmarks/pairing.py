"""What the benchmarks share: alternatives timed alternately in one process, their ratios, one JSON line per case, a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from nulsq_cli.ops import fast
from nulsq_cli.version import __version__

Alternative = Callable[[], float]
"""Runs once and says how many seconds of it count."""


def arguments(doc: str, *, reference: bool = False, models: bool = True) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--tiny", action="store_true", help="does it run at all: smallest sizes, one round; numbers mean nothing")
    parser.add_argument("--rounds", type=int, help="how often each alternative is timed")
    if models:
        parser.add_argument("--model", metavar="NAME:BATCH:SIDE", help="this one, with square images, instead of two ResNets")
    if reference:
        parser.add_argument("--reference", metavar="PATH", help="a checkout of github.com/DensoITLab/nuLSQ to measure, too")
    return parser


def rounds(options: argparse.Namespace, short: int, full: int) -> int:
    """How many rounds were asked for."""
    return options.rounds or (1 if options.tiny else short if options.short else full)


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(alternatives: dict[str, Alternative], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time all alternatives once per round, each round beginning with another one.

    A machine gets faster and slower over minutes; within one round it is nearly the same machine.

    Returns:
        The seconds of each, by round.
    """
    for _ in range(warmup):
        for run in alternatives.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    names = list(alternatives)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(alternatives[name]())
    return times


def ratio(times: dict[str, list[float]], of: str, to: str, factor: float = 1.0) -> dict[str, float]:
    """The median over rounds of `of` / `to`, with the least and the greatest of them, and the median milliseconds of `of`."""
    found = [factor * a / b for a, b in zip(times[of], times[to], strict=True)]
    return {"ratio": statistics.median(found), "least": min(found), "most": max(found), "ms": 1e3 * statistics.median(times[of])}


class Report:
    """One JSON line per case while it goes on, a table at the end."""

    def __init__(self, benchmark: str) -> None:
        self.benchmark = benchmark
        self.rows: list[dict[str, Any]] = []
        print(json.dumps({"benchmark": benchmark, **machine()}), flush=True)

    def add(self, **case: Any) -> None:
        """One case."""
        case = {key: _short(value) for key, value in case.items()}
        self.rows.append(case)
        print(json.dumps({"benchmark": self.benchmark, **case}), flush=True)

    def table(self, columns: Iterable[str]) -> None:
        """All cases, these columns of them."""
        columns = list(columns)
        cells = [columns] + [[_cell(row.get(c)) for c in columns] for row in self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        print("\n" + "\n".join(lines), flush=True)


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {"nulsq": __version__, "torch": torch.__version__, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
            "processor": _processor(), "load": round(os.getloadavg()[0], 2)}  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def compiled(on: bool) -> None:
    """Let the quantizers run by their compiled loops, or by the eager functions that are the truth."""
    if fast.use(on) is not on:
        raise SystemExit("error: nothing to compile with on this machine")
