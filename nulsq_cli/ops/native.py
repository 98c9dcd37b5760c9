"""The quantizer ops on a CPU as compiled loops: C++, built once on the user's machine and kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nulsq_cli.errors import InputError, first_line
from nulsq_cli.files import write_atomically

log = logging.getLogger(__name__)

SOURCES = [Path(__file__).with_name(name) for name in ("loops.cpp", "norm.cpp", "tables.h")]
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=c++17", "-shared", "-fPIC")
Kind = int | tuple[int, int] | None
"""What a table holds: levels (None), the gaps between them (how many lie below zero), or the step of a grid (its end codes)."""

LARGEST_TABLE, LARGEST_TRAINED_TABLE = 256, 16
NO_TOP = math.nan
"""Of a ReLU that ends nowhere: nothing lies above what is not a number."""
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
    data, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    takes = {
        "quantize": [data, data, real, data, size, size, _Rule, number],
        "quantize_backward": [data, data, data, size, size, _Rule, data, number, real, data, number],
        "norm": [data, data, data, data, _Shape, _Norm, number, _Rule, number],
        "norm_backward": [data, data, data, data, data, data, _Shape, _Norm, number, _Rule, data, data, data, number],
        "around": [data, data, number, number, number],
        "around_backward": [data, data, number, number, number],
        "keep_positive": [data, number, number, real, real],
        "moments": [data, size, data, number],
        "histogram": [data, size, ctypes.c_double, data, number, number],
    }
    for name, arguments in takes.items():
        function = getattr(loaded, f"nulsq_{name}")
        function.argtypes, function.restype = arguments, None
    return loaded


class _Rule(ctypes.Structure):
    """How a tensor is quantized, as in tables.h."""

    _fields_ = [("table", ctypes.c_void_p), ("cuts", ctypes.c_void_p), ("count", ctypes.c_int), ("negative", ctypes.c_int),
                ("lowest", ctypes.c_float), ("highest", ctypes.c_float)]  # fmt: skip


class _Shape(ctypes.Structure):
    """(N, C, H, W), as in norm.cpp."""

    _fields_ = [("images", ctypes.c_int64), ("channels", ctypes.c_int64), ("pixels", ctypes.c_int64), ("last", ctypes.c_int)]


class _Norm(ctypes.Structure):
    """A BatchNorm, as in norm.cpp."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var", "facts")),
                ("share", ctypes.c_double), ("eps", ctypes.c_double), ("top", ctypes.c_float)]  # fmt: skip


def _cached() -> Path:
    """Where the library of this source and this kind of processor lies, or will lie."""
    sources = b"".join(map(Path.read_bytes, SOURCES))
    key = hashlib.sha256(sources + " ".join(FLAGS).encode() + _processor().encode()).hexdigest()[:16]
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
        command = [compiler, *FLAGS, *threads, *[str(source) for source in SOURCES if source.suffix == ".cpp"], "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")


