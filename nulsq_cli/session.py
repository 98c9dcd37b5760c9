"""What several commands need: a recipe's model and data, a run read back, a target recognised."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nulsq_cli import artifact, exporters, recipe
from nulsq_cli.convert import Plan, Policy, Rule, convert
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.files import read_json
from nulsq_cli.layers import quant_layers
from nulsq_cli.models import create_float_model, float_info, rebuild
from nulsq_cli.stabilizers import make_stabilizers
from nulsq_cli.stabilizers.base import Stabilizer
from nulsq_cli.training import checkpoint, data, datasets, state, transforms
from nulsq_cli.training.evaluate import evaluate
from nulsq_cli.training.world import World
from nulsq_cli.values import Score

CHUNK = 64
"""Images per chunk of calibration: fixed, so that results do not depend on the batch size."""


def float_model(r: recipe.Recipe) -> nn.Module:
    """The float model that a recipe names, with its weights, in evaluation mode."""
    m = r.model
    return create_float_model(
        m.name, pretrained=m.pretrained, checkpoint=m.initial_checkpoint, num_classes=m.num_classes,
        in_chans=m.in_chans, kwargs=m.kwargs,
    )  # fmt: skip


def data_config(r: recipe.Recipe, model: nn.Module) -> dict[str, Any]:
    """Size, mean, std, crop and interpolation: the recipe's, else the model's own."""
    d = r.data
    return transforms.resolve_data(
        model, input_size=d.input_size, mean=d.mean, std=d.std, interpolation=d.interpolation,
        crop_pct=d.crop_pct, crop_mode=d.crop_mode,
    )  # fmt: skip


def policy(r: recipe.Recipe) -> Policy:
    """The recipe's quantization section as the plan wants it."""
    q = r.quant
    rules = tuple(Rule(x.match, x.bits, x.method, x.granularity, x.signed, x.skip) for x in q.rules)
    return Policy(q.bits, q.method, q.granularity, q.signed, q.first_last.bits, q.first_last.method, rules,
                  dict(q.options), q.grid)  # fmt: skip


def stabilizers(r: recipe.Recipe, model: nn.Module) -> list[Stabilizer]:
    """The recipe's stabilizers around a converted model; what they remember is put into its layers."""
    return make_stabilizers(quant_layers(model), [s.model_dump() for s in r.quant.stabilizers])


@dataclass(frozen=True)
class Splits:
    """The images of a run. `held` is the slice of the training split on which the best epoch is chosen."""

    train: Dataset
    validation: Dataset
    held: Dataset | None
    train_transform: Callable[..., Tensor]
    eval_transform: Callable[..., Tensor]


def open_split(r: recipe.Recipe, split: str, in_chans: int) -> Dataset:
    """One split of the recipe's dataset."""
    d = r.data
    return datasets.open_dataset(d.dataset, d.data_dir, split, download=d.download, class_map=d.class_map,
                                 input_img_mode=transforms.image_mode(in_chans))  # fmt: skip


def open_splits(r: recipe.Recipe, config: dict[str, Any]) -> Splits:
    """Both splits, their transforms, and the held-out slice if there is one."""
    d, a = r.data, r.data.augment
    channels = config["input_size"][0]
    train = open_split(r, d.train_split, channels)
    validation = open_split(r, d.val_split, channels)
    datasets.check_same_classes(train, validation)
    held = None
    if d.hold_out:
        train, held = data.hold_out(train, d.hold_out, r.seed)
    augment = a.model_dump(exclude={"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode",
                                    "mixup_off_epoch", "smoothing"})  # fmt: skip
    return Splits(train, validation, held, *transforms.build_transforms(config, **augment))


def score(model: nn.Module, dataset: Dataset, transform: Any, world: World, r: recipe.Recipe) -> Score:
    """Accuracy over a split, exactly once over every sample."""
    d = r.data
    loader = data.eval_loader(dataset, transform, batch_size=d.validation_batch_size or d.batch_size, workers=d.workers,
                              rank=world.rank, world=world.size)  # fmt: skip
    # The layout decides the order of sums: the same one wherever this recipe's accuracy is measured.
    return evaluate(model.to(memory_format=memory_format(r)), loader, world, amp=amp_type(r), memory_format=memory_format(r))


def amp_type(r: recipe.Recipe) -> torch.dtype | None:
    """The recipe's autocast type."""
    return {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}[r.engine.amp]


def memory_format(r: recipe.Recipe) -> torch.memory_format:
    """The recipe's layout of images and weights."""
    return torch.channels_last if r.engine.channels_last else torch.contiguous_format


