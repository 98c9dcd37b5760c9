"""The only training loop. It runs one phase, watches for trouble, and can be stopped and continued anywhere."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from nulsq_cli.calibrate import first_bad_layer
from nulsq_cli.errors import DivergedError, Interrupted
from nulsq_cli.layers import quantizers
from nulsq_cli.training import checkpoint
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World
from nulsq_cli.values import Score


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know besides model, data and optimizers."""

    epochs: int
    seed: int = 42
    grad_accum_steps: int = 1
    clip_grad: float | None = None
    clip_mode: str = "norm"
    amp: torch.dtype | None = None
    memory_format: torch.memory_format = torch.contiguous_format
    ema_decay: float | None = None
    ema_warmup: bool = True
    bn_freeze_after: int | None = None
    mixup_off_epoch: int = 0
    log_interval: int = 50
    recovery_seconds: float = 900.0
    recovery_steps: int | None = None


class Watcher(Protocol):
    """Whoever shows progress to people and keeps the logs."""

    def step(self, epoch: int, batch: int, batches: int, loss: float, rates: tuple[float, float | None],
             images_per_second: float) -> None:  # fmt: skip
        """After some updates."""

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        """After every epoch, with the metrics of all epochs so far."""

    def say(self, text: str) -> None:
        """Anything worth knowing."""


