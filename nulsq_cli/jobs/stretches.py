"""Phases as the engine runs them: those that share optimizers and schedule are one stretch, with one trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm.layers
import timm.task
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from nulsq_cli import recipe, session
from nulsq_cli.jobs.logs import Logs
from nulsq_cli.layers import quantizers
from nulsq_cli.schemes.instability import Instability, most_unstable
from nulsq_cli.schemes.mutual import Both, MutualTask
from nulsq_cli.training import data, transforms
from nulsq_cli.training.engine import Settings, Trainer
from nulsq_cli.training.optim import Pair, warmup
from nulsq_cli.training.world import World
from nulsq_cli.values import Bits, Phase


@dataclass(frozen=True)
class Stretch:
    """Some phases, and the epoch of the run in which the first one begins."""

    phases: tuple[Phase, ...]
    first: int

    @property
    def end(self) -> int:
        """The epoch after its last one."""
        return self.first + sum(phase.epochs for phase in self.phases)

    @property
    def bits(self) -> Bits:
        """The widths; those of all its phases are the same."""
        return self.phases[0].bits

    def at(self, epoch: int) -> Phase:
        """The phase to which an epoch of the run belongs."""
        for phase in self.phases:
            epoch -= phase.epochs
            if epoch < self.first:
                return phase
        return self.phases[-1]


def stretches(r: recipe.Recipe) -> list[Stretch]:
    """The recipe's phases, those that continue joined to the one before; an empty one where nothing is trained."""
    found: list[Stretch] = []
    for phase in r.phases():
        if phase.continues:
            found[-1] = replace(found[-1], phases=(*found[-1].phases, phase))
        else:
            found.append(Stretch((phase,), found[-1].end if found else 0))
    return found or [Stretch((Phase("plain", 0, r.quant.bits),), 0)]


def short_warmup(r: recipe.Recipe, way: list[Stretch]) -> str | None:
    """A sentence where some training is too short for the recipe's warm-up."""
    wanted = r.schedule.warmup_epochs
    lengths = [length for s in way if (length := s.end - s.first) and warmup(wanted, length) < wanted]
    if not lengths:
        return None
    return f"  ! warm-up takes {warmup(wanted, min(lengths))} epochs, not {wanted}: training has {min(lengths)}"


class Lessons:
    """The timm task of each epoch. One is made when its phase begins: a frozen teacher may have learned before.

    Args:
        r: the recipe.
        stretch: whose epochs.
        model: the student.
        teacher: or None.
        criterion: the loss on labels.
        world: the processes.
        mean, std: of the images, for a teacher that was made for others; (C,) each.
    """

    def __init__(self, r: recipe.Recipe, stretch: Stretch, model: nn.Module, teacher: nn.Module | None, criterion: nn.Module,
                 world: World, mean: Any, std: Any) -> None:  # fmt: skip
        self.r, self.stretch, self.model, self.teacher = r, stretch, model, teacher
        self.criterion, self.world, self.norm = criterion, world, (mean, std)
        self._made: dict[str, nn.Module] = {}

    def __call__(self, epoch: int) -> nn.Module:
        """The task of that epoch."""
        lesson = self.stretch.at(epoch).lesson
        if lesson not in self._made:
            task = getattr(self, f"_{lesson}")().to(self.world.device)
            if self.world.size > 1:
                on_gpu = self.world.device.type == "cuda"
                task.prepare_distributed(device_ids=[self.world.device.index] if on_gpu else None)
            self._made[lesson] = task
        return self._made[lesson]

    def _labels(self) -> nn.Module:
        return timm.task.ClassificationTask(self.model, self.criterion, device=self.world.device, verbose=False)

    def _tutor(self) -> nn.Module:
        t = self.r.teacher
        task = timm.task.LogitDistillationTask(
            self.model, self.teacher.to(self.world.device), self.criterion, distill_loss_weight=t.weight,
            task_loss_weight=t.task_weight, temperature=t.temperature, device=self.world.device, verbose=False,
        )  # fmt: skip
        # timm takes the images for normalised as the student's pretrained_cfg says; a recipe may say otherwise.
        for name, values in zip(("student_mean", "student_std"), self.norm, strict=True):
            getattr(task, name).copy_(torch.tensor(values).view(1, -1, 1, 1))
        return task

    def _mutual(self) -> nn.Module:
        t, own = self.r.teacher, getattr(self.teacher, "pretrained_cfg", None) or {}
        theirs = (own.get("mean", self.norm[0]), own.get("std", self.norm[1])) if t.name != "self" else self.norm
        self.teacher.requires_grad_(True)
        return MutualTask(Both(self.model, self.teacher, self.norm, theirs), self.criterion, weight=t.weight,
                          task_weight=t.task_weight, temperature=t.temperature, device=self.world.device)  # fmt: skip


