"""The small commands. Each is a plain function: parse, one job, show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from nulsq_cli.cli.everywhere import Json, NoColor, Quiet, numbers
from nulsq_cli.cli.show import Show, size
from nulsq_cli.errors import InputError, UsageError


def evaluate(
    target: Annotated[str | None, typer.Argument(help="A run folder, a packed file or an exported ONNX file.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="A float model by name instead.")] = None,
    initial_checkpoint: Annotated[str | None, typer.Option("--initial-checkpoint", help="Its weights.")] = None,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="Folder of the data.")] = None,
    dataset: Annotated[str | None, typer.Option("--dataset", help="timm dataset.")] = None,
    val_split: Annotated[str | None, typer.Option("--val-split", help="Name of the split.")] = None,
    mean: Annotated[str | None, typer.Option("--mean", metavar="FLOAT...", help="Mean of each channel.")] = None,
    std: Annotated[str | None, typer.Option("--std", metavar="FLOAT...", help="Deviation of each channel.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", help="Images per batch.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-j", min=0, help="Loader processes.")] = None,
    runtime: Annotated[str | None, typer.Option("--runtime", help="For an ONNX file: onnxruntime (default) or openvino.")] = None,
    min_top1: Annotated[float | None, typer.Option("--min-top1", help="Exit with 5 below this accuracy.")] = None,
    as_json: Json = False, quiet: Quiet = False, no_color: NoColor = False,
) -> None:  # fmt: skip
    """Accuracy of a run, a packed file, an exported ONNX file or a float model, exact over all images of the split."""
    if (target is None) == (model is None):
        raise UsageError("name one thing to evaluate", fix="a run folder, a packed or exported file, or --model NAME")
    if model is not None and runtime is not None:
        raise UsageError("--runtime is for exported files; a float model is evaluated in torch", fix="leave it out")
    from nulsq_cli import recipe

    wanted = None
    if model is not None:
        flags = {"model.name": ("--model", model), "quant.bits": ("--model", "32/32"),
                 "model.pretrained": ("--model", initial_checkpoint is None)}  # fmt: skip
        if initial_checkpoint is not None:
            flags["model.initial_checkpoint"] = ("--initial-checkpoint", initial_checkpoint)
        wanted = recipe.load("imagenet", flags=flags)
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    given = {"data_dir": data_dir, "dataset": dataset, "val_split": val_split, "batch_size": batch_size, "workers": workers,
             "validation_batch_size": batch_size, "mean": numbers("--mean", mean), "std": numbers("--std", std)}  # fmt: skip
    result = jobs.evaluate(target or str(model), wanted, given, runtime=runtime, show=show)
    show.result(result)
    jobs.check_top1(result["top1"], min_top1, result["target"])


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN|ARTIFACT", help="A run folder, see `nulsq ls runs`; or its packed file.")],
    to: Annotated[str, typer.Option("--to", help="safetensors, onnx, openvino")] = "safetensors",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; default: in the run.")] = None,
    grid: Annotated[str, typer.Option("--grid", help="int8, or float: exact tables, small on disk, slow.")] = "int8",
    act: Annotated[str, typer.Option("--act", help="Form of activations: auto, where, sum8, table.")] = "auto",
    reach: Annotated[int, typer.Option("--range", help="7: exact on any processor; 8: int8 throughout, needs VNNI.")] = 7,
    data_dir: Annotated[str | None, typer.Option("--data-dir", help="The run's images, if they have moved.")] = None,
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Images that the file is tried on.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each network is timed.")] = 11,
    latency: Annotated[bool, typer.Option("--latency/--no-latency", help="Compare its speed with float32 and int8.")] = True,
    as_json: Json = False, quiet: Quiet = False, no_color: NoColor = False,
) -> None:  # fmt: skip
    """Write a run as a packed file, or for a runtime, and prove that it computes the same."""
    from nulsq_cli.errors import pick
    from nulsq_cli.exporters import EXPORTED, EXPORTERS

    pick(EXPORTERS, to, "export target")
    if run.is_file() and run.suffix in {EXPORTERS[kind].suffix for kind in EXPORTED}:
        raise UsageError("is an exported file already", where=run, fix="name the run, or its export/model.safetensors")
    if run.is_file() and to == "safetensors":
        raise UsageError("is a packed file already, or none; --to safetensors packs a run", where=run,
                         fix="name a run folder, or choose another --to")  # fmt: skip
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    if to != "safetensors":
        from nulsq_cli.cli.exported import show_export

        found = jobs.export_for_runtime(str(run), to, output, grid=grid, act=act, reach=reach, data_dir=data_dir,
                                        samples=samples, rounds=rounds if latency else 0, show=show)  # fmt: skip
        with show.outcome():
            show_export(found, show)
        show.result(found)
        return
    result = jobs.export(run, output, show=show)
    with show.outcome() as alone:
        show.table("", ["", "size"], [
            ["float model", size(result["float_bytes"])], ["packed file", size(result["bytes"])],
            ["weight codes", size(result["packed_weight_bytes"])], ["ideal", size(result["ideal_weight_bytes"])],
        ], right={1})  # fmt: skip
        if alone:
            show.say(f"  {result['path']}")
    show.result(result)


def entropy(
    targets: Annotated[list[str], typer.Argument(help="Runs or packed files; several are drawn side by side.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for entropy.json, .png and .svg.")] = None,
    as_json: Json = False, quiet: Quiet = False, no_color: NoColor = False,
) -> None:  # fmt: skip
    """Shannon entropy of the codes, used levels and their positions, layer by layer."""
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    show.result(jobs.entropy(targets, output, show=show))


def validate(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A recipe file or name.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes instead.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Check a recipe at once: every mistake with its file and line. Loads no torch."""
    from nulsq_cli import recipe

    if schema:
        typer.echo(json.dumps(recipe.json_schema(), indent=2))
        return
    if name is None:
        raise UsageError("name a recipe to check", fix="nulsq ls recipes")
    recipe.load(name)
    typer.echo(json.dumps({"recipe": name, "valid": True}) if as_json else f"{name}: fine")


