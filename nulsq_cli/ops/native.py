"""The quantizer ops on a CPU as compiled loops: `loops.cpp`, built once on the user's machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nulsq_cli.errors import InputError, first_line
from nulsq_cli.files import write_atomically

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("loops.cpp")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
Kind = int | tuple[int, int] | None
"""What a table holds: levels (None), the gaps between them (how many lie below zero), or the step of a grid (its end codes)."""

LARGEST_TABLE, LARGEST_TRAINED_TABLE = 256, 16
WORTH_THREADS = 1 << 15
"""Entries from which on more than one thread pays. The result does not depend on it."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled loops, from the cache or built now; None, said once, where that cannot be done."""
    try:
        built = _cached()
        if not built.exists():
            write_atomically(built, _build)
        loaded = ctypes.CDLL(str(built))
    except (OSError, InputError, subprocess.SubprocessError, RuntimeError) as reason:
        log.warning("quantizers run uncompiled, which is slower: %s", first_line(reason))
        return None
    data, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    end = ctypes.c_float
    loaded.nulsq_lookup.argtypes = [data, data, data, size, size, data, data, number, number, number]
    loaded.nulsq_levels_backward.argtypes = [data, data, data, size, size, data, data, number, number, number, data, number]
    loaded.nulsq_grid.argtypes = [data, data, data, size, size, data, end, end, number]
    loaded.nulsq_grid_backward.argtypes = [data, data, data, size, size, data, data, end, end, number, data, number]
    loaded.nulsq_around.argtypes = loaded.nulsq_around_backward.argtypes = [data, data, number, number, number]
    loaded.nulsq_keep_positive.argtypes = [data, number, number, end, end]
    loaded.nulsq_moments.argtypes = [data, size, data, number]
    loaded.nulsq_histogram.argtypes = [data, size, ctypes.c_double, data, number, number]
    for name in ("lookup", "levels_backward", "grid", "grid_backward", "around", "around_backward", "keep_positive", "moments",
                 "histogram"):  # fmt: skip
        getattr(loaded, f"nulsq_{name}").restype = None
    return loaded


