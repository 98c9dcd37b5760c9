"""How loader processes behave when a run is interrupted."""

from __future__ import annotations

import functools
import mmap
import multiprocessing.util
import os
import signal


def start_worker(_: int, ending: mmap.mmap | None = None) -> None:
    """Leave Ctrl-C, and a SIGTERM to the whole group (torchrun, slurm), to the main process.

    It finishes its step with the workers' help, saves, and stops them. Without this they would die first, or, under
    a handler that they inherited, never.

    Args:
        ending: one byte shared with the main process, not 0 from the moment when that ends its children.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if ending is None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    else:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending[0] else None)


@functools.cache
def ending_byte(process: int) -> mmap.mmap:
    """The shared byte of this process; written by multiprocessing just before it terminates what is left."""
    byte = mmap.mmap(-1, 1)
    multiprocessing.util.Finalize(None, byte.__setitem__, args=(0, 1), exitpriority=100)
    return byte
