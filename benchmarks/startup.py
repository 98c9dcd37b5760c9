"""What quantizing adds before the first training step is done: the first time on a machine, and in a later run.

    python benchmarks/startup.py [--short]

Every figure is a process of its own. It builds a model; then the clock runs while the quantized one is converted and its
loops are compiled or read from the cache, and until the first step is done. Float models pass through the same, less
the quantizers; `overhead_s` is the difference of two such processes that ran one after the other. The first time has an
empty cache folder, a later run has the one that it left.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")


def child(model: str, batch: int, side: int, method: str) -> None:
    """Time one first step and print it."""
    import torch
    from cases import Case, Step
    from pairing import compiled

    from nulsq_cli.convert import Policy, convert, make_plan
    from nulsq_cli.values import Bits

    case = Case(model, batch, side)
    made, images = case.float_model(), case.images()
    start = time.perf_counter()
    if method != "float":
        convert(made, make_plan(made, Policy(Bits(2, 2), method), (3, side, side)))
        compiled(True)
    step = Step(made, images)
    step()
    first = time.perf_counter() - start
    if method != "float":
        step.check()  # here afterwards: it would start what is timed
    print(json.dumps({"first": first, "threads": torch.get_num_threads()}))


def first_step(place: list[str], method: str, cache: str) -> float:
    """Seconds to the first step in a new process."""
    command = [sys.executable, __file__, "--child", *place, method]
    done = subprocess.run(command, env={**os.environ, **dict.fromkeys(CACHES, cache)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1])["first"])


def main() -> None:
    from pairing import Report, arguments, rounds

    options = arguments(__doc__).parse_args()
    places = [["resnet8_cifar", "2", "8"]] if options.tiny else [["resnet20_cifar", "128", "32"]]
    if not options.short and not options.tiny:
        places.append(["resnet18", "16", "224"])
    count, report = rounds(options, 1, 3), Report("startup")
    for place in places:
        for method in ("nulsq-wa",) if options.short or options.tiny else ("lsq", "nulsq-wa"):
            found: dict[str, list[float]] = {"first time": [], "later run": []}
            plain = []
            for _ in range(count):
                with tempfile.TemporaryDirectory() as cache:
                    for when in found:
                        plain.append(first_step(place, "float", cache))
                        found[when].append(first_step(place, method, cache) - plain[-1])
            for when, overheads in found.items():
                report.add(model=place[0], batch=int(place[1]), method=method, when=when, float_s=statistics.median(plain),
                           overhead_s=statistics.median(overheads), least=min(overheads), most=max(overheads),
                           rounds=count)  # fmt: skip
    report.table(["model", "batch", "method", "when", "float_s", "overhead_s", "least", "most"])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        main()
