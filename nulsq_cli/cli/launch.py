"""Several processes on this machine that train together: what torchrun does, but with our exit codes and one voice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

PATIENCE = 10.0
"""Seconds in which the others may end by themselves after one has failed. Its sentence has been said by then."""


def inside_a_launch() -> bool:
    """Whether torchrun, or this module, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def one_of_many() -> bool:
    """Whether this process trains together with others."""
    return inside_a_launch() and int(os.environ["WORLD_SIZE"]) > 1


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `nulsq` with these arguments in several processes; SIGINT and SIGTERM are handed on to them.

    Returns:
        0, or the exit code of the first that failed; 1 when it was killed, 128 + signal when it was told to stop.
    """
    told: list[int] = []
    with tempfile.TemporaryDirectory(prefix="nulsq-") as folder, contextlib.ExitStack() as ends:
        team: list[subprocess.Popen[bytes]] = []
        ends.callback(_end, team)
        ends.enter_context(_handing_on(team, told))
        for rank in range(processes):
            # in sessions of their own: a Ctrl-C then reaches them once, from here
            team.append(subprocess.Popen([sys.executable, "-m", "nulsq_cli", *arguments], start_new_session=True,
                                         env=_environment(rank, processes, folder)))  # fmt: skip
        failed = _first_failure(team)
        if failed is None:
            return 0
        code = team[failed].returncode
        if code > 0:
            _wait(team, PATIENCE)
            return code
        if told:
            print("error: interrupted\n  fix: go on with the same command and --resume auto", file=sys.stderr)
            return 128 + told[0]
        print(f"error: process {failed} of {processes} was ended by {signal.Signals(-code).name}"
              f"{' (out of memory?)' if -code == signal.SIGKILL else ''}, so the others were ended too\n"
              "  fix: go on from the last checkpoint with the same command and --resume auto", file=sys.stderr)  # fmt: skip
        return 1


def _environment(rank: int, processes: int, folder: str) -> dict[str, str]:
    threads = max((os.cpu_count() or 1) // processes, 1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    return {
        "OMP_NUM_THREADS": str(threads), **os.environ, **{name: str(value) for name, value in place.items()},
        "NULSQ_RENDEZVOUS": (Path(folder) / "meeting").as_uri(),
    }  # fmt: skip


@contextlib.contextmanager
def _handing_on(team: list[subprocess.Popen[bytes]], told: list[int]) -> Iterator[None]:
    def hand_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in team:
            process.send_signal(number)

    old = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _first_failure(team: list[subprocess.Popen[bytes]]) -> int | None:
    while True:
        codes = [process.poll() for process in team]
        # a process that was killed is the reason why others fail
        for rank, code in sorted(enumerate(codes), key=lambda item: item[1] or 0):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _wait(team: list[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in team):
        time.sleep(0.05)


def _end(team: list[subprocess.Popen[bytes]]) -> None:
    for process in team:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its loader workers, too
            process.wait()
