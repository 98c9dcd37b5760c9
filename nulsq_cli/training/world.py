"""The processes that train together, or the only one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nulsq_cli.errors import UsageError, first_line

T = TypeVar("T")

MEETING_PLACE = "NULSQ_RENDEZVOUS"
"""Where `nulsq finetune --nproc-per-node` lets its processes meet; without it, where torchrun does."""

PATIENCE = timedelta(seconds=20)


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and where it computes. `local` counts on this machine only."""

    rank: int
    size: int
    device: torch.device
    local: int = 0

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

    def anywhere(self, here: bool) -> bool:
        """Whether something holds in at least one process."""
        return bool(self.reduce(torch.tensor(float(here)), "max"))

    def share(self, value: T) -> T:
        """What the first process has, in all of them; anything small."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """One process of each machine goes ahead, to download and unpack; the others then find everything there."""
        if self.local:
            self.wait()
        yield
        if not self.local:
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Take leave of the others."""
        if self.size > 1:
            dist.destroy_process_group()


def compute_the_same(always: bool) -> None:
    """Let torch take only algorithms that compute the same every time, or any; before CUDA starts.

    Args:
        always: torch then raises where there is none. cuBLAS has some only with a workspace of fixed size, which
            a variable says that it reads when it starts.
    """
    if always:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(always)


def join(device: str = "auto") -> World:
    """Find the other processes by the variables that torchrun sets, and pick a device.

    Raises:
        UsageError: the device does not exist here.
    """
    rank, size, local = _place()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    own = device == "cuda" and size > 1  # a GPU for each process; `cuda:0` is one for all of them, which NCCL refuses
    try:
        chosen = torch.device(device, local) if own else torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as reason:
        fix = "start no more processes than there are GPUs, or try --device cpu" if own else "try --device cpu"
        raise UsageError(f"the device {str(chosen) if own else device!r} cannot be used: {first_line(reason)}",
                         fix=fix) from reason  # fmt: skip
    if own:
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous(os.environ.get(MEETING_PLACE, "env://"), rank, size))
        dist.init_process_group("nccl" if own else "gloo", store=store, rank=rank, world_size=size)
    return World(rank, size, chosen, local)


def _place() -> tuple[int, int, int]:
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    return rank, size, local


# ---- ends -----------------------------------------------------------------------------------------


def speak_once(text: str, exit_code: int) -> int:
    """Print why this process ends, unless another one already did: of many that fail, the first knows the reason.

    The others wait until that one has spoken, because torchrun ends all processes as soon as one has ended.

    Returns:
        The exit code of the process that spoke.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, size, _ = _place()
    store = None
    try:
        store, _, _ = next(dist.rendezvous(os.environ.get(MEETING_PLACE, "env://"), rank, size, timeout=PATIENCE))
        store.set_timeout(PATIENCE)
        if store.add("nulsq/failed", 1) > 1:
            return int(store.get("nulsq/spoken"))
    except (RuntimeError, ValueError):  # the meeting place went with the process that kept it
        store = None
        if rank:
            return exit_code
    print(text, file=sys.stderr, flush=True)
    if store is not None:
        store.set("nulsq/spoken", str(exit_code))
    return exit_code


def lost_another(error: BaseException) -> bool:
    """Whether an error means that another process has ended, or cannot be reached any more."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
