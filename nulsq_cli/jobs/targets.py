"""What can be done with a run, a packed file or a float model: evaluate, export, entropy, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli import artifact, recipe, session
from nulsq_cli.convert import make_plan
from nulsq_cli.errors import CheckFailedError, InputError, UsageError
from nulsq_cli.exporters import EXPORTED
from nulsq_cli.files import write_json
from nulsq_cli.models import create_float_model, list_models
from nulsq_cli.report import entropy as entropy_report
from nulsq_cli.training import datasets, transforms
from nulsq_cli.training.threads import settle_threads, threads_kept
from nulsq_cli.training.world import World, join
from nulsq_cli.version import __version__


@threads_kept()
def evaluate(target: str, r: recipe.Recipe | None, given: dict[str, Any], *, runtime: str | None = None,
             show: Any) -> dict[str, Any]:  # fmt: skip
    """Accuracy of a run, a packed file, an exported file, or (with `r` alone) a float model.

    Args:
        target: run folder or file; a name when `r` names a float model.
        r: a recipe for a float model; None for the other kinds, which carry their own.
        given: keys of the recipe's data section that the user gave instead.
        runtime: that an exported file is run in; None is the first that reads it.
    """
    if r is not None:
        model, kind, config, used = session.float_model(r), "float", None, r
    else:
        model, kind, used, config = session.target_model(target, runtime)
        if used is None:
            used = recipe.load("imagenet")
    given = {key: value for key, value in given.items() if value is not None}
    used = recipe.with_values(used, {f"data.{key}": value for key, value in given.items()})
    world = join(used.engine.device)
    model.to(world.device)
    config = session.data_config(used, model) if config is None else {**config, **{k: v for k, v in given.items() if k in config}}
    split = session.open_split(used, used.data.val_split, config["input_size"][0])
    if (remark := datasets.check_outputs(split, model.num_classes)) is not None:
        show.say(f"  ! {remark}", "yellow")
    settle_threads(model, config["input_size"], used.data.batch_size)
    _, transform = transforms.build_transforms(config)
    score = session.score(model, split, transform, world, used)
    with show.outcome():
        show.score(target, score.top1, score.top5, score.samples)
    found = {"target": target, "kind": kind, "top1": score.top1, "top5": score.top5, "loss": score.loss, "samples": score.samples}
    return {**found, "runtime": model.runtime} if kind in EXPORTED else found


def check_top1(top1: float, least: float | None, where: Any) -> None:
    """The user's accuracy gate.

    Raises:
        CheckFailedError: `top1` is below `least`.
    """
    if least is not None and top1 < least:
        raise CheckFailedError(f"top-1 is {top1:.2f} %, below the {least:g} % that were asked for", where=where,
                               fix="train longer, choose more bits, or lower --min-top1")  # fmt: skip


def export(folder: Path, path: Path | None, *, show: Any, model: nn.Module | None = None) -> dict[str, Any]:
    """Write the packed file of a run, read it back into a fresh model, and compare the two.

    Raises:
        CheckFailedError: the file does not compute what the run computes; it is removed.
    """
    run = session.read_run(folder)
    if run.plan is None or all(not p.quantized for p in run.plan.layers):
        raise UsageError("is a float run, there is nothing to pack", where=folder, fix="fine-tune with --bits 3/3")
    model = (model or run.model()).cpu().to(memory_format=torch.contiguous_format).eval()
    info = run.info()
    config = info["data_cfg"]
    images, real = some_images(run.recipe, config)
    # Noise would do for comparing outputs, but its histogram says nothing about this network.
    counts = entropy_report.count_activations(model, images) if real else {}
    if not real:
        show.say("  the run's images are not at hand: verified on noise, activation codes not counted")
    meta = {
        "producer": f"nulsq {__version__}", "arch": info["architecture"], "arch_name": info["name"],
        "arch_kwargs": {k: v for k, v in info["arguments"].items() if k != "num_classes"},
        "num_classes": info["arguments"]["num_classes"], "data_cfg": info["data_cfg"],
        "bits": str(run.recipe.quant.bits), "method": run.recipe.quant.method, "counts": counts,
        "recipe": run.recipe.to_yaml(),
    }  # fmt: skip
    path = path or folder / "export" / "model.safetensors"
    sizes = artifact.save(path, model, meta)
    fresh, _ = artifact.load(path)
    verified = _compare(model, fresh, images)
    if verified["max_abs_diff"] > 0:
        path.unlink()
        raise CheckFailedError(f"the packed file differs from the run by {verified['max_abs_diff']:.3g}", where=path)
    show.say(f"  packed {size_line(sizes)} · verified on {verified['samples']} images: outputs equal")
    show.say(f"  {path}")
    return {
        "path": str(path), "format": "safetensors", "bytes": sizes.file, "float_bytes": sizes.float_model,
        "packed_weight_bytes": sizes.packed_weights, "ideal_weight_bytes": sizes.ideal_weights, "verified": verified,
    }  # fmt: skip


def size_line(sizes: artifact.Sizes) -> str:
    """File size against the float model's."""
    return f"{sizes.file / 1000:.1f} kB, {sizes.float_model / sizes.file:.1f}× smaller than {sizes.float_model / 1000:.1f} kB"