def _cached() -> Path:
    """Where the library of this source and this kind of processor lies, or will lie."""
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode() + _processor().encode()).hexdigest()[:16]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nulsq"
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        usable = os.access(home, os.W_OK | os.X_OK)
    except OSError:
        usable = False
    if not usable:
        home = Path(tempfile.mkdtemp(prefix="nulsq-"))
    return home / f"loops-{key}.so"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(target: Path) -> None:
    compiler = os.environ.get("CXX") or next((found for name in ("g++", "c++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler (g++, c++ or clang++) was found")
    for threads in (["-fopenmp"], []):  # some compilers come without OpenMP
        command = [compiler, *FLAGS, *threads, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")


def lookup(x: Tensor, table: Tensor, thresholds: Tensor | None, negative: int | None = None, *,
           relu: Tensor | None = None, into: Tensor | None = None) -> Tensor:  # fmt: skip
    """`codebook.lookup`; without thresholds, `codebook.nearest`.

    Args:
        x: as there.
        table: levels, (K,) or (C, K), or gaps, (C, K-1).
        thresholds: as there; None for the midpoints of the levels.
        negative: how many gaps lie below zero; None for levels.
        relu: if given, x goes through a ReLU first, whose result is written here: x itself, or of its shape and memory order.
        into: where the quantized result is written, which may be `relu`; a new tensor if None.
    """
    x, table = _dense(x), table.contiguous()
    y = torch.empty_like(x) if into is None else into
    cuts = None if thresholds is None else thresholds.contiguous()
    rows, count, below = _layout(table, negative)
    library().nulsq_lookup(x.data_ptr(), _place(relu), y.data_ptr(), rows, x.numel() // rows,
                           table.data_ptr(), _place(cuts), count, below, _threads(x))  # fmt: skip
    return y


def levels_backward(grad: Tensor, x: Tensor, table: Tensor, negative: int | None = None, *, spent: bool = False,
                    behind_relu: bool = False, others: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`codebook.backward_by`, for tables of at most `LARGEST_TRAINED_TABLE` levels.

    Args:
        grad, x, table, negative: as there.
        spent: nobody reads grad afterwards, so that its memory may hold the gradient to x.
        behind_relu: x is the result of a ReLU, and the gradient is wanted to what went into that.
        others: the gradient that x gets from elsewhere, added before it goes through the ReLU.
    """
    x, table = _dense(x), table.contiguous()
    grad, others = _like(grad, x), None if others is None else _like(others, x)
    to_x, to_table = grad if spent else torch.empty_like(x), torch.empty_like(table)
    rows, count, below = _layout(table, negative)
    library().nulsq_levels_backward(grad.data_ptr(), x.data_ptr(), to_x.data_ptr(), rows, x.numel() // rows, table.data_ptr(),
                                    to_table.data_ptr(), count, below, behind_relu, _place(others), _threads(x))  # fmt: skip
    return to_x, to_table


def _layout(table: Tensor, negative: int | None) -> tuple[int, int, int]:
    """How many tables there are, of how many levels, and `negative` as C++ wants it."""
    rows, size = (1, len(table)) if table.ndim == 1 else table.shape
    return (rows, size, -1) if negative is None else (rows, size + 1, negative)


def grid(x: Tensor, step: Tensor, lowest: int, highest: int, *, relu: Tensor | None = None) -> Tensor:
    """The forward of `grid.quantize_to_grid`; `relu` as in `lookup`."""
    x, step = _dense(x), step.contiguous()
    y = torch.empty_like(x)
    rows = step.numel()
    library().nulsq_grid(x.data_ptr(), _place(relu), y.data_ptr(), rows, x.numel() // rows, step.data_ptr(), lowest, highest,
                         _threads(x))  # fmt: skip
    return y


def grid_backward(grad: Tensor, x: Tensor, step: Tensor, lowest: int, highest: int, *, spent: bool = False,
                  behind_relu: bool = False, others: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`grid.backward_eager`; `spent`, `behind_relu` and `others` as in `levels_backward`."""
    x, step = _dense(x), step.contiguous()
    grad, others = _like(grad, x), None if others is None else _like(others, x)
    to_x, to_step = grad if spent else torch.empty_like(x), torch.empty_like(step)
    rows = step.numel()
    library().nulsq_grid_backward(grad.data_ptr(), x.data_ptr(), to_x.data_ptr(), rows, x.numel() // rows, step.data_ptr(),
                                  to_step.data_ptr(), lowest, highest, behind_relu, _place(others), _threads(x))  # fmt: skip
    return to_x, to_step


def quantize(x: Tensor, table: Tensor, kind: Kind, *, relu: Tensor | None = None) -> Tensor:
    """`lookup` or `grid`, by what kind of table it is (`Kind`)."""
    return grid(x, table, *kind, relu=relu) if isinstance(kind, tuple) else lookup(x, table, None, kind, relu=relu)


def quantize_backward(grad: Tensor, x: Tensor, table: Tensor, kind: Kind,
                      **more: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`levels_backward` or `grid_backward`, likewise."""
    if isinstance(kind, tuple):
        return grid_backward(grad, x, table, *kind, **more)
    return levels_backward(grad, x, table, kind, **more)


def around(gaps: Tensor, negative: int) -> Tensor:
    """The forward of `codebook.levels_around_zero`."""
    gaps = gaps.contiguous()
    rows, count = gaps.shape
    levels = gaps.new_empty(rows, count + 1)
    library().nulsq_around(gaps.data_ptr(), levels.data_ptr(), rows, count, negative)
    return levels


def around_backward(grad: Tensor, negative: int) -> Tensor:
    """Its backward: (C, N + 1) to (C, N)."""
    grad = grad.contiguous()
    rows, count = grad.shape
    to_gaps = grad.new_empty(rows, count - 1)
    library().nulsq_around_backward(grad.data_ptr(), to_gaps.data_ptr(), rows, count - 1, negative)
    return to_gaps


def keep_positive(steps: Tensor, share: float, smallest: float) -> None:
    """`base.keep_positive` for dense steps: one call for what is done after every update, for every table."""
    count = steps.shape[-1]
    library().nulsq_keep_positive(steps.data_ptr(), steps.numel() // count, count, share, smallest)


def moments(x: Tensor) -> list[float]:
    """Of all entries: their sum, that of their sizes and of their squares, the least and the largest one.

    Sums are in float64, the same bits for any number of threads. Where an entry is not finite, the second is not either.
    """
    found = torch.empty(5, dtype=torch.float64)
    library().nulsq_moments(x.data_ptr(), x.numel(), found.data_ptr(), _threads(x))
    return found.tolist()


def add_histogram(x: Tensor, scale: float, counts: Tensor) -> None:
    """Add every entry to bin floor(x * scale) + N/2 of `counts`, (N,) int64; all of them have to fall into one."""
    library().nulsq_histogram(x.data_ptr(), x.numel(), scale, counts.data_ptr(), len(counts) // 2, _threads(x))


def _threads(x: Tensor) -> int:
    return 1 if x.numel() < WORTH_THREADS else torch.get_num_threads()


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def is_dense(x: Tensor) -> bool:
    """Whether x has no gaps and its first dimension outermost: rows of a table are stretches of memory."""
    return x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or is_dense(x) else x.contiguous()


def _like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in the memory order of x."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
