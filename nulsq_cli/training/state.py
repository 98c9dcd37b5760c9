"""All state of a run in one place, so that saving and restoring it forgets nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn

from nulsq_cli.errors import InputError, first_line
from nulsq_cli.layers import quantizers
from nulsq_cli.training import checkpoint
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World

MISFITS = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError)
"""What the libraries raise when they are given the state of something else."""


def misfit(path: Path, reason: BaseException) -> InputError:
    """The same as an error of ours."""
    what = f"{str(reason)[:100]} is missing" if isinstance(reason, KeyError) else first_line(reason)
    return InputError(f"does not belong to this run: {what}", where=path, fix="restore the run's own, or start a new one with -o")


STEPS_KEPT = 1000
"""Rows of steps in a checkpoint; what a log interval of 1 would make of it has no end."""


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    best: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per epoch
    steps: list[dict[str, Any]] = field(default_factory=list)  # one per log interval, the newest ones
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, notes: dict[str, Any]) -> Progress:
        """What the notes of a checkpoint say.

        Raises:
            ValueError, KeyError, TypeError: it is not what `State.save` writes.
        """
        found = cls(**notes["progress"])
        counts = (found.epoch, found.batch, found.updates, found.notes.get("stretch", 0))
        if not all(type(n) is int and 0 <= n < 2**31 for n in counts) or type(found.loss_sum) not in (int, float):
            raise ValueError("its position is none")
        if found.best is not None and found.best.keys() != {"top1", "top5", "loss", "epoch"}:
            raise ValueError("its best score is none")
        for rows, shown in ((found.rows, {"epoch", "eval_loss", "eval_top1", "eval_top5"}), (found.steps, {"epoch", "batch"})):
            first = rows[0].keys() if rows else shown
            if not isinstance(rows, list) or shown - first or any(row.keys() != first for row in rows):
                raise ValueError("its metrics are not all alike")
            if not all(type(row["epoch"]) is int for row in rows):
                raise ValueError("its metrics are of no epoch")
        if not isinstance(found.notes.get("went_back", {}), dict) or not isinstance(found.notes.get("instability", {}), dict):
            raise ValueError("its notes are none")
        return found

    @property
    def note(self) -> str | None:
        """What a reader of the metrics has to know about this epoch."""
        went_back = self.notes.get("went_back", {})
        return went_back["note"] if went_back.get("epoch") == self.epoch else None


def split_anew(progress: Progress, before: int, now: int, batches: int, accumulated: int, first: int = 0) -> None:
    """Put a position into batches of another size: the same number of samples, up to the next whole update.

    Args:
        progress: changed in place.
        before, now: images per batch, of all processes together.
        batches: how many an epoch has now.
        accumulated: batches per update.
        first: the epoch from which updates are counted.
    """
    group = now * accumulated
    done = min(-(-progress.batch * before // group) * accumulated, batches)
    progress.loss_sum *= done / max(progress.batch, 1)
    progress.batch = done
    progress.updates = (progress.epoch - first) * -(-batches // accumulated) + -(-done // accumulated)


def position(saved: checkpoint.Saved) -> Progress:
    """Where the run stood.

    Raises:
        InputError: the checkpoint does not say.
    """
    try:
        return Progress.of(saved.notes)
    except MISFITS as reason:
        raise misfit(saved.path, reason) from reason


@torch.no_grad()
def share_fitted(model: nn.Module, world: World, *, mean: bool) -> None:
    """Make what quantizers measure or fit, and no optimizer moves, alike in all processes: LQ-Nets' basis, say.

    Args:
        model: a converted model; changed in place.
        world: the processes.
        mean: of all processes, else those of the first.
    """
    fitted = [b for q in quantizers(model).values() for b in q.buffers() if b.is_floating_point()]
    if not fitted:
        return
    flat = torch.cat([b.double().flatten() for b in fitted])  # so that the mean of equal numbers is that number
    flat = world.reduce(flat if mean or world.primary else torch.zeros_like(flat), "sum") / (world.size if mean else 1)
    for buffer, values in zip(fitted, flat.split([b.numel() for b in fitted]), strict=True):
        buffer.copy_(values.view_as(buffer))


class State:
    """Model, average, optimizers, scaler and progress. Random draws are no state: the loop seeds every batch.

    Args:
        model: the bare model.
        pair: the optimizers of weights and steps.
        world: the processes.
        folder: where checkpoints go.
        scaled: scale the loss, for float16.
        ema_decay: of the averaged model; None: there is none.
        ema_warmup: let the decay grow.
        images: per batch, of all processes together.
        also: further modules to save: a teacher that learns, what a scheme measures.
    """

    def __init__(self, model: nn.Module, pair: Pair, world: World, folder: Path, *, scaled: bool = False,
                 ema_decay: float | None = None, ema_warmup: bool = True, images: int = 0,
                 also: Mapping[str, nn.Module] | None = None) -> None:  # fmt: skip
        self.model, self.pair, self.world, self.folder = model, pair, world, folder
        self.also = dict(also or {})
        self.split = {"processes": world.size, "images": images}
        self.progress = Progress()
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay, use_warmup=ema_warmup)
        self.saved_at = time.monotonic()

    @property
    def candidate(self) -> nn.Module:
        """The model that is evaluated and exported: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    def share_running_statistics(self, how: str) -> None:
        """Make alike in all processes what follows their own images: BatchNorm, and tables that are fitted.

        Both start every batch as the first process has them, then see their own share.

        Args:
            how: `reduce` to the mean; `broadcast` the first process's, which every checkpoint holds; `none` leaves
                BatchNorm as it is in each. Tables are then the first's: an evaluation is of one set of levels.
        """
        if self.world.size == 1:
            return
        share_fitted(self.model, self.world, mean=how == "reduce")
        if self.ema is not None:
            share_fitted(self.ema.module, self.world, mean=False)
        if how != "none":
            distribute_bn(self.model, self.world.size, reduce=how == "reduce")
        if self.ema is not None:
            distribute_bn(self.ema.module, self.world.size, reduce=False)
        for module in self.also.values():  # a teacher that learned must be one and the same when it teaches
            distribute_bn(module, self.world.size, reduce=how == "reduce")

    def save(self, name: str) -> None:
        """Write everything under `checkpoints/<name>.safetensors`; the first process does."""
        if not self.world.primary:
            return
        tensors: checkpoint.Groups = {"model": self.model.state_dict()}
        notes: dict[str, Any] = {"progress": self.progress.__dict__, "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        tensors |= {f"also.{key}": module.state_dict() for key, module in self.also.items()}
        for key, optimizer in self.pair.optimizers.items():
            tensors[f"optimizer.{key}"], notes[f"optimizer.{key}"] = checkpoint.optimizer_state(optimizer)
        if self.progress.updates:  # nothing has been split before
            notes["split"] = self.split
        checkpoint.save(self.folder / f"{name}.safetensors", tensors, notes)
        self.saved_at = time.monotonic()

    def restore(self, saved: checkpoint.Saved) -> None:
        """Go back to what `save` wrote.

        Raises:
            InputError: it is whole, but the state of another run.
        """
        tensors, notes = saved.tensors, saved.notes
        try:
            self.progress = Progress.of(notes)
            split = notes.get("split", self.split)
            if split.keys() != self.split.keys() or not all(type(n) is int and 0 <= n < 2**31 for n in split.values()):
                raise ValueError("its batches are split in no way")
            self.model.load_state_dict(tensors["model"])
            if self.ema is not None:
                self.ema.module.load_state_dict(tensors["ema"])
            for key, module in self.also.items():
                module.load_state_dict(tensors[f"also.{key}"])
            for key, optimizer in self.pair.optimizers.items():
                checkpoint.restore_optimizer(optimizer, tensors.get(f"optimizer.{key}", {}), notes[f"optimizer.{key}"])
            self.scaler.load_state_dict(notes["scaler"])
        except MISFITS as reason:
            raise misfit(saved.path, reason) from reason
