"""Is everything still finite? And if not: where did it begin, and what is changed for the one more try?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nulsq_cli.calibrate import first_bad_layer

SLOWER = 0.1


def one_number(parameters: Iterable[nn.Parameter], loss: float) -> Tensor:
    """A number that is finite if the loss and all gradients are: one fused norm, looked at once per update.

    Args:
        parameters: after backward; those without a gradient do not count.
        loss: of the batches behind the gradients.

    Returns:
        () float, not finite if anything is not (or if the norm is beyond float32, which ends the same way).
    """
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.float() + 0.0 * loss


@torch.no_grad()
def first_bad(model: nn.Module, images: Tensor | None = None) -> str | None:
    """Where trouble began, by name; None when nothing is wrong.

    Looks at parameters in the model's order; then, with images, at these and at what the layers make of them, in the
    order in which they compute; then at gradients from the last layer back, for that is how they are made; then at
    buffers, which only record what went by.

    Args:
        model: in the mode in which the trouble appeared.
        images: (N, C, H, W), a batch that made the loss go wrong.
    """
    named = list(model.named_parameters())
    if bad := next((name for name, p in named if not _finite(p)), None):
        return bad
    if images is not None:
        if not _finite(images):
            return "the images"
        if bad := _first_bad_output(model, images):
            return bad
    for name, p in reversed(named):
        if p.grad is not None and not _finite(p.grad):
            return f"the gradient of {name}"
    return first_bad_layer(model)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _first_bad_output(model: nn.Module, images: Tensor) -> str | None:
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not _finite(output):
                found.append(f"the output of {name}")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def slow_down(optimizer: Optimizer, factor: float = SLOWER) -> None:
    """Multiply an optimizer's rate from now on: timm's schedules honour `lr_scale`, and a checkpoint keeps it."""
    for group in optimizer.param_groups:
        group["lr_scale"] = group.get("lr_scale", 1.0) * factor
        group["lr"] *= factor  # where there is no schedule