def quantize(x: Tensor, table: Tensor, kind: Kind, thresholds: Tensor | None = None, *, relu: Tensor | None = None,
             top: float = NO_TOP, into: Tensor | None = None) -> Tensor:  # fmt: skip
    """`codebook.lookup`; without thresholds, `codebook.nearest` or `grid.nearest`.

    Args:
        x: as there.
        table: levels, (K,) or (C, K), gaps, (C, K-1), or one step or C of them.
        kind: which of them.
        thresholds: of levels, as there; None for their midpoints.
        relu: if given, x goes through a ReLU first, whose result is written here: x itself, or of its shape and memory order.
        top: the largest result of that ReLU.
        into: where the quantized result is written, which may be `relu`; a new tensor if None.
    """
    x, table = _dense(x), table.contiguous()
    cuts = None if thresholds is None else thresholds.contiguous()
    y = torch.empty_like(x) if into is None else into
    rows, rule = _rule(table, kind, cuts)
    library().nulsq_quantize(x.data_ptr(), _place(relu), top, y.data_ptr(), rows, x.numel() // rows, rule, _threads(x))
    return y


def quantize_backward(grad: Tensor, x: Tensor, table: Tensor, kind: Kind, *, spent: bool = False, behind_relu: bool = False,
                      top: float = NO_TOP, others: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`codebook.backward_by`, for tables of at most `LARGEST_TRAINED_TABLE` levels, or `grid.backward_eager`.

    Args:
        grad, x, table: as there.
        kind: of the table.
        spent: nobody reads grad afterwards, so that its memory may hold the gradient to x.
        behind_relu: x is the result of a ReLU, which ends at `top`, and the gradient is wanted to what went into that.
        others: the gradient that x gets from elsewhere, added before it goes through the ReLU.
    """
    x, table = _dense(x), table.contiguous()
    grad, others = _like(grad, x), None if others is None else _like(others, x)
    to_x, to_table = grad if spent else torch.empty_like(x), torch.empty_like(table)
    rows, rule = _rule(table, kind)
    library().nulsq_quantize_backward(grad.data_ptr(), x.data_ptr(), to_x.data_ptr(), rows, x.numel() // rows, rule,
                                      to_table.data_ptr(), behind_relu, top, _place(others), _threads(x))  # fmt: skip
    return to_x, to_table


def _rule(table: Tensor, kind: Kind, cuts: Tensor | None = None) -> tuple[int, _Rule]:
    """How many tables there are, and what C++ wants to know of them, while they live."""
    if isinstance(kind, tuple):
        return table.numel(), _Rule(table.data_ptr(), None, 0, -1, *kind)
    rows, size = (1, len(table)) if table.ndim == 1 else table.shape
    count, below = (size, -1) if kind is None else (size + 1, kind)
    return rows, _Rule(table.data_ptr(), _place(cuts), count, below, 0, 0)


class Norm(NamedTuple):
    """A BatchNorm as it computes now, with a ReLU behind it.

    Attributes:
        weight, bias, running_mean, running_var: (C,). The latter two are taken, or change, as `batch` says.
        share: how much of a batch they take.
        eps: what is added to a variance.
        batch: whether the batch is brought to mean 0 and variance 1.
        top: the largest result of the ReLU.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    share: float
    eps: float
    batch: bool
    top: float = NO_TOP

    def takes(self, x: Tensor) -> bool:
        """Whether the loops do."""
        if x.ndim != 4:
            return False
        channels = x.shape[1]
        if not all(t.shape == (channels,) and t.dtype is torch.float32 and t.is_contiguous() and t.is_cpu for t in self[:4]):
            return False
        several = x.numel() > channels  # else torch complains
        return several and (x.is_contiguous() or (channels % 16 == 0 and channels <= 4096 and is_dense(x)))

    def to_cpp(self, x: Tensor, facts: Tensor) -> tuple[_Shape, _Norm]:
        """While all of them live."""
        images, channels, height, width = x.shape
        places = [t.data_ptr() for t in (*self[:4], facts)]
        return _Shape(images, channels, height * width, not x.is_contiguous()), _Norm(*places, self.share, self.eps, self.top)


def room_for_facts(x: Tensor) -> Tensor:
    """(4, C) for means, inverse deviations, gains and shifts."""
    return x.new_empty(4, x.shape[1])


def normalize(x: Tensor, norm: Norm, facts: Tensor, table: Tensor, kind: Kind, thresholds: Tensor | None = None, *,
              shortcut: Tensor | None = None, again: bool = False, relu: Tensor | None = None,
              into: Tensor | None = None) -> Tensor:  # fmt: skip
    """BatchNorm, an addition if there is a shortcut, ReLU and `quantize`.

    Args:
        x: (N, C, H, W), which `norm.takes`.
        norm: the BatchNorm.
        facts: `room_for_facts`, which is filled.
        table, kind, thresholds, into: as for `quantize`.
        shortcut: what is added, of the shape and in the memory order of x.
        again: by the facts that are there, and nothing else changes.
        relu: where to write the ReLU's result; nowhere if None.
    """
    source = 0 if again else 2 if norm.batch else 1
    table, cuts = table.contiguous(), None if thresholds is None else thresholds.contiguous()
    y = torch.empty_like(x) if into is None else into
    library().nulsq_norm(x.data_ptr(), _place(shortcut), _place(relu), y.data_ptr(), *norm.to_cpp(x, facts), source,
                         _rule(table, kind, cuts)[1], _threads(x))  # fmt: skip
    return y


def normalize_backward(grad: Tensor, x: Tensor, norm: Norm, facts: Tensor, table: Tensor, kind: Kind, *, y: Tensor | None = None,
                       spent: bool = False, others: Tensor | None = None) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of `normalize` to x, to the shortcut, to BatchNorm's weight and bias, and to the table.

    Args:
        grad: to the quantized result.
        x, norm, facts, table, kind: as there.
        y: the ReLU's result, where there is a shortcut; else None, and the shortcut's gradient is None, too.
        spent, others: as for `quantize_backward`.
    """
    table, grad, others = table.contiguous(), _like(grad, x), None if others is None else _like(others, x)
    to_sum, to_table = grad if spent else torch.empty_like(x), torch.empty_like(table)
    to_x = to_sum if y is None else torch.empty_like(x)
    to_weight, to_bias = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    library().nulsq_norm_backward(grad.data_ptr(), _place(others), x.data_ptr(), _place(y), to_sum.data_ptr(), to_x.data_ptr(),
                                  *norm.to_cpp(x, facts), not norm.batch, _rule(table, kind)[1], to_table.data_ptr(),
                                  to_weight.data_ptr(), to_bias.data_ptr(), _threads(x))  # fmt: skip
    return to_x, None if y is None else to_sum, to_weight, to_bias, to_table


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
