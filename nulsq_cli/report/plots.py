"""Pictures of level tables, entropies and comparisons. The only module that draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nulsq_cli.errors import InputError
from nulsq_cli.files import write_atomically
from nulsq_cli.report.comparison import Cell

COLORS = ("#6f4fd8", "#e0853a", "#2a9d8f", "#c8427a", "#5b7083", "#b8a11e")
MANY = ("#5b7083", "#6f4fd8", "#c8427a", "#2f3fb5", "#e0853a", "#2a9d8f", "#8a5a2b", "#b8a11e", "#d1495b", "#3a86c8",
        "#5d8c3a", "#9b72aa", "#7a7a7a", "#00798c")  # fmt: skip
"""For as many methods as there are; the first ones are those of the default comparison."""
INK, FAINT = "#22223b", "#d9d9e3"


def entropy(targets: list[dict[str, Any]], path: Path) -> None:
    """Draw two or more targets side by side: entropy per layer, and where one layer's levels lie.

    Args:
        targets: entries as `report.entropy.of_artifact` makes them.
        path: the picture; its suffix chooses the format.

    Raises:
        InputError: matplotlib is not installed, or the file cannot be written.
    """
    with _drawing() as plt:
        figure, axes = plt.subplots(2, 2, figsize=(12.5, 7.6), width_ratios=(3, 2), layout="constrained")
        for row, tensor in zip(axes, ("activation", "weight"), strict=True):
            _bars(row[0], targets, tensor)
            _levels(row[1], targets, tensor)
        _write(figure, "Shannon entropy of the codes, and the levels that they stand for", path)


def accuracy(cells: list[Cell], float_top1: float | None, title: str, path: Path) -> None:
    """Draw accuracy against bits, a line per method that is named at its end, with its spread over seeds.

    Args:
        cells: as `report.comparison.gather` makes them.
        float_top1: of the float model, percent; a dotted line.
        title: above the picture.
        path: the picture; its suffix chooses the format.

    Raises:
        InputError: as `entropy`.
    """
    methods, widths = (list(dict.fromkeys(getattr(c, key) for c in cells)) for key in ("method", "bits"))
    ends: list[tuple[float, float, str, str]] = []  # x, y, method, color
    floor = _floor(cells)
    with _drawing() as plt:
        figure, axis = plt.subplots(figsize=(4.4 + 1.6 * len(widths), max(5.0, 0.42 * len(methods))), layout="constrained")
        for index, method in enumerate(methods):
            here = [c for c in cells if c.method == method]
            own = [c for c in here if c.mean is not None]
            color, strong = MANY[index % len(MANY)], method.startswith("nulsq")
            # A little aside of each other, so that equal accuracies stay visible.
            aside = (index - (len(methods) - 1) / 2) * 0.24 / max(len(methods), 1)
            axis.errorbar(
                [widths.index(c.bits) + aside for c in own], [c.mean for c in own], yerr=[c.spread or 0 for c in own],
                color=color, marker="o", ms=5.5, lw=2.2 if strong else 1.2, ls="-" if strong else (0, (4, 2)),
                capsize=3 if any(c.spread for c in own) else 0, zorder=3 if strong else 2,
            )  # fmt: skip
            if own and own[-1].mean >= floor:
                ends.append((widths.index(own[-1].bits) + aside, own[-1].mean, method, color))
            for cell in here:
                if cell.published is not None:
                    axis.plot(widths.index(cell.bits) + aside, cell.published, "o", color=color, mfc="none", ms=8)
        if float_top1 is not None:
            axis.axhline(float_top1, color=INK, lw=0.9, ls=(0, (1, 2)))
            axis.text(-0.33, float_top1, f"float {float_top1:.2f}", va="bottom", fontsize=9)
        axis.set_xlim(-0.35, len(widths) - 0.15)
        inside = [c for c in cells if c.mean is not None and c.mean >= floor]
        shown = [c.mean + sign * (c.spread or 0) for c in inside for sign in (-1, 1)]
        shown += [c.published for c in cells if c.published is not None] + ([] if float_top1 is None else [float_top1])
        low, high = min(shown, default=0.0), max(shown, default=1.0)
        low, high = low - 0.1 * (high - low) - 0.05, high + 0.06 * (high - low) + 0.05
        axis.set_ylim(low, high)
        for index, cell in enumerate(c for c in cells if c.mean is not None and c.mean < floor):
            color = MANY[methods.index(cell.method) % len(MANY)]
            axis.annotate(f"{cell.method} {cell.mean:.2f} ↓", (widths.index(cell.bits), low), (0, 4 + 12 * index),
                          textcoords="offset points", ha="center", color=color, fontsize=9)  # fmt: skip
        _name_ends(axis, ends, len(widths) - 0.72, 0.3 * (high - low) / figure.get_figheight())
        axis.set_xticks(range(len(widths)), widths)
        notes = [" · bars: standard deviation over seeds"] * any(c.spread for c in cells)
        notes += [" · open circles: published"] * any(c.published for c in cells)
        axis.set_xlabel("bits, weights/activations" + "".join(notes), fontsize=9)
        axis.set_ylabel("top-1 %")
        axis.yaxis.grid(True, color=FAINT, lw=0.7)
        axis.set_axisbelow(True)
        _write(figure, title, path)


def _floor(cells: list[Cell]) -> float:
    """Where the axis may end: a method that is farther below the next than that is below the best is only named."""
    worst: dict[str, float] = {}
    for cell in cells:
        if cell.mean is not None:
            worst[cell.method] = min(cell.mean, worst.get(cell.method, cell.mean))
    order = sorted(worst.values())
    best = max((c.mean for c in cells if c.mean is not None), default=0.0)
    while len(order) > 3 and order[1] - order[0] > best - order[1]:
        order.pop(0)
    return order[0] if order else 0.0


def _name_ends(axis: Any, ends: list[tuple[float, float, str, str]], column: float, apart: float) -> None:
    """Write each name in one column right of the lines, no two closer than `apart`, and lead a hairline to it."""
    low, high = axis.get_ylim()
    ends = sorted(ends, key=lambda e: e[1])
    apart = min(apart, (high - low) / max(len(ends), 1))
    places = [y for _, y, _, _ in ends]
    # Up from below where they touch, then down from above where that went beyond the picture, around where they belong.
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + apart)
    middle = sum(p - e[1] for p, e in zip(places, ends, strict=True)) / max(len(ends), 1)
    places = [max(p - middle, low + (i + 0.5) * apart) for i, p in enumerate(places)]
    for i in range(len(places)):
        places[-1 - i] = min(places[-1 - i], high - (i + 0.5) * apart)
    for (x, y, name, color), where in zip(ends, places, strict=True):
        axis.plot([x, column - 0.02], [y, where], color=color, lw=0.5, alpha=0.6)
        axis.text(column, where, name, color=color, va="center", fontsize=10,
                  fontweight="bold" if name.startswith("nulsq") else "normal")  # fmt: skip


@contextmanager
def _drawing() -> Iterator[Any]:
    """matplotlib.pyplot, in this project's style."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as reason:
        raise InputError("pictures need matplotlib", fix="pip install 'nulsq[plot]'") from reason
    style = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
        "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "svg.hashsalt": "nulsq",
    }  # fmt: skip
    with plt.rc_context(style):
        yield plt
        plt.close("all")


