"""How many threads compute: as many as torch takes, but one for a tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nulsq_cli.layers import evaluating

WORTH_SHARING = 5e8
"""Floating-point operations in one forward pass of a batch from which on a second thread pays."""


@contextmanager
def threads_kept() -> Iterator[None]:
    """Whatever happens inside, afterwards torch has as many threads as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_threads(model: nn.Module, input_size: Sequence[int], batch_size: int) -> bool:
    """Let one thread compute where the work of a batch is so small that sharing it costs more than it saves.

    Threads wait for each other after each operation, by spinning. In a tiny model that is most of what they do,
    and on a machine with other work, where they are not all running at once, it takes tens of times as long.

    The choice depends on the model and the batch alone, never on the machine's load: the number of threads decides
    the order of sums, and a resumed run has to go on with the same bits. `OMP_NUM_THREADS`, where set, is obeyed.

    Args:
        model: on the device on which it will run; its mode is restored.
        input_size: (C, H, W).
        batch_size: images per batch of this process.

    Returns:
        Whether torch computes in one thread because of this function.
    """
    first = next(model.parameters(), None)
    if first is None or first.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return False
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *input_size, dtype=first.dtype))
    tiny = counter.get_total_flops() * batch_size < WORTH_SHARING
    if tiny:
        torch.set_num_threads(1)
    return tiny