@dataclass
class Progress:
    """Where a run stands; what a checkpoint stores besides tensors."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0
    loss_sum: float = 0.0
    best: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Holds all state of a run in one place, so that saving and restoring it forgets nothing."""

    def __init__(
        self, task: nn.Module, model: nn.Module, pair: Pair, world: World, settings: Settings, folder: Path,
        loader: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]], batches: int,
        choose: Callable[[nn.Module], Score], watcher: Watcher, mixup: Any = None,
    ) -> None:  # fmt: skip
        """Take everything that will be needed.

        Args:
            task: a timm task around the model: (images, target) -> {"loss", "output"}.
            model: the bare model inside the task.
            pair: the optimizers of weights and steps.
            world: the processes.
            settings: numbers.
            folder: where checkpoints go.
            loader: (epoch, first batch) -> batches of this process from there to the epoch's end.
            batches: how many batches an epoch has.
            choose: scores a model; the best epoch is chosen by its top1.
            watcher: shows and logs.
            mixup: timm's Mixup, or None.
        """
        self.task, self.model, self.pair, self.world, self.settings = task, model, pair, world, settings
        self.folder, self.loader, self.batches = folder, loader, batches
        self.choose, self.watcher, self.mixup = choose, watcher, mixup
        self.progress = Progress()
        self.quantizers = list(quantizers(model).values())
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=settings.amp is torch.float16)
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(model, decay=settings.ema_decay, use_warmup=settings.ema_warmup)
        self.stopped_by: int | None = None
        self._saved_at = time.monotonic()

    @property
    def candidate(self) -> nn.Module:
        """The model that is evaluated and exported: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.module

    # ---- saving and restoring -------------------------------------------------------------------

    def save(self, name: str) -> None:
        """Write everything under `checkpoints/<name>.safetensors`."""
        if not self.world.primary:
            return
        tensors: dict[str, dict[str, Tensor]] = {"model": self.model.state_dict()}
        notes: dict[str, Any] = {"progress": self.progress.__dict__, "scaler": self.scaler.state_dict()}
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        for key, optimizer in self.pair.optimizers.items():
            tensors[f"optimizer.{key}"], notes[f"optimizer.{key}"] = checkpoint.optimizer_state(optimizer)
        tensors["rng"], notes["rng"] = checkpoint.random_state()
        checkpoint.save(self.folder / f"{name}.safetensors", tensors, notes)
        self._saved_at = time.monotonic()

    def restore(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        tensors, notes = checkpoint.load(path)
        self.model.load_state_dict(tensors["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(tensors["ema"])
        for key, optimizer in self.pair.optimizers.items():
            checkpoint.restore_optimizer(optimizer, tensors.get(f"optimizer.{key}", {}), notes[f"optimizer.{key}"])
        self.scaler.load_state_dict(notes["scaler"])
        self.progress = Progress(**notes["progress"])
        if self.world.size == 1:
            checkpoint.restore_random(tensors["rng"], notes["rng"])

    # ---- running --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from where `progress` stands to the last epoch.

        Raises:
            DivergedError: the loss or a parameter is not finite.
            Interrupted: SIGINT or SIGTERM, after a recovery checkpoint was written.
        """
        with self._signals():
            while self.progress.epoch < self.settings.epochs:
                started = time.monotonic()
                self._train_epoch()
                self._finish_epoch(started)

    def _train_epoch(self) -> None:
        s, p = self.settings, self.progress
        if p.batch == 0:
            self._seed(p.epoch)
            p.loss_sum = 0.0
        self.task.train()
        if s.bn_freeze_after is not None and p.epoch >= s.bn_freeze_after:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if self.mixup is not None and s.mixup_off_epoch and p.epoch >= s.mixup_off_epoch:
            self.mixup.mixup_enabled = False
        self.pair.update_rates(p.updates)
        shown, seen = time.monotonic(), 0
        group = 0
        for images, target in self.loader(p.epoch, p.batch):
            left = self.batches - p.batch
            size = group or min(s.grad_accum_steps, left)
            group = size if group == 0 else group
            last = (p.batch + 1) % s.grad_accum_steps == 0 or left == 1
            loss = self._backward(images, target, size, last)
            p.batch += 1
            p.loss_sum += loss
            seen += len(target) * self.world.size
            if last:
                self._update()
                group = 0
                if p.updates % s.log_interval == 0 or p.batch == self.batches:
                    now = time.monotonic()
                    self.watcher.step(p.epoch, p.batch, self.batches, p.loss_sum / p.batch, self.pair.rates(),
                                      seen / max(now - shown, 1e-9))  # fmt: skip
                    shown, seen = now, 0
                self._stop_or_save()

    def _backward(self, images: Tensor, target: Tensor, group: int, last: bool) -> float:
        device = self.world.device
        images = images.to(device, non_blocking=True, memory_format=self.settings.memory_format)
        target = target.to(device, non_blocking=True)
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        hold = contextlib.nullcontext()
        if not last and hasattr(self.task.trainable_module, "no_sync"):
            hold = self.task.trainable_module.no_sync()
        with hold:
            with torch.autocast(device.type, dtype=self.settings.amp, enabled=self.settings.amp is not None):
                loss = self.task(images, target)["loss"]
                for quantizer in self.quantizers:
                    if (penalty := quantizer.penalty()) is not None:
                        loss = loss + penalty
            self.scaler.scale(loss / group).backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            self._diverged(f"the loss became {value}")
        return value

    def _update(self) -> None:
        s, p = self.settings, self.progress
        if s.clip_grad is not None:
            self.scaler.unscale_(self.pair.optimizers["weights"])
            dispatch_clip_grad(self.pair.weight_parameters, s.clip_grad, s.clip_mode)
        for optimizer in self.pair.optimizers.values():
            self.scaler.step(optimizer)
        self.scaler.update()
        self.pair.zero_grad()
        with torch.no_grad():
            for quantizer in self.quantizers:
                quantizer.after_step()
        p.updates += 1
        if self.ema is not None:
            self.ema.update(self.model, step=p.updates)
        self.pair.update_rates(p.updates)

    def _finish_epoch(self, started: float) -> None:
        p = self.progress
        if bad := first_bad_layer(self.model):
            self._diverged(f"{bad} is not finite")
        if self.world.size > 1:
            self._share_buffers()
        score = self.choose(self.candidate)
        rates = self.pair.rates()
        row = {
            "epoch": p.epoch, "train_loss": p.loss_sum / self.batches, "eval_loss": score.loss, "eval_top1": score.top1,
            "eval_top5": score.top5, "lr_weights": rates[0], "lr_steps": rates[1],
            "seconds": round(time.monotonic() - started, 2),
        }  # fmt: skip
        p.rows.append(row)
        # On a small split many epochs are equally right; the loss tells them apart.
        better = p.best is None or (score.top1, -score.loss) > (p.best["top1"], -p.best["loss"])
        if better:
            p.best = {"top1": score.top1, "top5": score.top5, "loss": score.loss, "epoch": p.epoch}
        p.epoch, p.batch = p.epoch + 1, 0
        if better:
            self.save("best")
        self.save("last")
        if self.world.primary:
            (self.folder / "recovery.safetensors").unlink(missing_ok=True)
        self.world.wait()
        self.watcher.epoch(p.rows)

    def _share_buffers(self) -> None:
        """Running statistics differ between processes until now; use their mean everywhere."""
        for buffer in self.model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(self.world.reduce(buffer.clone(), "sum") / self.world.size)

    # ---- trouble --------------------------------------------------------------------------------

    def _diverged(self, what: str) -> None:
        where = first_bad_layer(self.model)
        raise DivergedError(
            f"training diverged in epoch {self.progress.epoch}, update {self.progress.updates}: {what}", where=where,
            fix="lower --lr or --steps-lr, or clip with --clip-grad 1.0; the last good checkpoint is kept",
        )  # fmt: skip

    def _stop_or_save(self) -> None:
        s, p = self.settings, self.progress
        if self.stopped_by is not None and self.world.size == 1:
            self.save("recovery")
            raise Interrupted(self.stopped_by, "interrupted; a recovery checkpoint was written",
                              fix="go on with the same command and --resume auto")  # fmt: skip
        due = time.monotonic() - self._saved_at > s.recovery_seconds
        if due or (s.recovery_steps and p.updates % s.recovery_steps == 0):
            self.save("recovery")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if self.stopped_by is not None or self.world.size > 1:
                raise KeyboardInterrupt
            self.stopped_by = number

        try:
            old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread of this process
            old = {}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _seed(self, epoch: int) -> None:
        """Dropout, mixup and the like are a function of seed, epoch and process."""
        seed = int(np.random.SeedSequence((self.settings.seed, epoch, self.world.rank)).generate_state(1)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)


def newest(folder: Path) -> Path | None:
    """The checkpoint to continue from: the recovery if there is one, for it is younger than `last`."""
    for name in ("recovery", "last"):
        if (path := folder / f"{name}.safetensors").exists():
            return path
    return None
