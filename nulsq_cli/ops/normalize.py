"""Weights with mean 0 and standard deviation 1, as some methods quantize them."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_STD = 1e-8


def moments(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of each row, (rows, 1) both; differentiable.

    Args:
        x: (...), whose first dimension is split into `rows`.
        rows: 1, or the number of output channels.
    """
    flat = x.reshape(rows, -1)
    std = flat.std(1, keepdim=True) if flat.shape[1] > 1 else flat.abs()
    return flat.mean(1, keepdim=True), std.clamp_min(SMALLEST_STD)


def standardize(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x - mean) / std, shaped like x.

    Args:
        x: (...), whose first dimension is split into the rows of `mean`.
        mean, std: (rows, 1), as from `moments`.
    """
    return ((x.reshape(len(mean), -1) - mean) / std).view(x.shape)


def unfold(levels: Tensor, thresholds: Tensor, mean: Tensor, std: Tensor, rescale: bool) -> tuple[Tensor, Tensor]:
    """Tables on standardized weights as tables on the raw ones.

    Args:
        levels, thresholds: (rows, K) and (rows, K-1), or without the rows when there is one.
        mean, std: (rows, 1), as from `moments`.
        rescale: whether what comes out of the quantizer is multiplied by std again.

    Returns:
        Levels and thresholds, of the shapes that came in.
    """
    if levels.ndim == 1:
        mean, std = mean[0], std[0]
    return (levels * std if rescale else levels), torch.addcmul(mean, std, thresholds)
