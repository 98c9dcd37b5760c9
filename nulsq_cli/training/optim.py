"""Two optimizers, one for weights and one for steps, each with its own schedule on one count of updates."""

from __future__ import annotations

from typing import Any

import timm.optim
import timm.scheduler
from torch import nn
from torch.optim import Optimizer

from nulsq_cli.errors import UsageError
from nulsq_cli.layers import quantizers


class Pair:
    """The weights' optimizer and schedule beside those of the steps; the latter are None in a float model."""

    def __init__(self, model: nn.Module, weights: dict[str, Any], steps: dict[str, Any], schedule: dict[str, Any],
                 epochs: int, updates_per_epoch: int) -> None:  # fmt: skip
        """Build both.

        Args:
            model: a converted or float model.
            weights: opt, lr, weight_decay, momentum, filter_bias_and_bn, layer_decay, kwargs.
            steps: opt, lr, weight_decay, momentum, kwargs.
            schedule: sched, warmup_epochs, warmup_lr, min_lr; the rates are those of the weights, and the
                steps follow the same shape in proportion: absolute ones would lift small step rates.
            epochs, updates_per_epoch: the length of the schedule.
        """
        step_parameters = {p: name for name, q in quantizers(model).items() for p in q.steps()}
        for p in step_parameters:
            p.is_step = True  # type: ignore[attr-defined]
        self.weight_parameters = [p for p in model.parameters() if p.requires_grad and p not in step_parameters]
        self.optimizers: dict[str, Optimizer] = {"weights": _optimizer(_weight_groups(model, weights, step_parameters), weights)}
        if step_parameters:
            self.optimizers["steps"] = _optimizer([{"params": list(step_parameters)}], _at_once(steps))
        self._check(model)
        self._length = schedule, epochs, updates_per_epoch, weights["lr"]
        self.schedulers = {}
        for name, optimizer in self.optimizers.items():
            scale = 1.0 if name == "weights" else steps["lr"] / weights["lr"] if weights["lr"] else 0.0
            self.schedulers[name] = _scheduler(optimizer, schedule, scale, epochs, updates_per_epoch)

    def add(self, name: str, parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
        """One more optimizer, for another network, on the same schedule in proportion.

        Args:
            name: of the optimizer in checkpoints.
            parameters: what it trains.
            options: as for the weights.
        """
        schedule, epochs, updates_per_epoch, rate = self._length
        self.optimizers[name] = _optimizer([{"params": parameters}], options)
        scale = options["lr"] / rate if rate else 0.0
        self.schedulers[name] = _scheduler(self.optimizers[name], schedule, scale, epochs, updates_per_epoch)

    def _check(self, model: nn.Module) -> None:
        """Every parameter that is trained is in exactly one group: no step is forgotten, none is taken twice."""
        placed = [id(p) for o in self.optimizers.values() for g in o.param_groups for p in g["params"]]
        wanted = {id(p) for p in model.parameters() if p.requires_grad}
        assert len(placed) == len(set(placed)) and set(placed) == wanted, "a parameter is in no group, or in two"

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def update_rates(self, updates: int) -> None:
        """Set the learning rates that hold for the update after `updates` updates."""
        for scheduler in self.schedulers.values():
            if scheduler is not None:
                scheduler.step_update(updates)

    def rates(self) -> tuple[float, float | None]:
        """The learning rates of weights and steps."""
        found = {name: optimizer.param_groups[0]["lr"] for name, optimizer in self.optimizers.items()}
        return found["weights"], found.get("steps")


def warmup(wanted: int, epochs: int) -> int:
    """Epochs of warm-up: as many as are wanted, as long as one is left after it."""
    return min(wanted, max(epochs - 1, 0))


def _at_once(options: dict[str, Any]) -> dict[str, Any]:
    """With one call for all tensors, where the optimizer has that: there are many steps, of a few numbers each.

    Not for SGD: where the scaled loss of the first update overflows, torch's leaves its momentum unset.
    """
    own = options.get("kwargs", {})
    if options["opt"] not in ("adamw", "adam") or own.keys() & {"fused", "foreach", "differentiable"}:
        return options
    return {**options, "kwargs": {**own, "fused": True}}


def _weight_groups(model: nn.Module, options: dict[str, Any], steps: dict[nn.Parameter, str]) -> list[dict[str, Any]]:
    if options.get("layer_decay"):
        groups = timm.optim.param_groups_layer_decay(model, options["weight_decay"], layer_decay=options["layer_decay"])
    elif options["filter_bias_and_bn"]:
        groups = timm.optim.param_groups_weight_decay(model, options["weight_decay"])
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    groups = [{**g, "params": [p for p in g["params"] if p not in steps]} for g in groups]
    return [g for g in groups if g["params"]]


def _optimizer(groups: list[dict[str, Any]], options: dict[str, Any]) -> Optimizer:
    try:
        return timm.optim.create_optimizer_v2(
            groups, opt=options["opt"], lr=options["lr"], weight_decay=options["weight_decay"],
            momentum=options["momentum"], **options.get("kwargs", {}),
        )  # fmt: skip
    except (ValueError, TypeError, AssertionError) as reason:
        raise UsageError(f"the optimizer {options['opt']!r} cannot be made: {reason}",
                         fix="choose one that timm.optim.list_optimizers() names") from reason  # fmt: skip


def _scheduler(optimizer: Optimizer, options: dict[str, Any], scale: float, epochs: int, updates: int) -> Any:
    try:
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer, sched=options["sched"], num_epochs=max(epochs, 1), min_lr=options["min_lr"] * scale,
            warmup_lr=options["warmup_lr"] * scale, warmup_epochs=warmup(options["warmup_epochs"], epochs),
            step_on_epochs=False, updates_per_epoch=updates,
        )  # fmt: skip
    except (ValueError, AssertionError, NotImplementedError) as reason:
        raise UsageError(f"the schedule {options['sched']!r} cannot be made: {reason}", fix="try cosine") from reason
    return scheduler
