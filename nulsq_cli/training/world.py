"""The processes that train together, or the only one."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nulsq_cli.errors import UsageError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def primary(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """All-reduce by `sum`, `min` or `max`; the result is on the CPU."""
        if self.size == 1:
            return values
        moved = values.to(self.device)
        dist.all_reduce(moved, {"sum": dist.ReduceOp.SUM, "min": dist.ReduceOp.MIN, "max": dist.ReduceOp.MAX}[how])
        return moved.cpu()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Take leave of the others."""
        if self.size > 1:
            dist.destroy_process_group()


def join(device: str = "auto") -> World:
    """Find the other processes by the variables that torchrun sets, and pick a device.

    Raises:
        UsageError: the device does not exist here.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device, local) if device == "cuda" and size > 1 else torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as reason:
        raise UsageError(f"the device {device!r} cannot be used: {str(reason).splitlines()[0]}",
                         fix="try --device cpu") from reason  # fmt: skip
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    return World(rank, size, chosen)
