"""`nulsq finetune` and `nulsq plan`: a recipe, timm's flags on top of it, and trailing key.path=value."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from nulsq_cli.cli.everywhere import SEVERAL, Json, NoColor, Quiet, numbers
from nulsq_cli.cli.launch import inside_a_launch, launch
from nulsq_cli.cli.show import Show
from nulsq_cli.errors import InputError, UsageError

# (flag, recipe key, type, help): timm's spelling wherever timm has the flag.
FLAGS: list[tuple[str, str, Any, str]] = [
    ("--model", "model.name", str, "A timm model name, or one of ours: `nulsq ls models`."),
    ("--pretrained", "model.pretrained", bool, "Download the model's weights."),
    ("--initial-checkpoint", "model.initial_checkpoint", str, "A float checkpoint on disk."),
    ("--num-classes", "model.num_classes", int, "Number of classes."),
    ("--in-chans", "model.in_chans", int, "Channels of the images."),
    ("--bits", "quant.bits", str, "Weight/activation bits, each 2..8, or 32 for float."),
    ("--method", "quant.method", str, "nulsq-wa, lsq, pact ...: `nulsq ls methods`."),
    ("--stabilizer", "quant.stabilizers", list[str], "bin-reg, dampening or freezing; may be repeated: `nulsq ls stabilizers`."),
    ("--granularity", "quant.granularity", str, "Weight levels per `tensor` or per `channel`."),
    ("--grid", "quant.grid", str, "`int8`: levels on a scale times integers, as runtimes for int8 compute; or `float`."),
    ("--first-last", "quant.first_last.bits", str, "Bits of the first and the last layer."),
    ("--data-dir", "data.data_dir", str, "Folder of the data."),
    ("--dataset", "data.dataset", str, "timm dataset: torch/cifar10, hfds/..., wds/...; empty for a folder."),
    ("--train-split", "data.train_split", str, "Name of the training split."),
    ("--val-split", "data.val_split", str, "Name of the validation split."),
    ("--dataset-download", "data.download", bool, "Download the dataset."),
    ("--class-map", "data.class_map", str, "File that maps class names to numbers."),
    ("--hold-out", "data.hold_out", float, "Share of the training split on which the best epoch is chosen."),
    ("--input-size", "data.input_size", tuple[int, int, int], "Channels, height, width."),
    ("--mean", "data.mean", str, "Mean of each channel."),
    ("--std", "data.std", str, "Standard deviation of each channel."),
    ("--interpolation", "data.interpolation", str, "bilinear, bicubic ..."),
    ("--crop-pct", "data.crop_pct", float, "Centre crop of the evaluation."),
    ("--batch-size,-b", "data.batch_size", int, "Images per batch and process."),
    ("--validation-batch-size,-vb", "data.validation_batch_size", int, "The same in evaluation."),
    ("--workers,-j", "data.workers", int, "Loader processes."),
    ("--pin-mem", "data.pin_mem", bool, "Pin memory in the loader."),
    ("--hflip", "data.augment.hflip", float, "Chance of a horizontal flip."),
    ("--vflip", "data.augment.vflip", float, "Chance of a vertical flip."),
    ("--train-interpolation", "data.augment.train_interpolation", str, "Interpolation of training images, or random."),
    ("--color-jitter", "data.augment.color_jitter", float, "Strength of colour jitter."),
    ("--aa", "data.augment.aa", str, "timm's AutoAugment policy."),
    ("--reprob", "data.augment.reprob", float, "Chance of random erasing."),
    ("--mixup", "data.augment.mixup", float, "Mixup alpha."),
    ("--cutmix", "data.augment.cutmix", float, "CutMix alpha."),
    ("--mixup-prob", "data.augment.mixup_prob", float, "Chance of either."),
    ("--mixup-switch-prob", "data.augment.mixup_switch_prob", float, "Chance of CutMix where both are on."),
    ("--mixup-mode", "data.augment.mixup_mode", str, "batch, pair or elem."),
    ("--mixup-off-epoch", "data.augment.mixup_off_epoch", int, "No mixup from this epoch on; 0: always."),
    ("--smoothing", "data.augment.smoothing", float, "Label smoothing."),
    ("--no-aug", "data.augment.no_aug", bool, "No augmentation."),
    ("--opt", "optimizer.weights.opt", str, "timm optimizer of the weights; timm's `sgd` is Nesterov, `momentum` is not."),
    ("--lr", "optimizer.weights.lr", float, "Learning rate of the weights."),
    ("--weight-decay", "optimizer.weights.weight_decay", float, "Weight decay of the weights."),
    ("--momentum", "optimizer.weights.momentum", float, "Momentum of the weights."),
    ("--layer-decay", "optimizer.weights.layer_decay", float, "Factor of the rate from layer to layer, last to first."),
    ("--steps-opt", "optimizer.steps.opt", str, "timm optimizer of the steps."),
    ("--steps-lr", "optimizer.steps.lr", float, "Learning rate of the steps."),
    ("--steps-wd", "optimizer.steps.weight_decay", float, "Weight decay of the steps."),
    ("--clip-grad", "optimizer.clip_grad", float, "Clip the gradient of the weights."),
    ("--clip-mode", "optimizer.clip_mode", str, "norm, value or agc."),
    ("--sched", "schedule.sched", str, "timm schedule."),
    ("--epochs", "schedule.epochs", int, "Epochs; 0 stops after initialisation."),
    ("--warmup-epochs", "schedule.warmup_epochs", int, "Epochs of warm-up."),
    ("--warmup-lr", "schedule.warmup_lr", float, "Rate at the start of the warm-up."),
    ("--min-lr", "schedule.min_lr", float, "Rate at the end."),
    ("--model-ema", "ema.enabled", bool, "Average weights and steps, and export the average."),
    ("--model-ema-decay", "ema.decay", float, "Decay of the average."),
    ("--model-ema-warmup", "ema.warmup", bool, "Let the decay of the average grow."),
    ("--kd-model-name", "teacher.name", str, "Distill from a timm model, or from `self`, the float model."),
    ("--scheme", "scheme.name", str, "plain, kd, qkd or profit: `nulsq ls schemes`."),
    ("--kd-temperature", "teacher.temperature", float, "Temperature of the distillation."),
    ("--distill-loss-weight", "teacher.weight", float, "Weight of the distillation loss."),
    ("--task-loss-weight", "teacher.task_weight", float, "Weight of the loss on labels."),
    ("--amp", "amp", bool, "Autocast, to bfloat16 unless --amp-dtype says otherwise."),
    ("--amp-dtype", "engine.amp", str, "Autocast to bfloat16 or float16."),
    ("--grad-accum-steps", "engine.grad_accum_steps", int, "Batches per update."),
    ("--sync-bn", "engine.sync_bn", bool, "BatchNorm over the batches of all processes (GPUs only)."),
    ("--dist-bn", "engine.dist_bn", str, "What running statistics become after an epoch: reduce, broadcast or none."),
    ("--torchcompile", "torchcompile", bool, "Compile the whole network."),
    ("--channels-last", "engine.channels_last", bool, "NHWC memory: convolutions are often faster."),
    ("--device", "engine.device", str, "cpu, cuda ... (default: auto)."),
    ("--seed", "seed", int, "Seed of everything random."),
    ("--log-interval", "log.interval", int, "Updates between two lines."),
    ("--recovery-interval", "checkpoint.recovery_steps", str, "Between recovery checkpoints: 500 (updates) or 10m (minutes)."),
    ("--experiment", "output.experiment", str, "Name of the run folder."),
]  # fmt: skip

Items = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE] [KEY.PATH=VALUE]...",
        show_default=False,
        help="A recipe (`nulsq ls recipes`, or a file), then changes to it.",
    ),
]


def with_flags(command: Callable[..., None], leave_out: Collection[str] = ()) -> Callable[..., None]:
    """Add the flags above, but for some keys, to a command; it receives those that were given as `given`."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())
    added, keys = [], {}
    for spelling, key, kind, text in (flag for flag in FLAGS if flag[1] not in leave_out):
        name = key.replace(".", "_")
        keys[name] = (key, spelling.split(",")[0])
        wanted = f"{spelling}/--no-{spelling[2:]}" if kind is bool else spelling
        option = typer.Option(*wanted.split(","), help=text, show_default=False,
                              metavar="FLOAT..." if spelling in SEVERAL else None,
                              rich_help_panel=_PANELS.get(key.split(".")[0], "Other"))  # fmt: skip
        added.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None,
                                       annotation=Annotated[kind | None, option]))  # fmt: skip

    def run(**values: Any) -> None:
        given = {key: (flag, values.pop(name)) for name, (key, flag) in keys.items()}
        given = {k: (f, list(v) if isinstance(v, tuple) else v) for k, (f, v) in given.items() if v not in (None, ())}
        given |= {k: (f, numbers(f, v)) for k, (f, v) in given.items() if f in SEVERAL}
        command(**values, given=given)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature([p for p in own if p.name != "given"] + added)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in run.__signature__.parameters.values()}  # type: ignore[attr-defined]
    return run


