"""The curvature of the loss at rounded tensors, for quantizers that scale gradients by it (EWGS)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nulsq_cli.layers import without
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.training.order import reseed
from nulsq_cli.training.world import World

PROBES = 50
TOLERANCE = 1e-3


def follow(model: nn.Module, quantizers: Sequence[Quantizer], loader: Callable[[], Iterable[tuple[Tensor, Tensor]]],
           epoch: int, seed: int, world: World) -> None:  # fmt: skip
    """Measure for the quantizers that want it in this epoch, and tell them; without any, no image is read.

    Neither a parameter nor a buffer of anything else changes.

    Args:
        model: in training mode.
        quantizers: of the model.
        loader: starts a pass over training batches.
        epoch: of the run, from 0.
        seed: of the run; the probes are drawn from it.
        world: the processes; each measures on its own images, and all take the mean.
    """
    wanted = {q: count for q in quantizers if q.steps() and (count := q.curvature_batches(epoch))}
    if not wanted:
        return
    reseed(seed, epoch, world.rank)
    generator = torch.Generator(world.device).manual_seed(torch.initial_seed())
    kept = [(b, b.clone()) for b in model.buffers()]
    rows = []
    for images, target in islice(loader(), max(wanted.values())):
        with without(model, "_compiled_call_impl"):  # a graph compiled by torch has no second derivative
            rows.append(ratios(model, list(wanted), images.to(world.device), target.to(world.device), generator))
        for buffer, before in kept:  # statistics that follow training batches
            buffer.copy_(before)
    found = torch.stack(rows).mean(0) if rows else torch.zeros(len(wanted), dtype=torch.float64)
    found = world.reduce(found, "sum") / world.size
    for quantizer, ratio in zip(wanted, found.tolist(), strict=True):
        quantizer.follow_curvature(ratio)


def ratios(model: nn.Module, quantizers: Sequence[Quantizer], images: Tensor, target: Tensor, generator: torch.Generator,
           probes: int = PROBES, tolerance: float = TOLERANCE) -> Tensor:  # fmt: skip
    """The mean curvature at each rounded tensor over the standard deviation of its gradient.

    The mean curvature is the trace of the Hessian over the number of entries, found by Hutchinson's
    method: the mean of v * Hv, v random signs. One v covers the tensors of all quantizers (ours; the
    authors take them one after the other): what they share has mean 0.

    Args:
        model: images to logits.
        quantizers: of the model, each with a `rounded` when `watched`.
        images: (N, C, H, W).
        target: (N,) classes.
        generator: draws the signs.
        probes: how many at most.
        tolerance: it is enough when one more changes every mean by less than this share.

    Returns:
        A float64 value per quantizer, on the CPU; 0 where the tensor has no part in the loss.

    Source: EWGS, arXiv:2104.00903, section 3.3, with the constants of its released code.
    """
    for q in quantizers:
        q.watched = True
    try:
        # Attention's fast kernels have no second derivative.
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            loss = F.cross_entropy(model(images).float(), target)
            places = [q.rounded for q in quantizers]
            slopes = torch.autograd.grad(loss, places, create_graph=True, allow_unused=True)
            slopes = [torch.zeros_like(x) if g is None else g for g, x in zip(slopes, places, strict=True)]
            curvature = _traces(slopes, places, generator, probes, tolerance)
    finally:
        for q in quantizers:
            q.watched, q.rounded = False, None
    spread = torch.stack([g.detach().double().std() if g.numel() > 1 else g.new_zeros((), dtype=torch.float64) for g in slopes])
    return (curvature / spread).nan_to_num(0.0, 0.0, 0.0).cpu()


def _traces(slopes: list[Tensor], places: list[Tensor], generator: torch.Generator, probes: int, tolerance: float) -> Tensor:
    curved = [g for g in slopes if g.requires_grad]
    total = torch.zeros(len(places), dtype=torch.float64, device=places[0].device)
    if not curved:
        return total
    for number in range(1, probes + 1):
        signs = [torch.randint(0, 2, x.shape, generator=generator, device=x.device).to(x.dtype) * 2 - 1 for x in places]
        pushed = [v for v, g in zip(signs, slopes, strict=True) if g.requires_grad]
        found = torch.autograd.grad(curved, places, pushed, retain_graph=True, allow_unused=True)
        before = total / max(number - 1, 1)
        total += torch.stack([
            x.new_zeros((), dtype=torch.float64) if hv is None else (v * hv).mean(dtype=torch.float64)
            for x, v, hv in zip(places, signs, found, strict=True)
        ])  # fmt: skip
        if number > 1 and bool(((total / number - before).abs() < tolerance * before.abs()).all()):
            break
    return total / number
