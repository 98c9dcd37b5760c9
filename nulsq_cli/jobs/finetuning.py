"""`nulsq finetune`: from a float model to a run folder with a packed, verified file."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from nulsq_cli import recipe, session
from nulsq_cli.convert import Plan, convert, make_plan
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.files import make_folder, read_json, remove_leftovers, write_atomically, write_json, write_text
from nulsq_cli.jobs.environment import environment
from nulsq_cli.jobs.quantizing import quantize, same_run
from nulsq_cli.jobs.stretches import Stretch, check_training, hold_still, short_warmup, stretches
from nulsq_cli.jobs.stretches import trainer as stretch_trainer
from nulsq_cli.jobs.targets import check_top1, export
from nulsq_cli.models import create_float_model
from nulsq_cli.ops import fast
from nulsq_cli.training import checkpoint, datasets
from nulsq_cli.training.compiled import compile_whole
from nulsq_cli.training.engine import Trainer
from nulsq_cli.training.state import misfit, position
from nulsq_cli.training.threads import settle_threads, threads_kept
from nulsq_cli.training.world import World, compute_the_same, join
from nulsq_cli.values import Score

WORTH_COMPILING = 3e7
"""Pixels that a run has to see before compiling the quantizers for an accelerator (about 30 s) pays."""


@threads_kept()
def finetune(r: recipe.Recipe, folder: Path | None, *, resume: str | None, export_after: bool, dry_run: bool,
             min_top1: float | None, show: Any) -> dict[str, Any]:  # fmt: skip
    """Fine-tune as the recipe says, and leave a run folder with a packed, verified file.

    Raises:
        NulsqError: any expected failure, by its own class.
    """
    started = time.monotonic()
    compute_the_same(r.engine.deterministic)
    world = join(r.engine.device)
    if not world.primary:
        show.quiet, show.mute, show.as_json = True, True, False
    folder = world.share(_run_folder(r, folder, resume))
    if r.engine.sync_bn and world.size > 1 and world.device.type == "cpu":
        raise UsageError("engine.sync_bn: torch synchronizes BatchNorm on GPUs only", fix="leave out --sync-bn")

    show.heading(f"Model {r.model.name}")
    torch.manual_seed(r.seed)
    with world.one_first():
        model = session.float_model(r)
        config = session.data_config(r, model)
        splits = session.open_splits(r, config)
        teacher = _teacher(r, model, config)
    remark = datasets.check_outputs(splits.train, model.num_classes)
    check_training(r, splits, world)
    model.to(world.device, memory_format=session.memory_format(r))
    plan = make_plan(model, session.policy(r), config["input_size"])  # it checks that the model takes images of this size
    settle_threads(model, config["input_size"], r.data.batch_size)
    is_float = all(not p.quantized for p in plan.layers)
    if dry_run:
        show.plan(plan.to_json())
        world.leave()
        return {"dry_run": True, "run": str(folder), "plan": plan.to_json()}

    if world.primary:
        make_folder(folder)
        remove_leftovers(folder)
        show.log_to(folder / "train.log")
    world.wait()
    if not folder.is_dir():
        raise InputError("is not the same folder on all machines of this run", where=folder,
                         fix="choose one on storage that they share, with -o")  # fmt: skip
    resumed = checkpoint.latest(folder / "checkpoints", show.say) if resume else None
    _choose_quantizer_speed(r, splits, config, world, show)
    show.say(f"  {session.float_info(model)['resolved']} · {len(splits.train)} training images"
             f" · {len(splits.validation)} in split {r.data.val_split!r} · {world.device}")  # fmt: skip
    if remark is not None:
        show.say(f"  ! {remark}", "yellow")
    known = _read_start(folder) if resumed else None
    start = known or {}
    if known is None:
        start["float"] = session.score(model, splits.validation, splits.eval_transform, world, r)
    show.score("float", start["float"].top1, start["float"].top5, start["float"].samples)

    way = stretches(r)
    # Where widths change on the way, later models are made from the float one again.
    skeleton = session.copy_of(model) if any(stretch.bits != r.quant.bits for stretch in way) else None
    if resumed:
        stored = Plan.from_json(read_json(folder / "plan.json"))
        same_run(plan, stored, r, recipe.load(folder / "recipe.yaml"))
        plan = stored
        if not is_float:
            convert(model, plan)
    elif not is_float:
        show.heading(f"Quantizing to {r.quant.bits} with {r.quant.method}")
        plan = quantize(r, model, plan, splits, world, show)
    model.to(world.device, memory_format=session.memory_format(r))
    if known is None:
        start["init"] = start["float"] if is_float else session.score(model, splits.validation, splits.eval_transform, world, r)
    if not is_float:
        show.score("before training", start["init"].top1, start["init"].top5, start["init"].samples)
    if world.primary and not resumed:
        _write_start(folder, r, model, config, plan, start)
    trainer = _train(r, way, model, skeleton, plan, teacher, splits, config, world, folder, resumed, show)
    return _finish(r, folder, trainer, splits, plan, start, world, show, export_after, min_top1, started)


def _train(r: recipe.Recipe, way: list[Stretch], model: nn.Module, skeleton: nn.Module | None, plan: Plan,
           teacher: nn.Module | None, splits: session.Splits, config: dict[str, Any], world: World, folder: Path,
           resumed: checkpoint.Saved | None, show: Any) -> Trainer:  # fmt: skip
    """Run all stretches, from the one in which a resumed run stood."""
    stood = position(resumed) if resumed else None
    at = stood.notes.get("stretch", 0) if stood else 0
    if at >= len(way):
        raise misfit(resumed.path, ValueError(f"it stands in stretch {at + 1} of {len(way)}"))
    epochs, before = way[-1].end, None
    if epochs:
        show.heading(f"Fine-tuning for {epochs} epochs" + (f", {r.scheme_name}" if r.scheme_name != "plain" else ""))
        show.chosen_on = "held-out " if splits.held is not None else ""
        if (sentence := short_warmup(r, way)) is not None:
            show.say(sentence, "yellow")
    for number, stretch in enumerate(way):
        if number < at:
            continue
        here = resumed if number == at else None
        if len(way) > 1 or len(stretch.phases) > 1:
            words = ", ".join(f"{phase.name} ({phase.epochs})" for phase in stretch.phases)
            show.say(f"  from epoch {stretch.first + 1}, at {stretch.bits}: {words}")
        now = model if before is None else before.model
        if skeleton is not None and (before is None or stretch.bits != way[number - 1].bits):
            now = _at_width(r, stretch, now, skeleton, plan, splits, config, world, show, start=here is None)
        progress = stood if here else before.progress if before else None
        stopped = hold_still(now, stretch.phases[0], progress.notes.get("instability", {}) if progress else {})
        if r.engine.compile == "model":
            compile_whole(now)
        trainer = stretch_trainer(r, stretch, now, teacher, splits, config, world, folder, show)
        if here:
            trainer.restore(here)
            _keep_changes(r, folder, world, show)
            trainer.watcher.write(trainer.progress)  # whatever was killed between the checkpoint and the logs
            show.say(f"  resumed from {here.path.name}: epoch {trainer.progress.epoch + 1}, batch {trainer.progress.batch}")
        else:
            if before is not None:
                old = before.progress
                trainer.progress = replace(old, batch=0, updates=0, loss_sum=0.0, notes={**old.notes, "stretch": number})
            trainer.save("last")
        show.start_training(epochs, trainer.batches, trainer.progress.epoch * trainer.batches + trainer.progress.batch)
        try:
            trainer.run()
        finally:
            show.stop_training()
        if (watch := trainer.also.get("instability")) is not None:
            trainer.progress.notes["instability"] = world.share(watch.scores())  # each process saw its own images
            watch.close()
        for parameter in stopped:
            parameter.requires_grad_(True)
        before = trainer
    return before


def _at_width(r: recipe.Recipe, stretch: Stretch, model: nn.Module, skeleton: nn.Module, plan: Plan, splits: session.Splits,
              config: dict[str, Any], world: World, show: Any, *, start: bool) -> nn.Module:  # fmt: skip
    """The model with its present weights and its quantizers at the widths of a stretch; see `quantize` for their start."""
    fresh = session.copy_of(skeleton)
    own = fresh.state_dict().keys()
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if key in own})
    wanted = make_plan(fresh, replace(session.policy(r), bits=stretch.bits), config["input_size"])
    signs = {p.name: bool(p.signed) for p in plan.layers}
    wanted = replace(wanted, layers=tuple(replace(p, signed=signs[p.name]) for p in wanted.layers))
    if any(p.quantized for p in wanted.layers):
        if start:
            quantize(r, fresh, wanted, splits, world, show, before=model)
        else:
            convert(fresh, wanted)
    return fresh.to(world.device, memory_format=session.memory_format(r))


def _run_folder(r: recipe.Recipe, folder: Path | None, resume: str | None) -> Path:
    if resume not in (None, "auto"):
        folder = Path(resume)
        if not (folder / "recipe.yaml").exists():
            raise InputError("holds no run to resume", where=folder, fix="see `nulsq ls runs`")
    if folder is None:
        if resume == "auto":
            raise UsageError("--resume auto needs the run folder", fix="name it with -o DIR")
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        bits = str(r.quant.bits).replace("/", "a")
        name = r.output.experiment or re.sub(r"[^\w.-]+", "_", r.model.name)
        folder = Path(r.output.dir) / f"{stamp}-{name}-w{bits}"
    if (folder / "recipe.yaml").exists() and resume is None:
        raise UsageError("already holds a run", where=folder,
                         fix="choose another folder with -o, or go on with --resume auto")  # fmt: skip
    if folder.exists() and not folder.is_dir():
        raise InputError("is not a folder", where=folder)
    return folder


def _keep_changes(r: recipe.Recipe, folder: Path, world: World, show: Any) -> None:
    """Say what a run that goes on does differently from now on; its recipe is what runs now."""
    if not world.primary:
        return
    path = folder / "recipe.yaml"
    changed = recipe.differences(recipe.load(path), r)
    for key, (old, new) in changed.items():
        show.say(f"  ! changed since the run began: {key}: {old} -> {new}", "yellow")
    if changed:
        write_text(path, r.to_yaml(), parents=False)


def _choose_quantizer_speed(r: recipe.Recipe, splits: session.Splits, config: dict[str, Any], world: World, show: Any) -> None:
    """C++ loops on CPUs, built once on a machine; on accelerators torch compiles some for this run, where that pays."""
    pixels = len(splits.train) * r.schedule.epochs * config["input_size"][1] * config["input_size"][2]
    worth = r.engine.compile is True or (r.engine.compile == "auto" and pixels > WORTH_COMPILING)
    compiled = world.device.type != "cpu" and worth
    if compiled and str(r.quant.bits) != "32/32":
        show.say("  compiling the quantizers ...")
    with world.one_first():
        fast.use(r.engine.compile is not False, accelerators=compiled)


def _teacher(r: recipe.Recipe, model: nn.Module, config: dict[str, Any]) -> nn.Module | None:
    if r.teacher.name is None:
        return None
    if r.teacher.name == "self":
        return session.copy_of(model)
    return create_float_model(r.teacher.name, pretrained=r.teacher.checkpoint is None, checkpoint=r.teacher.checkpoint,
                              num_classes=model.num_classes, in_chans=config["input_size"][0])  # fmt: skip


def _write_start(folder: Path, r: recipe.Recipe, model: nn.Module, config: dict[str, Any], plan: Plan,
                 start: dict[str, Score]) -> None:  # fmt: skip
    write_json(folder / "plan.json", plan.to_json())
    write_json(folder / "model.json", session.describe_model(model, config))
    write_json(folder / "env.json", environment())
    write_json(folder / "start.json", {key: vars(value) for key, value in start.items()})
    write_text(folder / "recipe.yaml", r.to_yaml())


def _read_start(folder: Path) -> dict[str, Score]:
    path = folder / "start.json"
    try:
        found = {key: Score(**value) for key, value in read_json(path).items()}
        return {key: found[key] for key in ("float", "init")}
    except (AttributeError, TypeError, KeyError) as reason:
        raise InputError("is damaged: it has no accuracies", where=path, fix="restore it, or start a new run with -o") from reason


def _finish(r: recipe.Recipe, folder: Path, trainer: Trainer, splits: session.Splits, plan: Plan, start: dict[str, Score],
            world: World, show: Any, export_after: bool, min_top1: float | None, started: float) -> dict[str, Any]:  # fmt: skip
    show.heading("Result")
    best, last = trainer.progress.best, start["init"]
    if trainer.progress.rows:
        if splits.held is not None:
            last = session.score(trainer.candidate, splits.validation, splits.eval_transform, world, r)
        else:
            row = trainer.progress.rows[-1]
            last = Score(row["eval_top1"], row["eval_top5"], row["eval_loss"], len(splits.validation))
    world.leave()
    model = session.read_run(folder).model().to(world.device) if world.primary else None
    best_score = {"top1": last.top1, "top5": last.top5, "epoch": -1}
    if best is not None:
        best_score = dict(best)
        if splits.held is not None and model is not None:
            found = session.score(model, splits.validation, splits.eval_transform, World(0, 1, world.device), r)
            best_score |= {"top1": found.top1, "top5": found.top5}
    result: dict[str, Any] = {
        "run": str(folder), "artifact": None, "model": r.model.name, "bits": str(r.quant.bits), "method": r.quant.method,
        "grid": r.quant.grid, "epochs": stretches(r)[-1].end, "seed": r.seed, "seconds": round(time.monotonic() - started, 1),
        "float": _percent(start["float"]), "init": _percent(start["init"]), "best": best_score, "last": _percent(last),
        "chosen_on": f"{r.data.hold_out:g} of split {r.data.train_split!r}, held out" if splits.held is not None
        else f"split {r.data.val_split!r}",
        "went_back": trainer.progress.notes.get("went_back"),
    }  # fmt: skip
    if not world.primary:
        return result
    if r.export and export_after and not any(p.quantized for p in plan.layers):
        weights = folder / "export" / "float.safetensors"
        content = safetensors.torch.save({k: v.cpu().contiguous() for k, v in model.state_dict().items()})
        write_atomically(weights, lambda temporary: temporary.write_bytes(content))
        show.say(f"  float weights, for --initial-checkpoint: {weights}")
    elif r.export and export_after:
        written = export(folder, folder / "export" / "model.safetensors", show=show, model=model)
        result["artifact"] = written["path"]
    result["seconds"] = round(time.monotonic() - started, 1)
    write_json(folder / "result.json", result, parents=False)
    _say_result(result, start, show)
    check_top1(result["best"]["top1"], min_top1, folder)
    return result


def _percent(score: Score) -> dict[str, float]:
    return {"top1": score.top1, "top5": score.top5}


def _say_result(result: dict[str, Any], start: dict[str, Score], show: Any) -> None:
    with show.outcome() as alone:
        _say_scores(result, start, show)
        if alone and result["artifact"]:
            show.say(f"  {result['artifact']}")
    if result["artifact"]:
        show.heading("What next")
        show.say(f"  nulsq eval {result['artifact']}")
        show.say(f"  nulsq entropy {result['run']} -o {result['run']}")
        show.say(f"  nulsq finetune --resume {result['run']}   # goes on if it was interrupted")


def _say_scores(result: dict[str, Any], start: dict[str, Score], show: Any) -> None:
    samples = start["float"].samples
    show.score("float", result["float"]["top1"], result["float"]["top5"], samples)
    if str(result["bits"]) != "32/32":
        show.score(f"{result['bits']} before training", result["init"]["top1"], result["init"]["top5"], samples)
    if result["epochs"]:
        show.score(f"{result['bits']} best, epoch {result['best']['epoch'] + 1}", result["best"]["top1"],
                   result["best"]["top5"], samples)  # fmt: skip
    show.say(f"  chosen on {result['chosen_on']} · seed {result['seed']} · {result['seconds']:.0f} s · {result['run']}")