_PANELS = {
    "model": "Model", "quant": "Quantization", "data": "Data", "optimizer": "Optimizers", "schedule": "Schedule",
    "teacher": "Distillation", "scheme": "Distillation", "ema": "Engine", "engine": "Engine", "amp": "Engine",
    "torchcompile": "Engine",
}  # fmt: skip


def read(items: list[str] | None, given: dict[str, tuple[str, Any]], resume: str | None = None) -> Any:
    """The recipe that the arguments name, else that of the run in `resume`, with their changes."""
    from nulsq_cli import recipe

    items = items or []
    name = items[0] if items and "=" not in items[0] else None
    changes = items[1:] if name is not None else items
    for item in changes:
        if "=" not in item:
            raise UsageError(f"got a second recipe, {item!r}", fix="give one recipe, then key.path=value")
    if name is None and resume not in (None, "auto"):
        name = Path(resume) / "recipe.yaml"
        if not name.exists():
            raise InputError("holds no run to resume", where=resume, fix="see `nulsq ls runs`")
    if name is None:
        name = "imagenet" if "model.name" in given else "quickstart"
    if "quant.stabilizers" in given:
        flag, names = given["quant.stabilizers"]
        given = {**given, "quant.stabilizers": (flag, [{"name": n} for n in names])}
    flag, interval = given.get("checkpoint.recovery_steps") or ("", "")
    if interval.endswith("m"):
        rest = {key: value for key, value in given.items() if key != "checkpoint.recovery_steps"}
        given = {**rest, "checkpoint.recovery_minutes": (flag, interval[:-1])}
    given = dict(given)
    flag, wanted = given.pop("amp", ("", None))
    if wanted is not None:
        given = {"engine.amp": (flag, "bfloat16"), **given} if wanted else {**given, "engine.amp": (flag, None)}
    flag, wanted = given.pop("torchcompile", ("", None))
    if wanted is not None:
        given["engine.compile"] = (flag, "model" if wanted else "auto")
    if given.get("model.initial_checkpoint") and "model.pretrained" not in given:
        given = {**given, "model.pretrained": ("--initial-checkpoint", False)}
    return recipe.load(name, flags=given, overrides=changes)


