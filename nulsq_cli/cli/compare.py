"""`nulsq compare`: the same recipe with every method, width and seed that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nulsq_cli.cli.everywhere import Json, NoColor, Quiet
from nulsq_cli.cli.finetune import Items, read, with_flags
from nulsq_cli.cli.show import Show
from nulsq_cli.errors import CheckFailedError, UsageError, pick
from nulsq_cli.methods import METHODS
from nulsq_cli.values import Bits


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def compare(
    items: Items = None,
    *,
    given: dict[str, tuple[str, Any]],
    methods: Annotated[str, typer.Option("--methods", help="Names with commas between, or `all`.")] = "lsq,nulsq-a,nulsq-wa",
    bits: Annotated[str, typer.Option("--bits", help="Widths with commas between.")] = "2/2,3/3,4/4",
    seeds: Annotated[str, typer.Option("--seeds", help="Seeds with commas between.")] = "42",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the comparison, one run per folder in it.")] = Path(
        "output/compare"
    ),
    collect: Annotated[bool, typer.Option("--collect", help="Run nothing, put together what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:  # fmt: skip
    """Run one recipe with many methods, widths and seeds, and print the table.

    The same command goes on where it was stopped.
    """
    names = list(METHODS) if methods.strip() == "all" else _listed(methods)
    for name in names:
        pick(METHODS, name, "method")
    widths = [str(Bits.parse(width)) for width in _listed(bits)]
    try:
        numbers = [int(seed) for seed in _listed(seeds)]
    except ValueError as reason:
        raise UsageError(f"--seeds must be whole numbers, got {seeds!r}", fix="write for instance 1,2,3") from reason
    if not (names and widths and numbers):
        raise UsageError("there is nothing to compare", fix="name at least one method, one width and one seed")
    wanted = read(items, given)
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    result = jobs.compare(wanted, jobs.Matrix(names, widths, numbers), output, collect=collect, show=show)
    show.result(result)
    failed = sum(len(cell["failed"]) for cell in result["cells"])
    if failed:
        raise CheckFailedError(f"{failed} of {len(names) * len(widths) * len(numbers)} runs failed", where=output,
                               fix="compare.md says why; the same command tries them again")  # fmt: skip


compare = with_flags(compare, leave_out=("quant.method", "quant.bits", "seed"))
