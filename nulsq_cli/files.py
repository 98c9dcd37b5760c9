"""Files that are written whole or not at all, and stay written when the machine stops."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nulsq_cli.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object], *, keep: Path | None = None, parents: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    The content is on the disk before it gets its name, and the name before this returns. A process that dies on the
    way leaves at most the temporary file, for `remove_leftovers`.

    Args:
        path: the file.
        write: fills the file that it is given.
        keep: where the file that is at `path` now goes; None: it is replaced.
        parents: make the folders above that of `path`; False inside a run: one that vanished is not made again.

    Raises:
        InputError: the folder is read-only, full or gone; what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=parents, exist_ok=True)
        write(temporary)
        _sync(temporary)
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as reason:
        raise _unwritable(path, reason) from reason
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses even what is not there
            temporary.unlink()


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unwritable(path: Path, reason: OSError) -> InputError:
    gone = isinstance(reason, FileNotFoundError)
    return InputError(
        f"cannot be written: {'its folder is gone' if gone else reason.strerror or reason}", where=path,
        fix="choose a folder that is writable and has room, with -o; or repair this one and go on with --resume auto",
    )  # fmt: skip


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that died while writing below `folder`."""
    for path in folder.rglob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are missing.

    Raises:
        InputError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as reason:
        raise _unwritable(path, reason) from reason


def write_text(path: Path, text: str, *, parents: bool = True) -> None:
    """Write text atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), parents=parents)


def write_json(path: Path, value: Any, *, parents: bool = True) -> None:
    """Write JSON atomically, indented, with a newline at the end."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", parents=parents)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log, in one write.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as reason:
        raise _unwritable(path, reason) from reason


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: it is missing, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror}", where=path) from reason
    except (ValueError, RecursionError) as reason:
        raise InputError("is damaged (no valid JSON)", where=path, fix="restore it or start again") from reason
