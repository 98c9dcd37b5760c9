"""Iterative freezing: weights that keep jumping between levels stay where they mostly were. Nagel et al., ICML 2022."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli.ops.codebook import decode, decode_with_gradient
from nulsq_cli.stabilizers.base import Stabilizer, bins


class Freezing(Stabilizer):
    """Schedules the frequency of oscillations, per update, above which a weight is frozen.

    Oscillations are counted from the start, also while nothing is frozen yet. They are counted per
    update: evaluation, calibration, re-estimation of BatchNorm and the batches that one update gathers
    leave no trace. (The authors' code counts forward passes, those of evaluation included.)

    Args:
        layers: quantized layers by module path; each gets a `weight_freezer`.
        momentum: of the two moving averages; thresholds should lie well above it.
        schedule: begin, first, last, widest.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, momentum: float, **schedule: Any) -> None:
        super().__init__(layers, **schedule)
        self.momentum = momentum
        for layer in self.layers:
            layer.weight_freezer = Freezer(bins(layer)[0])

    @torch.no_grad()
    def after_update(self, progress: float) -> None:
        """Look at the new codes, freeze what oscillates, and put frozen weights on their level.

        The last matters to nothing that is computed from codes. It keeps the weights' statistics, for methods
        that normalise, and the other stabilizers from following a weight that no longer counts.
        """
        threshold = self.now(progress)
        for layer in self.layers:
            freezer = layer.weight_freezer
            codes, targets = bins(layer)
            freezer.observe(codes, threshold, self.momentum)
            layer.weight.copy_(torch.where(freezer.frozen, decode(freezer.code, targets).to(layer.weight.dtype), layer.weight))


class Freezer(nn.Module):
    """What is remembered of every weight of a layer, in buffers: it is saved, restored and averaged with the model.

    Args:
        code: uint8, the codes to start from.
    """

    def __init__(self, code: Tensor) -> None:
        super().__init__()
        self.register_buffer("code", code.clone())  # the last one; of a frozen weight the one it keeps
        self.register_buffer("frozen", torch.zeros_like(code, dtype=torch.bool))
        self.register_buffer("direction", torch.zeros_like(code, dtype=torch.int8))  # of the last change: -1, 1; 0 before any
        self.register_buffer("frequency", torch.zeros_like(code, dtype=torch.float32))  # of changes that take the last one back
        self.register_buffer("mean_code", code.float())

    @torch.no_grad()
    def observe(self, codes: Tensor, threshold: float, momentum: float) -> None:
        """One step of the tracker.

        Args:
            codes: uint8, those after an update; of frozen weights they are ignored.
            threshold: weights that oscillate more often than this, as a share of updates, are frozen; 0: none.
            momentum: share of the newest observation in the averages.

        Source: algorithm 1 of arXiv:2203.11086.
        """
        codes = self.codes(codes)
        direction = (codes.short() - self.code.short()).sign().to(torch.int8)
        self.frequency.lerp_((direction * self.direction == -1).float(), momentum)
        self.direction.copy_(torch.where(direction == 0, self.direction, direction))
        if threshold > 0:
            fresh = (self.frequency > threshold) & ~self.frozen
            codes = torch.where(fresh, self.mean_code.round().to(torch.uint8), codes)
            self.frozen |= fresh
        self.mean_code.lerp_(codes.float(), momentum)
        self.code.copy_(codes)

    def codes(self, codes: Tensor) -> Tensor:
        """These codes, uint8, but those that frozen weights keep."""
        return torch.where(self.frozen, self.code, codes)

    def still(self, weight: Tensor) -> Tensor:
        """The weight, without a gradient to frozen entries, not even through its mean or its standard deviation."""
        return torch.where(self.frozen, weight.detach(), weight)

    def forward(self, quantized: Tensor, levels: Tensor) -> Tensor:
        """The quantized weight with frozen entries at the level of their code.

        Args:
            quantized: what the quantizer made of the weight.
            levels: (K,) or (C, K).

        Returns:
            Like `quantized`. The gradient of a frozen entry goes to its level alone.
        """
        held = decode_with_gradient(self.code, levels).to(quantized.dtype)
        return torch.where(self.frozen, held, quantized)
