"""How much a layer's output is shaken when its weight codes change: the AIWQ metric of PROFIT, arXiv:2008.04693."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli.layers import QuantLayer, quant_layers

MOMENTUM = 0.999
LARGEST = 1.0
"""A divergence above this is an outlier and is not counted, as in the authors' code."""


def divergence(before: Tensor, after: Tensor, channel: int) -> float | None:
    """Mean over channels of the divergence between two Gaussians fitted to outputs of the same input.

    Args:
        before, after: outputs with the previous and with the current quantized weight, same shape.
        channel: which dimension is the channel.

    Returns:
        log(sd_before / sd_after) + (sd_after^2 + (mean_after - mean_before)^2) / (2 sd_before^2) - 1/2; channels
        that do not vary are left out; None when none is left.
    """
    rows = [t.detach().double().movedim(channel, 0).flatten(1) for t in (before, after)]
    (m0, s0), (m1, s1) = ((r.mean(1), r.std(1)) for r in rows)
    varying = (s0 > 0) & (s1 > 0)
    if not varying.any():
        return None
    m0, s0, m1, s1 = (t[varying] for t in (m0, s0, m1, s1))
    return float(((s0 / s1).log() + (s1.square() + (m1 - m0).square()) / (2 * s0.square()) - 0.5).mean())


class Instability:
    """Watches the training forwards of every layer with quantized weights.

    Args:
        model: a converted model.
        scores: what was measured before, to go on with; layer -> moving average.
    """

    def __init__(self, model: nn.Module, scores: dict[str, float] | None = None) -> None:
        self.scores: dict[str, float] = dict(scores or {})
        self._before: dict[str, Tensor] = {}
        self._hooks = [
            layer.register_forward_hook(self._hook(name))
            for name, layer in quant_layers(model).items() if layer.weight_quantizer is not None
        ]  # fmt: skip

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def look(layer: QuantLayer, args: tuple[Tensor], output: Tensor) -> None:
            if not layer.training:
                return
            weight = layer.quantized_weight().detach()
            before = self._before.get(name)
            self._before[name] = weight
            if before is None or torch.equal(before, weight):
                return
            x = layer.quantized_input(args[0])
            channel = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
            found = divergence(layer.compute(x, before), layer.compute(x, weight), channel)
            if found is not None and found <= LARGEST:
                known = self.scores.get(name)
                self.scores[name] = found if known is None else MOMENTUM * known + (1 - MOMENTUM) * found

        return look


def most_unstable(scores: dict[str, float], share: float) -> list[str]:
    """The names of that share of the layers, the most unstable first; ties by name."""
    order = sorted(scores, key=lambda name: (-scores[name], name))
    return order[: round(share * len(order))]
