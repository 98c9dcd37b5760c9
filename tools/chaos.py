"""Kill a fine-tuning run with SIGKILL again and again, let it resume, and compare it with one that nothing happened to.

Each process is killed either after a random share of the time that the whole run takes, or (`--aimed`) in the middle of
writing a file: as soon as its n-th temporary file is seen, n at random. A killed process leaves nothing but its folder;
the next one starts with `--resume auto`. Some runs are killed several times before they may end. In the end the packed
file has to be equal byte for byte, the metrics line for line (all but the seconds), and every tensor of the checkpoints
bit for bit.

To start a process for every kill without loading torch each time, this program loads the library once and forks: a child
inherits the imports, but nothing of any run. With `--fresh` each process is a new interpreter, `python -m nulsq_cli`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ["quickstart", "schedule.epochs=2", "data.dataset=''", "data.val_split=val", "data.batch_size=16", "data.hold_out=0.2",
          "data.validation_batch_size=50", "quant.calibration.samples=64", "bn.reestimate_samples=64",
          "checkpoint.recovery_steps=3", "engine.device=cpu"]  # fmt: skip
MORE: list[str] = []
"""Further changes, from the command line."""
IMAGES = {"train": 20, "val": 5}
"""Of each digit: few, so that a run is short and its writing takes a good share of it."""
LIMIT = 300
"""Seconds that one process may take."""


def command(folder: Path) -> list[str]:
    """The arguments of every process of a run, the first one's, too."""
    images = folder.parent / "digits"
    return ["finetune", *RECIPE, *MORE, f"data.data_dir={images}", "-o", str(folder), "--resume", "auto", "-q"]


def draw_digits(folder: Path) -> None:
    """A small part of the packaged digits as a folder of pictures."""
    from nulsq_cli.training.pictures import Digits

    for split, wanted in IMAGES.items():
        counts = Counter()
        for image, label in Digits("train" if split == "train" else "validation"):
            if counts[label] < wanted:
                place = folder / split / str(label)
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{counts[label]:02}.png")
                counts[label] += 1


def work(folder: Path) -> None:
    """What a forked child does: the command, with its output put aside."""
    with (folder.parent / f"{folder.name}.out").open("ab") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    sys.argv = ["nulsq", *command(folder)]
    from nulsq_cli.cli import main

    main()


class Process:
    """One process of a run, forked from this one or fresh."""

    def __init__(self, folder: Path, fresh: bool) -> None:
        if fresh:
            out = (folder.parent / f"{folder.name}.out").open("ab")
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            self.child = subprocess.Popen(
                [sys.executable, "-m", "nulsq_cli", *command(folder)], stdout=out, stderr=out, env=environment
            )
        else:
            self.child = multiprocessing.get_context("fork").Process(target=work, args=(folder,))
            self.child.start()
        self.folder, self.fresh = folder, fresh
        self.started = time.monotonic()

    def ended(self) -> int | None:
        """The exit code, once there is one."""
        return self.child.poll() if self.fresh else self.child.exitcode

    def finish(self) -> None:
        """Wait for a good end."""
        while self.ended() is None and time.monotonic() - self.started < LIMIT:
            time.sleep(0.005)
        if self.ended() != 0:
            code = self.ended()
            self.kill()
            said = self.folder.with_name(f"{self.folder.name}.out").read_text(errors="replace")
            raise SystemExit(f"{self.folder}: a process ended with {code} instead of 0\n{said[-2000:]}")

    def kill(self) -> None:
        """SIGKILL."""
        self.child.kill()
        self.child.wait() if self.fresh else self.child.join()


def kill_somewhere(process: Process, folder: Path, draw: random.Random, seconds: float, aimed: bool) -> str | None:
    """Kill a running process at a random moment; the phase that was hit, or None: it ended before."""
    log = folder / "train.log"
    before = log.stat().st_size if log.exists() else 0
    wait, wanted = draw.uniform(0, seconds), draw.randint(1, 16)
    seen: set[str] = set()
    while process.ended() is None:
        if aimed:
            seen |= set(temporary_files(folder))
            if len(seen) >= wanted:
                break
            time.sleep(0.0005)
        else:
            if (left := process.started + wait - time.monotonic()) <= 0:
                break
            time.sleep(min(left, 0.005))
    else:
        return None
    process.kill()
    if writing := temporary_files(folder):
        return f"writing {writing[0][1:].rsplit('.', 2)[0]}"
    return phase(log, before)


