"""Give damaged artifacts, checkpoints and recipes to the code that reads them; nothing but the project's own errors may come out.

A case is a pure function of the kind, the seed and its number, so any of them can be run again with `--only`. Each may take
`SECONDS` of processor time, and as much memory as its file is large `TIMES` over, plus `ROOM`. It may open no file but its own,
the recipes and those of installed packages; it may start no process, open no connection, unpickle nothing and compile no code.

Cases run in child processes, so that a crash of the interpreter is a finding, too. Exit code 1 if there is any.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CASES = {"artifact": 20_000, "checkpoint": 5_000, "recipe": 20_000}
SECONDS, TIMES, ROOM = 5, 8, 96 << 20
CHUNK = 2500
"""Cases per child process."""
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
             "urllib.Request", "pickle.find_class", "compile", "exec", "ctypes.dlopen", "os.remove", "os.rename",
             "shutil.rmtree")  # fmt: skip


class Broken(BaseException):
    """A rule of the list above was broken; no `except Exception` hides it."""


class Guard:
    """Watches what the interpreter does while a case is read."""

    def __init__(self, work: Path) -> None:
        self.active = False
        self.allowed = tuple(str(Path(p).resolve()) for p in ("/proc", work, ROOT / "recipes", ROOT / "nulsq_cli", sys.prefix,
                                                              sys.base_prefix))
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in FORBIDDEN and not self._importing(event, args):
            self.active = False
            raise Broken(f"{event}{args!r:.200}")
        if event == "open" and isinstance(args[0], str) and not str(Path(args[0]).resolve()).startswith(self.allowed):
            self.active = False
            raise Broken(f"opened {args[0]!r:.200}")

    def _importing(self, event: str, args: tuple[Any, ...]) -> bool:
        """Whether this is code of an installed module, which may be imported at any time."""
        name = args[0].co_filename if event == "exec" else args[1] if event == "compile" else ""
        return str(name).startswith(self.allowed)

    @contextlib.contextmanager
    def watching(self, size: int) -> Iterator[None]:
        """Within the limits for a case of so many bytes."""

        def late(*_: object) -> None:
            raise Broken(f"took more than {SECONDS} s of processor time")

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        old = signal.signal(signal.SIGPROF, late)
        resource.setrlimit(resource.RLIMIT_AS, (used + TIMES * size + ROOM, hard))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        self.active = True
        try:
            yield
        finally:
            self.active = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, old)
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def attempt(target: Any, guard: Guard, kind: str, seed: int, number: int) -> str:
    """One case: `refused`, `accepted`, or what broke."""
    from nulsq_cli.errors import InputError, NulsqError, UsageError

    rng = random.Random(f"{kind} {seed} {number}")
    case = target.write(rng)
    files = [p for p in target.work.rglob("*") if p.is_file()]
    size = max(p.stat().st_size for p in files)
    try:
        with guard.watching(size):
            target.read(case)
    except (InputError, UsageError) as said:
        text = str(said)
        return "refused" if text and len(text) < 20_000 else f"an error of {len(text)} characters"
    except NulsqError as said:
        return f"exit code {said.exit_code}"
    except (Exception, Broken) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "nulsq_cli" in f.filename]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "?"
        return f"{type(error).__name__} in {at}: {str(error)[:300]!r}"
    return "accepted"


def work(kind: str, seed: int, numbers: Sequence[int], folder: Path, answers: Path) -> None:
    """What a child does: one line for each case, written when it begins and completed when it ends."""
    import torch
    from fuzz_targets import TARGETS

    from nulsq_cli import recipe
    from nulsq_cli.errors import RecipeError

    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    target = TARGETS[kind](folder)
    with contextlib.suppress(RecipeError):  # what is made or imported at first use is made now
        recipe.load("quickstart", overrides=["quant.bit=3/3"])
    guard = Guard(folder)
    with answers.open("w") as file:
        for number in numbers:
            file.write(f"{number}\t")
            file.flush()
            answer = attempt(target, guard, kind, seed, number)
            file.write(answer.replace("\n", " | ").replace("\t", " ").encode("ascii", "backslashreplace").decode() + "\n")
            file.flush()


def run(kind: str, seed: int, numbers: Sequence[int], place: Path) -> Iterator[tuple[int, str]]:
    """The answers to all cases, from child processes."""
    context = multiprocessing.get_context("fork")
    folder, answers = place / kind, place / f"{kind}.answers"
    while numbers:
        folder.mkdir()
        child = context.Process(target=work, args=(kind, seed, numbers[:CHUNK], folder, answers))
        child.start()
        child.join()
        lines = [line.split("\t") for line in answers.read_text().split("\n") if line]
        for number, answer in lines:
            yield int(number), answer or f"the process ended with {child.exitcode}"
        if not lines:
            raise SystemExit(f"the child ended with {child.exitcode} before its first case")
        numbers = numbers[len(lines) :]
        shutil.rmtree(folder)


def main() -> None:
    """Draw, read, count; print what broke, with the number that draws it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*CASES, []], help="what to attack (default: all)")
    parser.add_argument("--cases", type=int, help=f"how many of each (default: {CASES})")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--only", type=int, help="this case alone")
    given = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    import fuzz_targets  # noqa: F401 the imports that all children share

    broken = 0
    for kind in given.kinds or CASES:
        numbers = range(given.first, given.first + (given.cases or CASES[kind])) if given.only is None else [given.only]
        began, counts = time.monotonic(), Counter[str]()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
            for number, answer in run(kind, given.seed, numbers, Path(place)):
                known = answer in ("refused", "accepted")
                what = answer if known else answer.partition(": ")[0]
                counts[what] += 1
                if not known and counts[what] <= 3:
                    print(f"  {kind} {number}: {answer}", flush=True)
        broken += sum(counts.values()) - counts["refused"] - counts["accepted"]
        print(f"{kind}: {sum(counts.values())} cases of seed {given.seed} in {time.monotonic() - began:.0f} s: "
              + ", ".join(f"{count} {what}" for what, count in counts.most_common()), flush=True)  # fmt: skip
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
