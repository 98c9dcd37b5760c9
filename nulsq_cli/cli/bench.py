"""`nulsq bench`: latency and throughput side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from nulsq_cli.cli.everywhere import Json, NoColor, Quiet
from nulsq_cli.cli.show import Show
from nulsq_cli.errors import UsageError


def bench(
    targets: Annotated[list[str], typer.Argument(help="Runs, packed files, exported files.")],
    runtime: Annotated[list[str] | None, typer.Option("--runtime", help="For ONNX files: onnxruntime, openvino; may be repeated; "
                                                                        "default: all that are here.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of every engine.")] = 1,
    batch_size: Annotated[str, typer.Option("--batch-size", "-b", help="Sizes with commas between: 1 is latency.")] = "1,16",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each network runs per size.")] = 21,
    static_int8: Annotated[bool, typer.Option("--static-int8", help="Beside ONNX files, ONNX Runtime's own int8.")] = False,
    as_json: Json = False, quiet: Quiet = False, no_color: NoColor = False,
) -> None:  # fmt: skip
    """Time networks in turns within one process, on noise, each beside its engine's float network."""
    try:
        sizes = [int(size) for size in batch_size.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch-size must be whole numbers from 1 on, got {batch_size!r}", fix="write for instance 1,16")
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    show.result(jobs.bench(targets, jobs.Timing(runtime or (), threads, sizes, rounds, static_int8), show=show))
