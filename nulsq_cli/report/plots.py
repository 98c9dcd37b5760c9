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
    """Draw accuracy against bits, a line per method, with its spread over seeds.

    Args:
        cells: as `report.comparison.gather` makes them.
        float_top1: of the float model, percent; a dashed line.
        title: above the picture.
        path: the picture; its suffix chooses the format.

    Raises:
        InputError: as `entropy`.
    """
    methods, widths = (list(dict.fromkeys(getattr(c, key) for c in cells)) for key in ("method", "bits"))
    with _drawing() as plt:
        figure, axis = plt.subplots(figsize=(4.6 + 1.6 * len(widths), 5.6), layout="constrained")
        for index, method in enumerate(methods):
            own = [c for c in cells if c.method == method and c.mean is not None]
            # A little aside of each other, so that equal accuracies stay visible.
            aside = (index - (len(methods) - 1) / 2) * 0.3 / max(len(methods), 1)
            axis.errorbar(
                [widths.index(c.bits) + aside for c in own], [c.mean for c in own], yerr=[c.spread or 0 for c in own],
                label=method, color=COLORS[index % len(COLORS)], marker="osD^vP*X"[index // len(COLORS) % 8], ms=6,
                lw=2 if method.startswith("nulsq") else 1.2, ls="-" if method.startswith("nulsq") else (0, (4, 2)), capsize=3,
            )  # fmt: skip
        if float_top1 is not None:
            axis.axhline(float_top1, color=INK, lw=0.9, ls=(0, (1, 2)))
            axis.text(-0.3, float_top1, "float", va="bottom", fontsize=9)
        axis.set_xlim(-0.35, len(widths) - 0.65)
        axis.set_xticks(range(len(widths)), widths)
        axis.set_xlabel("bits, weights/activations")
        axis.set_ylabel("top-1 %")
        axis.yaxis.grid(True, color=FAINT, lw=0.7)
        axis.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False)
        _write(figure, title, path)


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


def label(target: dict[str, Any]) -> str:
    """What a target is called in a legend."""
    return f"{target['method']} {target['bits']}"


def _bars(axis: Any, targets: list[dict[str, Any]], tensor: str) -> None:
    names: list[str] = list(dict.fromkeys(r["name"] for t in targets for r in _inner(t, tensor)))
    width = 0.8 / len(targets)
    top = 1.0
    for index, target in enumerate(targets):
        found = {r["name"]: r for r in _inner(target, tensor)}
        heights = [found[n]["entropy"] if n in found else 0 for n in names]
        top = max([top, *(r["bits"] for r in found.values())])
        mean = sum(r["entropy"] for r in found.values()) / max(len(found), 1)
        axis.bar([i + (index - (len(targets) - 1) / 2) * width for i in range(len(names))], heights, width * 0.92,
                 color=COLORS[index % len(COLORS)], label=f"{label(target)}   mean {mean:.3f}")  # fmt: skip
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
    axis.set_yticks(range(len(targets)), [label(t) for t in reversed(targets)])
    axis.set_ylim(-0.45, len(targets) - 0.1)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.set_xlabel("level (height: square root of its share)")
    name = next((row["name"] for row in rows if row), "")
    axis.set_title(f"levels of {name}", loc="left", fontweight="bold")