def some_images(r: recipe.Recipe, config: dict[str, Any]) -> tuple[list[Tensor], bool]:
    """Up to 256 training images and True, or noise of the right size and False where the data are not at hand."""
    try:
        dataset = session.open_split(r, r.data.train_split, config["input_size"][0])
    except (InputError, UsageError):
        noise = torch.Generator().manual_seed(0)
        return [torch.randn(64, *config["input_size"], generator=noise)], False
    _, transform = transforms.build_transforms(config)
    start, _ = session.chunks(dataset, transform, 256, World(0, 1, torch.device("cpu")), r)
    return [images for _, images in start()], True


@torch.no_grad()
def _compare(model: nn.Module, fresh: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    worst, same, total = 0.0, 0, 0
    for images in batches:
        a, b = model(images), fresh(images)
        difference = (a - b).abs().max().item()
        worst = max(worst, float("inf") if difference != difference else difference)
        same += int((a.argmax(1) == b.argmax(1)).sum())
        total += len(images)
    return {"samples": total, "max_abs_diff": worst, "top1_agreement": 100 * same / max(total, 1)}


def entropy(targets: list[str], folder: Path | None, *, show: Any) -> dict[str, Any]:
    """Code histograms, entropies and levels of runs and packed files; with a folder also JSON and pictures."""
    found = []
    for target in targets:
        path = Path(target)
        kind = session.kind_of(target)
        if kind in EXPORTED:
            raise UsageError("is an exported file; entropy is that of runs and packed files", where=target,
                             fix="name the run, or its export/model.safetensors")  # fmt: skip
        if kind == "run":
            path = path / "export" / "model.safetensors"
            if not path.exists():
                raise InputError("has no packed file yet", where=target, fix=f"run `nulsq export {target}`")
        found.append({**entropy_report.of_artifact(artifact.read(path)), "target": target})
    with show.outcome():
        for entry in found:
            rows = [
                [r["name"], r["tensor"], str(r["bits"]), f"{r['levels_used']}/{len(r['levels'])}", f"{r['entropy']:.3f}",
                 f"{100 * r['entropy'] / r['bits']:.0f} %"] for r in entry["layers"]
            ]  # fmt: skip
            columns = ["layer", "tensor", "bits", "levels used", "entropy", "of its bits"]
            show.table(f"{entry['target']}  {entry['bits']} {entry['method']}", columns, rows, right={2, 3, 4, 5})
            for tensor in ("weight", "activation"):
                mean = entry[f"mean_{tensor}_entropy"]
                if mean is not None:
                    show.say(f"  mean {tensor} entropy {mean:.3f} bits (layers at {entry['bits']})")
    result = {"targets": found}
    if folder is not None:
        write_json(folder / "entropy.json", result)
        from nulsq_cli.report import plots

        for suffix in ("png", "svg"):
            plots.entropy(found, folder / f"entropy.{suffix}")
        show.say(f"  wrote {folder}/entropy.json, entropy.png, entropy.svg")
    return result


def plan(r: recipe.Recipe, *, show: Any) -> dict[str, Any]:
    """What would be quantized, how, and why. Weights are not needed, nothing is downloaded or trained."""
    m = r.model
    model = create_float_model(m.name, checkpoint=m.initial_checkpoint, num_classes=m.num_classes,
                               in_chans=m.in_chans, kwargs=m.kwargs)  # fmt: skip
    config = session.data_config(r, model)
    found = make_plan(model, session.policy(r), config["input_size"]).to_json()
    with show.outcome():
        show.heading(f"{session.float_info(model)['resolved']}, {r.quant.bits}, {r.quant.method}")
        show.plan(found)
    show.say("  the sign of inputs is that of a pass of noise; fine-tuning measures it on data")
    return found


def models(pattern: str) -> list[str]:
    """Names that --model takes."""
    return list_models(pattern)