def ls(
    what: Annotated[str, typer.Argument(help="recipes, models, methods, stabilizers, schemes or runs")] = "recipes",
    pattern: Annotated[str, typer.Argument(help="Models whose name contains this; runs below this folder.")] = "",
    as_json: Json = False, no_color: NoColor = False,
) -> None:  # fmt: skip
    """List what there is."""
    show = Show(as_json=as_json, color=not no_color)
    if what == "recipes":
        from nulsq_cli import recipe

        _listing(show, what, ["recipe", "what it is for"], [list(pair) for pair in recipe.shipped()])
    elif what == "methods":
        from nulsq_cli.methods import METHODS

        _listing(show, what, ["method", "weights", "activations", "idea"], [
            [name, m.weights.split(":")[1], m.activations.split(":")[1], m.idea] for name, m in METHODS.items()
        ])  # fmt: skip
    elif what == "stabilizers":
        from nulsq_cli.stabilizers import STABILIZERS

        _listing(show, what, ["stabilizer", "idea", "options"], [
            [name, line.idea, ", ".join(f"{k}={v}" for k, v in line.options.items())] for name, line in STABILIZERS.items()
        ])  # fmt: skip
    elif what == "schemes":
        from nulsq_cli.schemes import SCHEMES

        _listing(show, what, ["scheme", "teacher", "idea"], [
            [name, "needed" if s.needs_teacher else "none", s.idea] for name, s in SCHEMES.items()
        ])  # fmt: skip
    elif what == "models":
        from nulsq_cli import jobs

        _listing(show, what, ["model"], [[name] for name in jobs.models(pattern)])
    elif what == "runs":
        _listing(show, what, ["run", "model", "bits", "method", "top-1 %", "epoch"], _runs(Path(pattern or "output")))
    else:
        raise UsageError(f"cannot list {what!r}", fix="choose from recipes, models, methods, stabilizers, schemes, runs")


def _listing(show: Show, what: str, columns: list[str], rows: list[list[str]]) -> None:
    show.table("", columns, rows)
    show.result({what: [dict(zip(columns, row, strict=True)) for row in rows]})


def _runs(folder: Path) -> list[list[str]]:
    rows = []
    for path in sorted(folder.glob("*/recipe.yaml")):
        result = path.with_name("result.json")
        if result.exists():
            r: dict[str, Any] = json.loads(result.read_text())
            rows.append([r["run"], r["model"], r["bits"], r["method"], f"{r['best']['top1']:.2f}", str(r["best"]["epoch"] + 1)])
        else:
            rows.append([str(path.parent), "", "", "", "unfinished", ""])
    return rows


def cp(
    name: Annotated[str, typer.Argument(help="A shipped recipe.")],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new file, or a folder.")],
) -> None:
    """Copy a shipped recipe, to edit it."""
    from nulsq_cli import recipe
    from nulsq_cli.files import write_text

    source = recipe.recipe_path(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise InputError("exists already", where=target, fix="choose another name")
    text = source.read_text(encoding="utf-8")
    # What a shipped recipe extends lies beside it, not beside the copy; so the copy is the resolved one.
    write_text(target, recipe.load(name).to_yaml() if "extends:" in text else text)
    typer.echo(f"{target}: run it with `nulsq finetune {target}`")


def cat(
    name: Annotated[str, typer.Argument(help="A recipe name or file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="With everything it extends and all defaults.")] = False,
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
) -> None:
    """Print a recipe."""
    from nulsq_cli import recipe

    if origin:
        for key, where in recipe.origins(name).items():
            typer.echo(f"{key}: {where}")
    elif resolved:
        typer.echo(recipe.load(name).to_yaml(), nl=False)
    else:
        typer.echo(recipe.recipe_path(name).read_text(encoding="utf-8"), nl=False)


def doctor(as_json: Json = False, no_color: NoColor = False) -> None:
    """Versions, devices, compiler and disk: what to paste into a bug report."""
    import shutil

    from nulsq_cli import jobs

    found = jobs.environment()
    found["compiler"] = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    found["free_disk"] = size(shutil.disk_usage(".").free)
    for extra in ("matplotlib", "onnxruntime", "openvino"):
        try:
            found[extra] = __import__(extra).__version__
        except ImportError:
            found[extra] = None
    show = Show(as_json=as_json, color=not no_color)
    show.table("", ["", ""], [[key, "not found" if value is None else str(value)] for key, value in found.items()])
    show.result(found)


COMMANDS: dict[str, Callable[..., None]] = {
    "eval": evaluate, "export": export, "entropy": entropy, "validate": validate, "ls": ls, "cp": cp, "cat": cat,
    "doctor": doctor,
}  # fmt: skip
