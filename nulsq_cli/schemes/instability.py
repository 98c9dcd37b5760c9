"""How much a layer's output is shaken when its weight codes change: the AIWQ metric of PROFIT, arXiv:2008.04693."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli.layers import QuantLayer, evaluating, quant_layers
from nulsq_cli.ops import codebook

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


def by_tables(layer: QuantLayer, x: Tensor) -> Tensor:
    """The layer's input as its tables have it; a quantizer in training would fit itself to x, or forget its gradient."""
    if layer.input_quantizer is None:
        return x
    with evaluating(layer.input_quantizer):
        return layer.quantized_input(x)


def packed_weight(layer: QuantLayer) -> Tensor:
    """The layer's weight as it would be packed, which changes nothing in its quantizer either."""
    tables, codes = layer.weight_codes()
    return codebook.decode(codes, tables.levels)


class Instability(nn.Module):
    """Watches the training forwards of every layer with quantized weights; all it knows is in buffers.

    Args:
        model: a converted model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        layers = {name: m for name, m in quant_layers(model).items() if m.weight_quantizer is not None}
        self.names = list(layers)
        self.register_buffer("averages", torch.full((len(layers),), float("nan"), dtype=torch.float64))
        with torch.no_grad():
            for index, layer in enumerate(layers.values()):
                self.register_buffer(f"weight_{index}", packed_weight(layer).clone())
        self._hooks = [layer.register_forward_hook(self._hook(index)) for index, layer in enumerate(layers.values())]

    def scores(self) -> dict[str, float]:
        """Layer -> moving average; a layer whose codes never changed was never shaken."""
        return dict(zip(self.names, self.averages.nan_to_num(0.0).tolist(), strict=True))

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()

    def _hook(self, index: int) -> Any:
        @torch.no_grad()
        def look(layer: QuantLayer, args: tuple[Tensor], output: Tensor) -> None:
            if not layer.training:
                return
            weight, before = packed_weight(layer), getattr(self, f"weight_{index}").clone()
            getattr(self, f"weight_{index}").copy_(weight)
            if torch.equal(before, weight):
                return
            x = by_tables(layer, args[0])
            channel = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
            found = divergence(layer.compute(x, before), layer.compute(x, weight), channel)
            if found is not None and found <= LARGEST:
                known = self.averages[index]
                self.averages[index] = found if known.isnan() else MOMENTUM * known + (1 - MOMENTUM) * found

        return look


def most_unstable(scores: dict[str, float], share: float) -> list[str]:
    """The names of that share of the layers, the most unstable first; ties by name."""
    order = sorted(scores, key=lambda name: (-scores[name], name))
    return order[: round(share * len(order))]