def temporary_files(folder: Path) -> list[str]:
    """Names of files that are being written, or were when their process died."""
    found = []
    for place in (folder, folder / "checkpoints", folder / "export"):
        try:
            found += [name for name in os.listdir(place) if name.startswith(".") and name.endswith(".tmp")]
        except FileNotFoundError:
            continue
    return found


def phase(log: Path, before: int) -> str:
    """What the killed process had said last, by the lines that it added to the log."""
    lines = log.read_bytes()[before:].decode().splitlines() if log.exists() else []
    stages = {"● Model": "loading", "● Quantizing": "calibrating", "● Fine-tuning": "training, epoch 1",
              "  epoch 1": "training, epoch 2", "  epoch 2": "evaluating", "● Result": "evaluating, exporting",
              "● What": "ending"}  # fmt: skip
    found = "loading"
    for line in lines:
        if line.startswith("  resumed from"):
            epoch = line.split("epoch ")[1].split(",")[0]
            found = f"training, epoch {epoch}" if int(epoch) <= 2 else "evaluating"
        elif not (line.startswith("● Fine-tuning") and found != "calibrating"):
            found = next((name for start, name in stages.items() if line.startswith(start)), found)
    return found


def outcome(folder: Path) -> dict[str, object]:
    """All that must be equal: files as bytes, metrics as text, tensors as bytes."""
    from nulsq_cli.training import checkpoint

    metrics = (folder / "metrics.jsonl").read_text()
    result = json.loads((folder / "result.json").read_text())
    found: dict[str, object] = {
        "export/model.safetensors": (folder / "export/model.safetensors").read_bytes(),
        "metrics.jsonl": re.sub(r'"(seconds|images_per_second)": [0-9.]+', "", metrics),
        "result.json": {k: v for k, v in result.items() if k not in ("seconds", "run", "artifact")},
    }
    for name in ("best", "last", "previous"):
        tensors, _ = checkpoint.load(folder / f"checkpoints/{name}.safetensors")
        found[f"checkpoints/{name}"] = {
            f"{group}/{key}": tensor.numpy().tobytes() for group, members in tensors.items() for key, tensor in members.items()
        }
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="how many kills to make in all (default: %(default)s)")
    parser.add_argument("--most", type=int, default=4, help="most kills of one run (default: %(default)s)")
    parser.add_argument("--aimed", type=float, default=0.5, help="share of kills inside the writing of a file (%(default)s)")
    parser.add_argument("--minutes", type=float, default=60, help="start no further run after this time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every process; slower")
    parser.add_argument("--also", nargs="*", default=[], metavar="KEY=VALUE", help="further changes of the recipe")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to be tried (default: a temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Run, kill, resume, compare, print the table; exit code 1 if anything differs."""
    given = arguments()
    MORE.extend(given.also)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path.insert(0, str(ROOT))
    import nulsq_cli.jobs  # noqa: F401 the one import that forked children share

    draw, hits, bad, began = random.Random(given.seed), Counter(), [], time.monotonic()
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="chaos-", dir=given.folder))
    draw_digits(place / "digits")
    whole = place / "whole"
    process = Process(whole, given.fresh)
    process.finish()
    seconds = time.monotonic() - process.started
    expected = outcome(whole)
    print(f"uninterrupted: {seconds:.1f} s, {len(expected['export/model.safetensors'])} bytes packed", flush=True)
    runs = processes = 0
    while sum(hits.values()) < given.kills and time.monotonic() - began < 60 * given.minutes:
        folder = place / f"run{runs}"
        runs += 1
        for _ in range(min(draw.randint(1, given.most), given.kills - sum(hits.values()))):
            process = Process(folder, given.fresh)
            processes += 1
            hit = kill_somewhere(process, folder, draw, seconds, draw.random() < given.aimed)
            if hit is None:  # it was faster
                process.finish()
                break
            hits[hit] += 1
        else:
            Process(folder, given.fresh).finish()
            processes += 1
        found = outcome(folder)
        different = [name for name in expected if found[name] != expected[name]]
        left = temporary_files(folder)
        if different or left:
            bad.append(folder)
            print(f"{folder}: differs in {', '.join(different + left)}", flush=True)
        else:
            shutil.rmtree(folder)
    print(f"\n{'killed while':<36} kills")
    for name, count in sorted(hits.items()):
        print(f"{name:<36} {count:>5}")
    print(f"{'in all':<36} {sum(hits.values()):>5}")
    print(f"\n{sum(hits.values())} kills in {runs} runs ({processes} processes, {time.monotonic() - began:.0f} s):"
          f" {runs - len(bad)} runs ended equal, {len(bad)} did not")  # fmt: skip
    if bad:
        sys.exit(1)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
