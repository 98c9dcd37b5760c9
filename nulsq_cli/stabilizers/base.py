"""What every stabilizer is: some quantized layers, a schedule, and a loss term or something to do after updates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nulsq_cli.errors import UsageError
from nulsq_cli.ops import codebook
from nulsq_cli.stabilizers.schedule import cosine


class Stabilizer:
    """Base of all stabilizers.

    Args:
        layers: quantized layers by module path.
        begin, first, last: the schedule of what the stabilizer schedules; see `cosine`.
        widest: layers whose weights have more bits than this are left alone, and so are float ones.

    Raises:
        UsageError: no layer is left.
    """

    def __init__(self, layers: Mapping[str, nn.Module], *, begin: float, first: float, last: float, widest: int) -> None:
        self.schedule = begin, first, last
        self.layers = [
            layer for layer in layers.values()
            if layer.weight_quantizer is not None and layer.weight_quantizer.spec.bits <= widest
        ]  # fmt: skip
        if not self.layers:
            raise UsageError(f"no layer has weights of at most {widest} bits, so there is nothing to stabilize",
                             fix="raise the stabilizer's `widest`, or leave it out")  # fmt: skip

    def now(self, progress: float) -> float:
        """The scheduled number when `progress` of all updates, 0 to 1, is done."""
        return cosine(progress, *self.schedule)

    def penalty(self, progress: float) -> Tensor | None:
        """A term of the loss, (), or None. It is wanted for every batch."""
        return None

    def after_update(self, progress: float) -> None:
        """Called once after every optimizer update, however many batches it gathered, and at no other time."""


class Penalty(Stabilizer):
    """A stabilizer that is a loss term over weights, summed over layers and weighted by its schedule."""

    def term(self, weight: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
        """The term of one layer, ().

        Args:
            weight: float32, with a gradient.
            codes: uint8, shaped like weight.
            targets: (K,) or (C, K), where weights of each code should lie; with a gradient where levels have one.
        """
        raise NotImplementedError

    def penalty(self, progress: float) -> Tensor | None:
        """The sum of the layers' terms; None while the schedule is at 0. In float32 also under autocast."""
        strength = self.now(progress)
        if not strength:
            return None
        with torch.autocast(self.layers[0].weight.device.type, enabled=False):
            terms = [self.term(layer.weight.float(), *bins(layer)) for layer in self.layers]
            return strength * torch.stack(terms).sum()


def bins(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The bin of every weight of a layer, and where in it a weight is best off.

    Returns:
        Codes, uint8, shaped like the weight; targets, (K,) or (C, K), see `Quantizer.targets`.
    """
    weight = layer.weight.detach().float()
    quantizer = layer.weight_quantizer
    return codebook.encode(weight, quantizer.codebook(weight).thresholds), quantizer.targets(weight)