def chunks(dataset: Dataset, transform: Any, samples: int, world: World, r: recipe.Recipe) -> tuple[Any, int]:
    """(start a pass over fixed chunks of some images, how many chunks there are over all processes)."""
    samples = min(samples, len(dataset))
    size = min(CHUNK, samples)
    if samples > size and samples % size == 1:
        samples -= 1  # BatchNorm has no statistics of a single image

    def start() -> Iterable[tuple[int, Tensor]]:
        return data.fixed_chunks_loader(dataset, samples, size, r.seed, transform, rank=world.rank, world=world.size)

    return start, -(-samples // size)


# ---- runs and targets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run folder, read back."""

    folder: Path
    recipe: recipe.Recipe
    plan: Plan | None

    def info(self) -> dict[str, Any]:
        """What `describe_model` wrote."""
        path = self.folder / "model.json"
        found = read_json(path)
        if not isinstance(found, dict) or {"architecture", "arguments", "data_cfg", "name"} - found.keys():
            raise InputError("is damaged: it describes no model", where=path, fix="restore it, or start a new run")
        transforms.check_config(found["data_cfg"], path)
        return found

    def model(self) -> nn.Module:
        """The trained model at its best epoch, in evaluation mode."""
        best = self.folder / "checkpoints" / "best.safetensors"
        used = best if best.exists() else best.with_name("last.safetensors")
        saved = checkpoint.Saved(used, *checkpoint.load(used))
        if used != best and state.position(saved).best:
            raise InputError("is missing", where=best, fix="restore it, or start a new run")
        tensors = saved.tensors.get("ema") or saved.tensors.get("model", {})
        info = self.info()
        model = rebuild(info["architecture"], info["arguments"], elements=sum(t.numel() for t in tensors.values()),
                        tensors=len(tensors), where=self.folder / "model.json")  # fmt: skip
        if self.plan is not None:
            convert(model, self.plan)
            stabilizers(self.recipe, model)  # the state that they left in layers is a part of the model
        try:
            model.load_state_dict(tensors)
        except (RuntimeError, KeyError) as reason:
            raise InputError("does not fit the run's plan", where=used) from reason
        return model.eval()


def read_run(folder: Path) -> Run:
    """Open a run folder.

    Raises:
        InputError: it is no run, or has been damaged.
    """
    if not (folder / "recipe.yaml").exists() or not (folder / "model.json").exists():
        raise InputError("is no run folder", where=folder, fix="see `nulsq ls runs`")
    plan = folder / "plan.json"
    return Run(folder, recipe.load(folder / "recipe.yaml"), Plan.from_json(read_json(plan)) if plan.exists() else None)


KINDS = {".safetensors": "artifact", **{exporters.EXPORTERS[kind].suffix: kind for kind in exporters.EXPORTED}}
"""What a file is, by its suffix."""


def kind_of(target: str) -> str:
    """`run`, `artifact`, or `onnx` and `openvino` for exported files.

    Raises:
        InputError: there is nothing of that name.
        UsageError: it is something else.
    """
    path = Path(target)
    if path.is_dir():
        return "run"
    if path.is_file():
        if path.suffix in KINDS:
            return KINDS[path.suffix]
        raise UsageError("is no run folder, no packed .safetensors file and no exported .onnx or .xml file", where=target,
                         fix="for a float checkpoint: nulsq eval --model NAME --initial-checkpoint FILE")  # fmt: skip
    raise InputError("does not exist", where=target, fix="see `nulsq ls runs`")


def target_model(
    target: str, runtime: str | None = None
) -> tuple[nn.Module, str, recipe.Recipe | None, dict[str, Any] | None]:
    """Any target as (model, kind, its recipe if it has one, its data config if it carries one).

    Args:
        target: what the user named.
        runtime: that an exported file is run in; None is the first that reads it.

    Raises:
        UsageError: a runtime that is not installed, or for a target that needs none.
        InputError: the target is missing or damaged.
    """
    kind = kind_of(target)
    if kind in exporters.EXPORTED:
        engine = exporters.runtimes_of(kind, [runtime] if runtime else [], target)[0]
        from nulsq_cli.exporters import exported

        file = exported.read(Path(target))
        stored = file.meta.get("recipe")
        model = exported.Deployed(file.run(engine), file.meta["num_classes"], engine)
        return model.eval(), kind, recipe.loads(stored) if stored else None, file.meta["data_cfg"]
    if runtime is not None:
        raise UsageError("is no exported file: it is evaluated in torch", where=target, fix="leave out --runtime")
    if kind == "artifact":
        model, packed = artifact.load(Path(target))
        stored = packed.meta.get("recipe")
        transforms.check_config(packed.meta["data_cfg"], target)
        return model, kind, recipe.loads(stored) if stored else None, packed.meta["data_cfg"]
    run = read_run(Path(target))
    return run.model(), kind, run.recipe, run.info()["data_cfg"]


def describe_model(model: nn.Module, config: dict[str, Any]) -> dict[str, Any]:
    """What is needed to build the float model again without its weights."""
    info = float_info(model)
    arguments = {**info["arguments"], "num_classes": model.num_classes}
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
    return {"name": info["resolved"], "architecture": info["architecture"], "arguments": arguments, "data_cfg": plain}


def copy_of(model: nn.Module) -> nn.Module:
    """A copy that later changes to `model` do not reach."""
    return copy.deepcopy(model)
