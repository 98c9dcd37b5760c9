"""Accuracy over all samples of a split, exactly once each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nulsq_cli.layers import evaluating, standing_still
from nulsq_cli.pairing import one_operation
from nulsq_cli.training.world import World
from nulsq_cli.values import Score


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World, *,
    amp: torch.dtype | None = None, memory_format: torch.memory_format = torch.contiguous_format,
    progress: Callable[[int], None] | None = None,
) -> Score:  # fmt: skip
    """Count right answers over what all processes see together.

    Counts are summed, not averages, so that a split that does not divide evenly stays exact.

    Args:
        model: its mode is restored.
        batches: images (N, C, H, W) and class numbers (N,) of this process.
        world: the processes.
        amp: compute under autocast with this type.
        memory_format: of the images; the model's own is the caller's business.
        progress: called with the number of images seen so far.
    """
    sums = torch.zeros(4, dtype=torch.float64)  # right, right among five, loss, samples
    with evaluating(model), standing_still(model):
        for images, target in batches:
            images = images.to(world.device, non_blocking=True, memory_format=memory_format)
            target = target.to(world.device, non_blocking=True)
            autocast = torch.autocast(world.device.type, dtype=amp, enabled=amp is not None)
            with one_operation(model, images), autocast:
                output = model(images)
            output = output.float()
            best = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
            loss = F.cross_entropy(output, target, reduction="sum")
            sums += torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(target))]).double().cpu()
            if progress:
                progress(int(sums[3]))
    right, among_five, loss, samples = world.reduce(sums, "sum").tolist()
    samples = max(int(samples), 1)
    return Score(100 * right / samples, 100 * among_five / samples, loss / samples, samples)
