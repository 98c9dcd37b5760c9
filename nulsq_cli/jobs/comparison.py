"""`nulsq compare`: one recipe, many methods, widths and seeds; nothing else differs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nulsq_cli import recipe
from nulsq_cli.errors import InputError, Interrupted, NulsqError, UsageError
from nulsq_cli.files import read_json, write_json, write_text
from nulsq_cli.jobs.finetuning import finetune
from nulsq_cli.report import comparison, plots

VARIED = ("quant.method", "quant.bits", "seed")


@dataclass(frozen=True)
class Matrix:
    """What is compared: every combination is one run."""

    methods: Sequence[str]
    widths: Sequence[str]
    seeds: Sequence[int]


def compare(r: recipe.Recipe, matrix: Matrix, folder: Path, *, collect: bool, show: Any) -> dict[str, Any]:
    """Run what is missing of a matrix, then write its table as text, JSON, Markdown and picture.

    A run that has a result is not repeated, one that was interrupted goes on where it stopped.

    Args:
        r: the recipe; its method, bits and seed are replaced.
        matrix: what is compared.
        folder: of the comparison; each run is a folder in it.
        collect: only put together what is there, run nothing.
        show: for people.

    Raises:
        UsageError: the folder holds a comparison with another recipe, or a combination is impossible.
        Interrupted: as a single run.
    """
    # Everything impossible is said before the first of many runs, not in the middle of the night.
    plan = [(m, b, s, recipe.with_values(r, dict(zip(VARIED, (m, b, s), strict=True))))
            for b in matrix.widths for s in matrix.seeds for m in matrix.methods]  # fmt: skip
    if not collect:
        _same_recipe(r, folder)
    results = []
    for number, (method, bits, seed, wanted) in enumerate(plan, 1):
        run = folder / f"{method}-w{bits.replace('/', 'a')}-s{seed}"
        stored = run / "result.json"
        if not stored.exists() and not collect:
            show.heading(f"{number}/{len(plan)}: {method} {bits}, seed {seed}")
            try:
                finetune(wanted, run, resume="auto", export_after=True, dry_run=False, min_top1=None, show=show.silent())
            except Interrupted:
                raise  # the user stops the whole matrix, not one run of it
            except NulsqError as reason:
                # One method that diverges must not cost the others their night.
                show.say(f"  failed: {reason}")
                results.append({"method": method, "bits": bits, "seed": seed, "failed": reason.what})
                continue
        if stored.exists():
            results.append({**read_json(stored), "method": method, "bits": bits, "seed": seed})
            show.say(f"  {method:<10} {bits}  seed {seed}  {results[-1]['best']['top1']:6.2f} %")
    if not results:
        raise InputError("holds no finished run of this comparison", where=folder, fix="run it without --collect")
    return _report(r, matrix, results, folder, show)


def _same_recipe(r: recipe.Recipe, folder: Path) -> None:
    """Keep the recipe with the comparison, or find it there; what is compared may differ."""
    path = folder / "compare.yaml"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, r.to_yaml())
        return
    for key, (before, now) in recipe.differences(recipe.load(path), r).items():
        if key not in VARIED:
            raise UsageError(f"holds a comparison with another recipe, with {key} {before!r}, not {now!r}",
                             where=folder, fix="choose another folder with -o")  # fmt: skip


def _report(r: recipe.Recipe, matrix: Matrix, results: list[dict[str, Any]], folder: Path, show: Any) -> dict[str, Any]:
    steady = [s.name for s in r.quant.stabilizers]
    published = {(p.method, str(p.bits)): p.top1 for p in r.published
                 if p.scheme in (None, r.scheme_name) and steady == [p.stabilizer] * (p.stabilizer is not None)}  # fmt: skip
    cells = comparison.gather(results, matrix.methods, matrix.widths, published)
    done = [x for x in results if "failed" not in x]
    float_top1 = done[0]["float"]["top1"] if done else None
    methods, epochs = len(matrix.methods), r.schedule.epochs
    title = f"{r.model.name}: {methods} method{'s' * (methods != 1)}"
    notes = [
        f"Top-1 % before → after {epochs} epoch{'s' * (epochs != 1)}; float {float_top1:.2f} %; " if done else "",
        f"mean ± standard deviation over {len(matrix.seeds)} seeds" if len(matrix.seeds) > 1 else f"one seed ({matrix.seeds[0]})",
    ]
    columns, table = comparison.rows(cells)
    with show.outcome():
        show.table(title, columns, table)
        show.say("  " + "".join(notes) + "; * best of its column")
    page = comparison.markdown(cells, title, ["".join(notes) + "; * best of its column."])
    write_text(folder / "compare.md", page)
    result = {"folder": str(folder), "model": r.model.name, "epochs": r.schedule.epochs, "seeds": list(matrix.seeds),
              "float": float_top1, "cells": [c.to_json() for c in cells]}  # fmt: skip
    write_json(folder / "compare.json", result)
    try:
        for suffix in ("png", "svg"):
            plots.accuracy(cells, float_top1, title, folder / f"compare.{suffix}")
        show.say(f"  wrote {folder}/compare.md, compare.json, compare.png, compare.svg")
    except InputError as reason:
        show.say(f"  wrote {folder}/compare.md and compare.json; {reason}")
    return result