def _write(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    kind = path.suffix.removeprefix(".")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=140, metadata=metadata))


def _inner(target: dict[str, Any], tensor: str) -> list[dict[str, Any]]:
    """The layers at the model's own width: 8-bit ends would stretch the scale."""
    width = int(target["bits"].split("/")[0 if tensor == "weight" else 1])
    return [r for r in target["layers"] if r["tensor"] == tensor and r["bits"] == width]


def labels(targets: list[dict[str, Any]]) -> list[str]:
    """What targets are called in a legend: method and bits, and where several have the same, their run, too."""
    names = [f"{t['method']} {t['bits']}" for t in targets]
    runs = [_run(Path(t["target"])) if names.count(name) > 1 else "" for name, t in zip(names, targets, strict=True)]
    return [f"{name} {run}".rstrip() for name, run in zip(names, runs, strict=True)]


def _run(target: Path) -> str:
    """The name of a run folder, also of one whose packed file is given."""
    return target.resolve().parents[1].name if target.parent.name == "export" else target.resolve().name


def _bars(axis: Any, targets: list[dict[str, Any]], tensor: str) -> None:
    names: list[str] = list(dict.fromkeys(r["name"] for t in targets for r in _inner(t, tensor)))
    width, called = 0.8 / len(targets), labels(targets)
    top = 1.0
    for index, target in enumerate(targets):
        found = {r["name"]: r for r in _inner(target, tensor)}
        heights = [found[n]["entropy"] if n in found else 0 for n in names]
        top = max([top, *(r["bits"] for r in found.values())])
        mean = sum(r["entropy"] for r in found.values()) / max(len(found), 1)
        axis.bar([i + (index - (len(targets) - 1) / 2) * width for i in range(len(names))], heights, width * 0.92,
                 color=COLORS[index % len(COLORS)], label=f"{called[index]}   mean {mean:.3f}")  # fmt: skip
    axis.axhline(top, color=INK, lw=0.8, ls=(0, (4, 3)))
    axis.text(len(names) - 0.5, top, f" all {top:g} bits used", va="bottom", ha="right", fontsize=8.5)
    axis.set_ylim(0, top * 1.32)
    axis.set_yticks([top * k / 4 for k in range(5)])
    axis.set_xlim(-0.6, max(len(names), 1) - 0.4)
    axis.set_xticks(range(len(names)), names, rotation=60 if len(names) > 6 else 0, ha="right" if len(names) > 6 else "center",
                    fontsize=8 if len(names) <= 30 else 5)  # fmt: skip
    axis.set_ylabel("bits per code")
    axis.set_title(f"{tensor}s", loc="left", fontweight="bold")
    axis.yaxis.grid(True, color=FAINT, lw=0.7)
    axis.set_axisbelow(True)
    if names:
        axis.legend(frameon=False, ncols=3, loc="upper left", fontsize=9)


