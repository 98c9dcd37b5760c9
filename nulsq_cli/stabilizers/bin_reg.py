"""Bin regularization: the weights of every bin collapse onto its level. Han et al., ICCV 2021, pp. 5261-5270."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli.ops.codebook import decode, decode_with_gradient, sum_by_code
from nulsq_cli.stabilizers.base import Penalty


class BinReg(Penalty):
    """Bins count alike, however few weights they hold; the levels move towards their weights, too.

    Where a method gives its levels another scale than its weights have, the weights gather in the middle
    of their bins, and the levels are left to the task; see `Quantizer.targets`.
    """

    def term(self, weight: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
        """The spread of the bins of one layer."""
        return spread(weight, codes, targets)


def spread(weight: Tensor, codes: Tensor, targets: Tensor) -> Tensor:
    """Squared distance of weights to the level of their bin: the mean over each bin, summed over bins.

    That mean is the squared distance of the bin's mean to the level plus the bin's variance, the two terms
    of the paper. Empty bins count as 0. Several tables, one per channel, are averaged, so that the
    strength means the same with one table and with many (ours: the paper has one).

    Args:
        weight: (...) or (C, ...).
        codes: integers in 0..K-1, shaped like weight; they have no gradient.
        targets: (K,) or (C, K), the levels.

    Returns:
        (), at least 0. Gradient to a weight: 2 (w - L) / n, n being how many share its bin;
        to a level: 2 (L - mean of its bin).

    Source: equations 5 to 7 of the paper.
    """
    tables = targets.numel() // targets.shape[-1]
    count = sum_by_code(codes, torch.ones_like(weight), targets.shape)
    share = decode(codes, (1 / count.clamp_min(1)).to(weight.dtype))
    return ((weight - decode_with_gradient(codes, targets)).square() * share).sum() / tables