def finetune(
    items: Items = None,
    *,
    given: dict[str, tuple[str, Any]],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The run folder; a new one under output/.")] = None,
    resume: Annotated[str | None, typer.Option("--resume", help="A run folder to go on with, by its own recipe if none is "
                                                                "named; `auto`: the one in -o.")] = None,
    no_export: Annotated[bool, typer.Option("--no-export", help="Do not write the packed file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan, train nothing.")] = False,
    min_top1: Annotated[float | None, typer.Option("--min-top1", help="Exit with 5 below this accuracy.")] = None,
    nproc_per_node: Annotated[int, typer.Option("--nproc-per-node", min=1, help="Processes that train together here.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:  # fmt: skip
    """Fine-tune a model to few bits, and leave a run with a packed, verified file.

    Without arguments: the quickstart, 1797 handwritten digits and a small network at 2 bits.
    """
    wanted = read(items, given, resume)
    if nproc_per_node > 1 and not inside_a_launch():
        raise typer.Exit(launch(sys.argv[1:], nproc_per_node))
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    show.result(jobs.finetune(wanted, output, resume=resume, export_after=not no_export, dry_run=dry_run,
                              min_top1=min_top1, show=show))  # fmt: skip


def plan(
    items: Items = None,
    *,
    given: dict[str, tuple[str, Any]],
    as_json: Json = False,
    quiet: Quiet = False,
    no_color: NoColor = False,
) -> None:
    """Show layer by layer what would be quantized, how, and why. Trains nothing, downloads nothing."""
    wanted = read(items, given)
    from nulsq_cli import jobs

    show = Show(as_json=as_json, quiet=quiet, color=not no_color)
    show.result(jobs.plan(wanted, show=show))


finetune = with_flags(finetune)
plan = with_flags(plan)