def _levels(axis: Any, targets: list[dict[str, Any]], tensor: str) -> None:
    """One layer in the middle of the network: each level a bar at its place, as wide as it is often used."""
    rows = [next(iter(_inner(t, tensor)[len(_inner(t, tensor)) // 2 :]), None) for t in targets]
    for index, row in enumerate(rows):
        if row is None:
            continue
        total = max(sum(row["counts"]), 1)
        place = len(targets) - 1 - index
        color = COLORS[index % len(COLORS)]
        axis.hlines(place, min(row["levels"]), max(row["levels"]), color=FAINT, lw=1)
        for level, count in zip(row["levels"], row["counts"], strict=True):
            share = count / total
            axis.vlines(level, place, place + 0.72 * share**0.5, color=color, lw=3.2 if len(row["levels"]) <= 16 else 1)
            axis.plot(level, place, "o", color=color, ms=4)
            if len(row["levels"]) <= 8:
                axis.annotate(f"{100 * share:.0f} %", (level, place), xytext=(0, -13), textcoords="offset points",
                              ha="center", fontsize=7.5)  # fmt: skip
    axis.set_yticks(range(len(targets)), labels(targets)[::-1])
    axis.set_ylim(-0.45, len(targets) - 0.1)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("level (height: square root of its share)")
    name = next((row["name"] for row in rows if row), "")
    axis.set_title(f"levels of {name}", loc="left", fontweight="bold")
