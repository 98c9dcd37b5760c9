"""`nulsq finetune`: from a float model to a run folder with a packed, verified file."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import timm.layers
import timm.task
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from nulsq_cli import calibrate, recipe, session
from nulsq_cli.convert import Plan, convert, make_plan, with_signs
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.files import make_folder, read_json, remove_leftovers, write_atomically, write_json, write_text
from nulsq_cli.jobs.environment import environment
from nulsq_cli.jobs.logs import Logs
from nulsq_cli.jobs.targets import check_top1, export
from nulsq_cli.models import create_float_model
from nulsq_cli.ops import fused
from nulsq_cli.training import checkpoint, data, datasets, transforms
from nulsq_cli.training.engine import Settings, Trainer
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World, join
from nulsq_cli.values import Score

WORTH_COMPILING = 3e7
"""Pixels that a run has to see before compiling the quantizers (about 30 s, once) pays."""


def finetune(r: recipe.Recipe, folder: Path | None, *, resume: str | None, export_after: bool, dry_run: bool,
             min_top1: float | None, show: Any) -> dict[str, Any]:  # fmt: skip
    """Fine-tune as the recipe says, and leave a run folder with a packed, verified file.

    Raises:
        NulsqError: any expected failure, by its own class.
    """
    started = time.monotonic()
    world = join(r.engine.device)
    torch.use_deterministic_algorithms(r.engine.deterministic)
    if not world.primary:
        show.quiet, show.as_json = True, False
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
    datasets.check_enough_outputs(splits.train, model.num_classes)
    model.to(world.device, memory_format=session.memory_format(r))
    plan = make_plan(model, session.policy(r), config["input_size"])
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
    _choose_quantizer_speed(r, splits, config, show)
    show.say(f"  {session.float_info(model)['resolved']} · {len(splits.train)} training images"
             f" · {len(splits.validation)} in split {r.data.val_split!r} · {world.device}")  # fmt: skip
    known = read_json(folder / "start.json") if resumed else None
    start: dict[str, Score] = {} if known is None else {k: Score(**v) for k, v in known.items()}
    if known is None:
        start["float"] = session.score(model, splits.validation, splits.eval_transform, world, r)
    show.score("float", start["float"].top1, start["float"].top5, start["float"].samples)

    stored = Plan.from_json(read_json(folder / "plan.json")) if resumed else None
    if stored is not None:
        _same_plan(plan, stored, r)
        _same_stabilizers(recipe.load(folder / "recipe.yaml"), r)
        plan = stored
    if not is_float:
        plan = _quantize(r, model, plan, splits, world, show, measured=stored is None)
    model.to(world.device, memory_format=session.memory_format(r))
    if known is None:
        start["init"] = start["float"] if is_float else session.score(model, splits.validation, splits.eval_transform, world, r)
    if not is_float:
        show.score("before training", start["init"].top1, start["init"].top5, start["init"].samples)
    if world.primary and not resumed:
        _write_start(folder, r, model, config, plan, start)

    trainer = _trainer(r, model, teacher, splits, world, folder, show)
    if resumed:
        trainer.restore(resumed)
        trainer.watcher.write(trainer.progress.rows)  # whatever was killed between the checkpoint and the logs
        show.say(f"  resumed from {resumed.path.name}: epoch {trainer.progress.epoch + 1}, batch {trainer.progress.batch}")
    else:
        trainer.save("last")
    if r.schedule.epochs:
        show.heading(f"Fine-tuning for {r.schedule.epochs} epochs")
        show.chosen_on = "held-out " if splits.held is not None else ""
        show.start_training(r.schedule.epochs, trainer.batches, trainer.progress.epoch * trainer.batches + trainer.progress.batch)
        try:
            trainer.run()
        finally:
            show.stop_training()
    return _finish(r, folder, trainer, splits, plan, start, world, show, export_after, min_top1, started)


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


def _choose_quantizer_speed(r: recipe.Recipe, splits: session.Splits, config: dict[str, Any], show: Any) -> None:
    pixels = len(splits.train) * r.schedule.epochs * config["input_size"][1] * config["input_size"][2]
    wanted = pixels > WORTH_COMPILING if r.engine.compile == "auto" else bool(r.engine.compile)
    if wanted and str(r.quant.bits) != "32/32":
        show.say("  compiling the quantizers ...")
    fused.use(wanted and str(r.quant.bits) != "32/32")


def _teacher(r: recipe.Recipe, model: nn.Module, config: dict[str, Any]) -> nn.Module | None:
    if r.teacher.name is None:
        return None
    if r.teacher.name == "self":
        return session.copy_of(model)
    return create_float_model(r.teacher.name, pretrained=r.teacher.checkpoint is None, checkpoint=r.teacher.checkpoint,
                              num_classes=model.num_classes, in_chans=config["input_size"][0])  # fmt: skip


def _same_plan(now: Plan, stored: Plan, r: recipe.Recipe) -> None:
    """A resumed run keeps its plan; signs were measured, so they are the stored ones."""
    key = lambda p: (p.weight_bits, p.input_bits, p.granularity, p.method, p.shape)  # noqa: E731
    before = {p.name: key(p) for p in stored.layers}
    after = {p.name: key(p) for p in now.layers}
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    if changed or now.options != stored.options:
        listed = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise UsageError(f"the run was made with another plan; it differs in {listed or 'the method options'}",
                         fix="resume with the bits, method and rules of the run, or start a new one with -o")  # fmt: skip


def _same_stabilizers(before: recipe.Recipe, now: recipe.Recipe) -> None:
    """What stabilizers remember was counted under their options."""
    if before.quant.stabilizers != now.quant.stabilizers:
        names = ", ".join(s.name for s in before.quant.stabilizers) or "none"
        raise UsageError(f"the run was made with other stabilizers, or other options of them ({names})",
                         fix="resume with the quant.stabilizers of the run, or start a new one with -o")  # fmt: skip


def _quantize(r: recipe.Recipe, model: nn.Module, plan: Plan, splits: session.Splits, world: World, show: Any, *,
              measured: bool) -> Plan:  # fmt: skip
    """Convert the model in place; a new run also measures, starts its steps and re-estimates BatchNorm."""
    if not measured:
        convert(model, plan)
        return plan
    show.heading(f"Quantizing to {r.quant.bits} with {r.quant.method}")
    q = r.quant
    passes = session.chunks(splits.train, splits.eval_transform, q.calibration.samples, world, r)
    stats = calibrate.measure_inputs(model, calibrate.layers_to_measure(plan), *passes, world.reduce)
    plan = with_signs(plan, {name: bool(s.least[0] < 0) for name, s in stats.items()}, session.policy(r))
    show.plan(plan.to_json())
    convert(model, plan)
    calibrate.initialize(model, stats, q.init.weights, q.init.activations)
    calibrate.match_output_scales(model, *passes, world.reduce)
    if r.bn.reestimate_samples:
        passes = session.chunks(splits.train, splits.eval_transform, r.bn.reestimate_samples, world, r)
        count = calibrate.reestimate_batchnorm(model, *passes, world.reduce)
        show.say(f"  steps started from {min(q.calibration.samples, len(splits.train))} images"
                 f" ({q.init.weights} weights, {q.init.activations} activations), {count} BatchNorms re-estimated")  # fmt: skip
    return plan


def _write_start(folder: Path, r: recipe.Recipe, model: nn.Module, config: dict[str, Any], plan: Plan,
                 start: dict[str, Score]) -> None:  # fmt: skip
    write_json(folder / "plan.json", plan.to_json())
    write_json(folder / "model.json", session.describe_model(model, config))
    write_json(folder / "env.json", environment())
    write_json(folder / "start.json", {key: vars(value) for key, value in start.items()})
    write_text(folder / "recipe.yaml", r.to_yaml())


def _trainer(r: recipe.Recipe, model: nn.Module, teacher: nn.Module | None, splits: session.Splits, world: World,
             folder: Path, show: Any) -> Trainer:  # fmt: skip
    d, a, e = r.data, r.data.augment, r.engine
    if e.sync_bn and world.size > 1:
        timm.layers.convert_sync_batchnorm(model)
    steady = session.stabilizers(r, model)  # before anything copies or wraps the model: some add buffers to its layers
    loader = data.train_loader(splits.train, splits.train_transform, batch_size=d.batch_size, seed=r.seed, workers=d.workers,
                               rank=world.rank, world=world.size, pin_memory=d.pin_mem)  # fmt: skip
    loader.set_epoch(0)
    batches = int(world.reduce(torch.tensor(len(loader)), "min"))  # streams may be dealt out unevenly
    updates = -(-batches // e.grad_accum_steps)
    pair = Pair(model, r.optimizer.weights.model_dump(), r.optimizer.steps.model_dump(), r.schedule.model_dump(),
                r.schedule.epochs, max(updates, 1))  # fmt: skip
    mixup = transforms.build_mixup(
        model.num_classes, mixup=a.mixup, cutmix=a.cutmix, mixup_prob=a.mixup_prob, mixup_mode=a.mixup_mode,
        mixup_switch_prob=a.mixup_switch_prob, smoothing=a.smoothing, batch_size=d.batch_size,
    )  # fmt: skip
    if mixup is not None:
        criterion: nn.Module = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(a.smoothing) if a.smoothing else nn.CrossEntropyLoss()
    if teacher is None:
        task = timm.task.ClassificationTask(model, criterion, device=world.device, verbose=False)
    else:
        task = timm.task.LogitDistillationTask(
            model, teacher.to(world.device), criterion, distill_loss_weight=r.teacher.weight,
            task_loss_weight=r.teacher.task_weight, temperature=r.teacher.temperature, device=world.device, verbose=False,
        )  # fmt: skip
    task.to(world.device)
    if world.size > 1:
        task.prepare_distributed(device_ids=[world.device.index] if world.device.type == "cuda" else None)

    def batches_of(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.set_epoch(epoch, first * d.batch_size * world.size)
        return iter(loader)

    settings = Settings(
        epochs=r.schedule.epochs, seed=r.seed, batch_size=d.batch_size * world.size, dist_bn=e.dist_bn,
        grad_accum_steps=e.grad_accum_steps, clip_grad=r.optimizer.clip_grad,
        clip_mode=r.optimizer.clip_mode, amp=session.amp_type(r), memory_format=session.memory_format(r),
        ema_decay=r.ema.decay if r.ema.enabled else None,
        ema_warmup=r.ema.warmup, bn_freeze_after=r.bn.freeze_after, mixup_off_epoch=a.mixup_off_epoch,
        log_interval=r.log.interval, recovery_seconds=60 * r.checkpoint.recovery_minutes,
        recovery_steps=r.checkpoint.recovery_steps,
    )  # fmt: skip
    chosen = splits.held or splits.validation
    logs = Logs(folder, show, world.primary)
    return Trainer(task, model, pair, world, settings, folder / "checkpoints", batches_of, batches,
                      lambda m: session.score(m, chosen, splits.eval_transform, world, r), logs, mixup, steady)  # fmt: skip


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
        "epochs": r.schedule.epochs, "seed": r.seed, "seconds": round(time.monotonic() - started, 1),
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
    samples = start["float"].samples
    show.score("float", result["float"]["top1"], result["float"]["top5"], samples)
    if str(result["bits"]) != "32/32":
        show.score(f"{result['bits']} before training", result["init"]["top1"], result["init"]["top5"], samples)
    if result["epochs"]:
        show.score(f"{result['bits']} best, epoch {result['best']['epoch'] + 1}", result["best"]["top1"],
                   result["best"]["top5"], samples)  # fmt: skip
    show.say(f"  chosen on {result['chosen_on']} · seed {result['seed']} · {result['seconds']:.0f} s · {result['run']}")
    if result["artifact"]:
        show.heading("What next")
        show.say(f"  nulsq eval {result['artifact']}")
        show.say(f"  nulsq entropy {result['run']} -o {result['run']}")
        show.say(f"  nulsq finetune ... --resume auto -o {result['run']}   # goes on if it was interrupted")
