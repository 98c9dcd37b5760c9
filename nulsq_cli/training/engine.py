"""The only training loop. It runs one stretch, watches for trouble, and can be stopped and continued anywhere."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from nulsq_cli.calibrate import first_bad_layer
from nulsq_cli.errors import DivergedError, Interrupted
from nulsq_cli.layers import quantizers, weights_together
from nulsq_cli.pairing import one_operation
from nulsq_cli.stabilizers.base import Stabilizer
from nulsq_cli.training import checkpoint, curvature, watch
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.order import reseed
from nulsq_cli.training.state import STEPS_KEPT, State, misfit, split_anew
from nulsq_cli.training.watcher import SIGNALS, Signals, Watcher
from nulsq_cli.training.world import World
from nulsq_cli.values import Score


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know besides model, data and optimizers."""

    epochs: int  # of the run, up to the end of this stretch
    first_epoch: int = 0  # of this stretch
    choosing: bool = True  # whether an epoch of this stretch may be the best one
    seed: int = 42
    batch_size: int = 0  # images per batch, of all processes together
    dist_bn: str = "reduce"
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


class Trainer(State):
    """The loop over the state of a run."""

    def __init__(
        self, lessons: Callable[[int], nn.Module], model: nn.Module, pair: Pair, world: World, settings: Settings, folder: Path,
        loader: Callable[[int, int], Iterable[tuple[Tensor, Tensor]]], batches: int,
        choose: Callable[[nn.Module], Score], watcher: Watcher, mixup: Any = None, stabilizers: Sequence[Stabilizer] = (),
        also: Mapping[str, nn.Module] | None = None,
    ) -> None:  # fmt: skip
        """Take everything that will be needed.

        Args:
            lessons: epoch -> a timm task around the model: (images, target) -> {"loss", "output"}.
            model: the bare model inside the tasks.
            pair: the optimizers of weights and steps.
            world: the processes.
            settings: numbers.
            folder: where checkpoints go.
            loader: (epoch, first batch) -> batches of this process from there to the epoch's end.
            batches: how many batches an epoch has.
            choose: scores a model; the best epoch is chosen by its top1.
            watcher: shows and logs.
            mixup: timm's Mixup, or None.
            stabilizers: add to the loss, and act after updates; their state, if any, is in the model.
            also: further modules whose state belongs to the run.
        """
        super().__init__(
            model, pair, world, folder, scaled=settings.amp is torch.float16,
            ema_decay=settings.ema_decay, ema_warmup=settings.ema_warmup, images=settings.batch_size, also=also,
        )  # fmt: skip
        self.lessons, self.settings, self.loader, self.batches = lessons, settings, loader, batches
        self.choose, self.watcher, self.mixup = choose, watcher, mixup
        self.quantizers, self.stabilizers = list(quantizers(model).values()), list(stabilizers)
        self.updates = max((settings.epochs - settings.first_epoch) * -(-batches // settings.grad_accum_steps), 1)  # in all
        self.stopped_by: int | None = None  # the signal that all processes agree on
        self.signals = Signals(echo=world.size > 1)

    def restore(self, saved: checkpoint.Saved) -> None:
        """Go back to what `save` wrote, also where batches were split in another way."""
        super().restore(saved)
        before, now = saved.notes.get("split", self.split), self.split
        if before == now:
            if self.progress.batch > self.batches:
                raise misfit(saved.path, ValueError(f"it stands at batch {self.progress.batch} of {self.batches}"))
            return
        if before["images"] != now["images"]:
            split_anew(self.progress, before["images"], now["images"], self.batches, self.settings.grad_accum_steps,
                       self.settings.first_epoch)  # fmt: skip
        self.watcher.say(
            f"  {before['processes']} processes with {before['images']} images per batch became {now['processes']} with"
            f" {now['images']}: the run is exact up to this checkpoint only, because batches are now split differently"
        )

    # ---- running --------------------------------------------------------------------------------

    def run(self) -> None:
        """Train from where `progress` stands to the last epoch.

        Raises:
            DivergedError: the loss, a gradient or a parameter is not finite, again after going back once.
            Interrupted: SIGINT or SIGTERM, after a recovery checkpoint was written.
            InputError: a checkpoint cannot be written; older ones are untouched.
        """
        with self.signals.noted():
            while self.progress.epoch < self.settings.epochs:
                started = time.monotonic()
                try:
                    self._train_epoch()
                    self._finish_epoch(started)
                    self._stop_after_epoch()
                except DivergedError as trouble:
                    self._go_back(trouble)

    def _train_epoch(self) -> None:
        s, p = self.settings, self.progress
        if p.batch == 0:
            p.loss_sum = 0.0
        self.task = self.lessons(p.epoch)
        self.task.train()
        if s.bn_freeze_after is not None and p.epoch >= s.bn_freeze_after:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        if p.batch == 0:  # what is measured is a buffer: a run that goes on in the middle of an epoch has it
            curvature.follow(self.model, self.quantizers, lambda: self.loader(p.epoch, 0), p.epoch, s.seed, self.world)
        if self.mixup is not None and s.mixup_off_epoch and p.epoch >= s.mixup_off_epoch:
            self.mixup.mixup_enabled = False
        self.pair.update_rates(p.updates)
        shown, seen = time.monotonic(), 0
        group, losses = 0, 0.0
        for images, target in islice(self.loader(p.epoch, p.batch), self.batches - p.batch):
            reseed(s.seed, p.epoch, p.batch, self.world.rank)  # dropout, mixup ...: nothing to save, nothing to restore
            torch.manual_seed(torch.initial_seed())  # the accelerator's generator, too
            left = self.batches - p.batch
            size = group or min(s.grad_accum_steps, left)
            group = size if group == 0 else group
            last = (p.batch + 1) % s.grad_accum_steps == 0 or left == 1
            losses += self._backward(images, target, size, last)
            p.batch += 1
            seen += len(target) * self.world.size
            if last:
                self._agree(losses)
                self._update()
                group, losses = 0, 0.0
                if p.updates % s.log_interval == 0 or p.batch == self.batches:
                    now = time.monotonic()
                    self._note_step(seen / max(now - shown, 1e-9))
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
            with self._autocast():
                # Several processes exchange each gradient as soon as it is there, so these should not all come at the end.
                together = weights_together(self.model) if self.world.size == 1 else contextlib.nullcontext()
                with one_operation(self.model, images), together:
                    loss = self.task(images, target)["loss"]
                for quantizer in self.quantizers:
                    if (penalty := quantizer.penalty()) is not None:
                        loss = loss + penalty
                for stabilizer in self.stabilizers:
                    if (penalty := stabilizer.penalty(self.progress.updates / self.updates)) is not None:
                        loss = loss + penalty
            self.scaler.scale(loss / group).backward()
        value = float(loss.detach())
        if not math.isfinite(value) and self.world.size == 1:
            self._diverged(f"the loss became {value}", images)
        return value

    def _autocast(self) -> torch.autocast:
        amp = self.settings.amp
        return torch.autocast(self.world.device.type, dtype=amp, enabled=amp is not None)

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
            for stabilizer in self.stabilizers:
                stabilizer.after_update(p.updates / self.updates)
        if self.ema is not None:
            self.ema.update(self.model, step=p.updates)
        self.pair.update_rates(p.updates)

    def _note_step(self, images_per_second: float) -> None:
        """A row of the metrics. The newest are part of the progress: a run that goes on or goes back has each once."""
        p, rates = self.progress, self.pair.rates()
        p.steps.append({
            "epoch": p.epoch, "batch": p.batch, "batches": self.batches, "train_loss": p.loss_sum / p.batch,
            "lr_weights": rates[0], "lr_steps": rates[1], "images_per_second": round(images_per_second, 1),
        })  # fmt: skip
        del p.steps[:-STEPS_KEPT]
        self.watcher.step(p.steps[-1])

    def _finish_epoch(self, started: float) -> None:
        p = self.progress
        self.share_running_statistics(self.settings.dist_bn)
        if self.world.anywhere(first_bad_layer(self.model) is not None):
            self._diverged("the model is not finite")
        score = self.choose(self.candidate)
        rates = self.pair.rates()
        row = {
            "epoch": p.epoch, "train_loss": p.loss_sum / self.batches, "eval_loss": score.loss, "eval_top1": score.top1,
            "eval_top5": score.top5, "lr_weights": rates[0], "lr_steps": rates[1],
            "seconds": round(time.monotonic() - started, 2), "note": p.note,
        }  # fmt: skip
        p.rows.append(row)
        # On a small split many epochs are equally right; the loss tells them apart.
        better = p.best is None or (score.top1, -score.loss) > (p.best["top1"], -p.best["loss"])
        better = better and self.settings.choosing
        if better:
            p.best = {"top1": score.top1, "top5": score.top5, "loss": score.loss, "epoch": p.epoch}
        p.epoch, p.batch = p.epoch + 1, 0
        if better:
            self.save("best")
        self.save("last")
        if self.world.primary:
            (self.folder / "recovery.safetensors").unlink(missing_ok=True)
        self.world.wait()
        self.watcher.epoch(p)

    # ---- trouble --------------------------------------------------------------------------------

    def _agree(self, losses: float) -> None:
        """The one small exchange of an update: the loss, whether all is finite, and whether anybody was told to stop.

        All processes see the same numbers, so all of them go back or stop, or none.
        """
        found = 0.0 * losses
        if not self.scaler.is_enabled():  # it meets infinite gradients by itself, with a smaller scale
            found = float(watch.one_number(self.model.parameters(), losses))
        numbers = torch.tensor([losses, found, *self._told()], dtype=torch.float64)
        losses, found, *told = self.world.reduce(numbers, "sum").tolist()
        self.progress.loss_sum += losses / self.world.size
        self._obey(told)
        if not math.isfinite(found):
            self._diverged("the gradients are not finite")

    def _diverged(self, what: str, images: Tensor | None = None) -> NoReturn:
        with self._autocast():
            where = watch.first_bad(self.model, images)
        p = self.progress
        again = " again, after going back once with a tenth of the steps' rate" if "went_back" in p.notes else ""
        raise DivergedError(
            f"training diverged{again}, in epoch {p.epoch + 1}, update {p.updates}: {what}", where=where,
            fix="lower --lr or --steps-lr, or clip with --clip-grad 1.0; all checkpoints are kept",
        )  # fmt: skip

    def _go_back(self, trouble: DivergedError) -> None:
        """Once in a run: to the start of the epoch, with a smaller rate of the steps; then never again.

        Not to a recovery: when that was written may depend on the clock, and a run must not.
        """
        at, steps = self.progress, self.pair.optimizers.get("steps")
        if "went_back" in at.notes or steps is None:
            raise trouble
        saved = checkpoint.latest(self.folder, self.watcher.say, ("last", "previous"))
        if saved is None:
            raise trouble
        self.pair.zero_grad()
        self.restore(saved)
        watch.slow_down(steps)
        where = "" if trouble.where is None else f"{trouble.where}: "
        note = f"{where}{trouble.what}; went back to the start of epoch {at.epoch + 1}, with a tenth of the steps' rate"
        self.progress.notes["went_back"] = {"epoch": self.progress.epoch, "note": note}
        self.watcher.say(f"  {note}")
        self.world.wait()
        self.save("recovery")  # so that a resumed run knows, too
        self.watcher.write(self.progress)  # without what the epoch had logged

    def _told(self) -> list[float]:
        """Which signals this process was sent."""
        return [float(number in self.signals.told) for number in SIGNALS]

    def _obey(self, told: list[float]) -> None:
        """Take the signal that anybody was sent: the sums of `_told` over all processes."""
        self.stopped_by = next((number for number, count in zip(SIGNALS, told, strict=True) if count), None)

    def _interrupt(self, what: str) -> NoReturn:
        raise Interrupted(self.stopped_by, f"interrupted; {what} was written",
                          fix="go on with the same command and --resume auto")  # fmt: skip

    def _stop_after_epoch(self) -> None:
        """For a signal that came while the epoch was evaluated: `last` has all of it."""
        self._obey(self.world.reduce(torch.tensor(self._told()), "sum").tolist())
        if self.stopped_by is not None:
            self._interrupt("the checkpoint of this epoch")

    def _stop_or_save(self) -> None:
        s, p = self.settings, self.progress
        stopped = self.stopped_by is not None
        due = time.monotonic() - self.saved_at > s.recovery_seconds
        if not (stopped or due or (s.recovery_steps and p.updates % s.recovery_steps == 0)):
            return
        bad = first_bad_layer(self.model) is not None
        if self.world.anywhere(bad) if stopped else bad:
            return  # never saved; the next update notices it, in all processes alike
        self.save("recovery")
        if stopped:
            self.world.wait()
            self._interrupt("a recovery checkpoint")