def hold_still(model: nn.Module, phase: Phase, scores: dict[str, float]) -> list[nn.Parameter]:
    """Stop the gradient of what a phase does not train.

    Args:
        model: the student.
        phase: which.
        scores: how unstable each layer was when that was sampled.

    Returns:
        The parameters that were stopped, so that they can be let go again.
    """
    steps = {p for q in quantizers(model).values() for p in q.steps()}
    still = {f"{name}.weight" for name in most_unstable(scores, phase.frozen_share)}
    stopped = [
        p for name, p in model.named_parameters()
        if p.requires_grad and p not in steps and (name in still or (phase.only_norms and p.ndim > 1))
    ]  # fmt: skip
    for p in stopped:
        p.requires_grad_(False)
    return stopped


def check_training(r: recipe.Recipe, splits: session.Splits, world: World) -> None:
    """Make on a stand-in what a run makes after its calibration: a mistake in it is said before, and leaves no run behind.

    Raises:
        UsageError: an optimizer or the schedule cannot be made.
        InputError: the images do not fill a batch.
    """
    weights, steps = r.optimizer.weights.model_dump(), r.optimizer.steps.model_dump()
    pair = Pair(nn.LayerNorm(1), weights | {"layer_decay": None}, steps, r.schedule.model_dump(), 2, 2)
    pair.add("steps", [nn.Parameter(torch.ones(1))], steps)
    data.train_loader(splits.train, splits.train_transform, batch_size=r.data.batch_size, seed=r.seed, rank=world.rank,
                      world=world.size)  # fmt: skip


def trainer(r: recipe.Recipe, stretch: Stretch, model: nn.Module, teacher: nn.Module | None, splits: session.Splits,
            config: dict[str, Any], world: World, folder: Path, show: Any) -> Trainer:  # fmt: skip
    """The engine for one stretch of a run.

    Args:
        r: the recipe.
        stretch: which.
        model: the student, converted for this stretch.
        teacher: or None.
        splits: the images.
        config: their size, mean and std.
        world: the processes.
        folder: of the run.
        show: for people.
    """
    d, a, e = r.data, r.data.augment, r.engine
    if e.sync_bn and world.size > 1:
        timm.layers.convert_sync_batchnorm(model)
    # Before anything copies or wraps the model: some add buffers to its layers. On the way to the last widths there are none.
    steady = session.stabilizers(r, model) if stretch.bits == r.quant.bits else []
    loader = data.train_loader(splits.train, splits.train_transform, batch_size=d.batch_size, seed=r.seed, workers=d.workers,
                               rank=world.rank, world=world.size, pin_memory=d.pin_mem)  # fmt: skip
    loader.set_epoch(0)
    batches = int(world.reduce(torch.tensor(len(loader)), "min"))  # streams may be dealt out unevenly
    updates = -(-batches // e.grad_accum_steps)
    pair = Pair(model, r.optimizer.weights.model_dump(), r.optimizer.steps.model_dump(), r.schedule.model_dump(),
                stretch.end - stretch.first, max(updates, 1))  # fmt: skip
    also: dict[str, nn.Module] = {}
    learning = [phase for phase in stretch.phases if phase.lesson == "mutual"]
    if learning:
        teacher.to(world.device).requires_grad_(True)
        pair.add("teacher", list(teacher.parameters()), r.optimizer.weights.model_dump() | {"lr": learning[0].teacher_lr})
        also["teacher"] = teacher
    if any(phase.samples_instability for phase in stretch.phases):
        also["instability"] = Instability(model)
    mixup = transforms.build_mixup(
        model.num_classes, mixup=a.mixup, cutmix=a.cutmix, mixup_prob=a.mixup_prob, mixup_mode=a.mixup_mode,
        mixup_switch_prob=a.mixup_switch_prob, smoothing=a.smoothing, batch_size=d.batch_size,
    )  # fmt: skip
    if mixup is not None:
        criterion: nn.Module = SoftTargetCrossEntropy()
    else:
        criterion = LabelSmoothingCrossEntropy(a.smoothing) if a.smoothing else nn.CrossEntropyLoss()

    def batches_of(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader.set_epoch(epoch, first * d.batch_size * world.size)
        return iter(loader)

    settings = Settings(
        epochs=stretch.end, first_epoch=stretch.first, choosing=stretch.bits == r.quant.bits, seed=r.seed,
        batch_size=d.batch_size * world.size, dist_bn=e.dist_bn,
        grad_accum_steps=e.grad_accum_steps, clip_grad=r.optimizer.clip_grad,
        clip_mode=r.optimizer.clip_mode, amp=session.amp_type(r), memory_format=session.memory_format(r),
        ema_decay=r.ema.decay if r.ema.enabled else None,
        ema_warmup=r.ema.warmup, bn_freeze_after=r.bn.freeze_after, mixup_off_epoch=a.mixup_off_epoch,
        log_interval=r.log.interval, recovery_seconds=60 * r.checkpoint.recovery_minutes,
        recovery_steps=r.checkpoint.recovery_steps,
    )  # fmt: skip
    chosen = splits.held or splits.validation
    choose: Callable[[nn.Module], Any] = lambda m: session.score(m, chosen, splits.eval_transform, world, r)  # noqa: E731
    lessons = Lessons(r, stretch, model, teacher, criterion, world, config["mean"], config["std"])
    return Trainer(lessons, model, pair, world, settings, folder / "checkpoints", batches_of, batches, choose,
                   Logs(folder, show, world.primary), mixup, steady, also)  # fmt: skip
