"""How strong a stabilizer is at a point of training."""

from __future__ import annotations

import math


def cosine(progress: float, begin: float, first: float, last: float) -> float:
    """Off, then half a cosine from one number to another.

    Args:
        progress: updates done as a share of all, 0 to 1.
        begin: the share before which it is off.
        first, last: the numbers at `begin` and at the end.

    Returns:
        0 before `begin`; afterwards last + (first - last) * (1 + cos(pi * r)) / 2, r from 0 at `begin` to 1 at the end.

    Source: Nagel et al., ICML 2022, arXiv:2203.11086, for dampening and freezing alike.
    """
    if progress < begin:
        return 0.0
    rest = min((progress - begin) / max(1 - begin, 1e-12), 1.0)
    return last + (first - last) * (1 + math.cos(math.pi * rest)) / 2
