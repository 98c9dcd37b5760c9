"""`nulsq` as processes of their own: with their exit codes, their signals and nothing shared but what was imported.

Loading torch and timm takes longer than most of what the tests let a process do. So one server per test worker loads them
once and is forked for every `nulsq`; `fresh=True` starts a new interpreter instead, for what depends on one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 300
"""Seconds after which a process is taken for stuck."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nulsq_cli.cli", "nulsq_cli.jobs", "tests.processes"])


def be(arguments, variables, folder, cwd, out, err):
    """What a forked process does: be `nulsq`."""
    os.environ.update(variables)
    for number, name in ((1, out), (2, err)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if cwd is not None:
        os.chdir(cwd)
    import numpy

    numpy.random.seed()  # a server's state is no reason for two processes to agree
    random.seed()
    sys.argv = ["nulsq", *arguments]
    from nulsq_cli.cli import main

    main()


@dataclass
class Done:
    """What a process left."""

    returncode: int
    stdout: str
    stderr: str


class Process:
    """One `nulsq`, running.

    Args:
        arguments: of the command line.
        fresh: a new interpreter, `python -m nulsq_cli`.
        cwd: its working directory.
        variables: added to its environment.
    """

    def __init__(self, *arguments, fresh=False, cwd=None, **variables):
        self.said = tempfile.TemporaryDirectory(prefix="nulsq-test-")
        folder, words = Path(self.said.name), list(map(str, arguments))
        self.out, self.err = folder / "out", folder / "err"
        if fresh:
            with self.out.open("w") as out, self.err.open("w") as err:
                self.process = subprocess.Popen([sys.executable, "-m", "nulsq_cli", *words], cwd=cwd, stdout=out, stderr=err,
                                                env={**os.environ, "PYTHONPATH": str(ROOT), **variables})  # fmt: skip
        else:
            self.process = CONTEXT.Process(target=be, args=(words, variables, folder, cwd, "out", "err"))
            self.process.start()
        self.pid, self.fresh = self.process.pid, fresh

    def alive(self):
        """Whether it runs."""
        return self.process.poll() is None if self.fresh else self.process.is_alive()

    def until(self, happened):
        """Wait until there is a file, or until a function says so."""
        limit = time.monotonic() + LIMIT
        there = happened if callable(happened) else happened.exists
        while self.alive() and time.monotonic() < limit and not there():
            time.sleep(0.005)
        if not there():
            self.process.kill()
            raise AssertionError(f"it never happened: {self.err.read_text()}")

    def send(self, number):
        """Send a signal."""
        os.kill(self.pid, number)

    def end(self, within=LIMIT):
        """Wait for its end, for at most this many seconds."""
        if self.fresh:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(within)
            code = self.process.returncode
        else:
            self.process.join(within)
            code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"stuck: {self.err.read_text()}")
        return Done(code, self.out.read_text(), self.err.read_text())


def nulsq(*arguments, code=0, **more):
    """Run `nulsq` to its end, which must be this exit code and no traceback."""
    done = Process(*arguments, **more).end()
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(*arguments, code, words, **more):
    """Run `nulsq` on something wrong: one sentence that says so, and a way out."""
    done = nulsq(*arguments, code=code, **more)
    assert words in done.stderr, done.stderr
    assert "fix:" in done.stderr or "did you mean" in done.stderr or "Usage" in done.stderr
    return done
