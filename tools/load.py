"""Three loads that a real run meets: very many files, very many updates, and a loader process that dies.

`files`   trains on a folder of many small files (`--count`, 200 000 by default, made here), once without interruption and
          once with a SIGKILL in the middle of the epoch and `--resume auto`; the packed files have to be equal.
`steps`   trains for `--count` updates (10 000 by default) and watches the private memory of the process and its loaders.
`worker`  evaluates a packed file with 8 loader processes, one of which is killed, and then again.

Exit code 1 if a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["finetune", "quickstart", "data.validation_batch_size=500", "quant.calibration.samples=256",
          "bn.reestimate_samples=256", "engine.device=cpu", "--resume", "auto", "-q"]  # fmt: skip
GROWTH = 1.1
"""How much more memory the last tenth of a long run may hold than its second tenth."""


def nulsq(*arguments: object, **more: object) -> subprocess.Popen[str]:
    """Start the command, in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "nulsq_cli", *map(str, arguments)], env=environment, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, **more)  # fmt: skip


def finished(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said until it ended as it should."""
    out, said = process.communicate()
    if process.returncode != code:
        raise SystemExit(f"ended with {process.returncode} instead of {code}:\n{said[-2000:]}")
    return said + (out or "")


def require(holds: bool, what: str) -> None:
    """One promise."""
    print(f"  {'holds' if holds else 'FAILS'}: {what}", flush=True)
    if not holds:
        raise SystemExit(1)


def members(group: int) -> list[int]:
    """The living processes of a session's group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def png(image: Any) -> bytes:
    """A grey image, (H, W) uint8, as PNG: several times faster than with PIL, and there may be 200 000 of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", image.shape[1], image.shape[0], 8, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def draw(folder: Path, count: int, seed: int, side: int) -> None:
    """Noisy digits, 8x8 or each second pixel of them, one PNG file each, in a folder per class."""
    import numpy as np

    with np.load(ROOT / "nulsq_cli/assets/digits.npz") as data:
        images, labels = data["images"].astype(np.int16)[:, :: 8 // side, :: 8 // side], data["labels"]
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(images), size=count)
    noisy = np.clip(images[chosen] * 15 + rng.integers(-40, 41, (count, side, side)), 0, 255).astype(np.uint8)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    for number in range(count):
        (folder / str(labels[chosen[number]]) / f"{number:06}.png").write_bytes(png(noisy[number]))


# ---- very many files ------------------------------------------------------------------------------


def files(place: Path, count: int, seed: int) -> None:
    """An epoch over many files, with and without a kill."""
    began = time.monotonic()
    draw(place / "data/train", count, seed, 4)
    draw(place / "data/val", 1000, seed + 1, 4)
    print(f"{count} files written in {time.monotonic() - began:.0f} s", flush=True)
    updates = count // 512
    command = [*COMMON, "data.dataset=''", f"data.data_dir={place / 'data'}", "data.val_split=val", "data.input_size=[1,4,4]",
               "data.batch_size=512", "data.hold_out=0", "data.workers=2", "schedule.epochs=1",
               f"checkpoint.recovery_steps={max(updates // 8, 1)}"]  # fmt: skip
    began = time.monotonic()
    finished(nulsq(*command, "-o", place / "whole"))
    whole = time.monotonic() - began
    print(f"an epoch of {updates} updates on all of them, with start, evaluation and export: {whole:.0f} s", flush=True)

    draws = random.Random(seed)
    process = nulsq(*command, "-o", place / "killed")
    recovery, seen, wanted = place / "killed/checkpoints/recovery.safetensors", 0, draws.randint(2, 6)
    last = None
    while seen < wanted:
        if process.poll() is not None:
            raise SystemExit(f"ended too early:\n{process.stderr.read()}")
        if recovery.exists() and (now := recovery.stat().st_mtime_ns) != last:
            last, seen = now, seen + 1
        time.sleep(0.01)
    time.sleep(draws.uniform(0, whole / 16))
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while members(process.pid) and time.monotonic() < end:
        time.sleep(0.1)
    require(not members(process.pid), "the loaders of the killed process end, too")
    finished(nulsq(*command, "-o", place / "killed"))
    log = (place / "killed/train.log").read_text()
    print("".join(f"{line}\n" for line in log.splitlines() if "resumed from" in line), end="", flush=True)
    packed = [(place / name / "export/model.safetensors").read_bytes() for name in ("whole", "killed")]
    require(packed[0] == packed[1], f"the packed files, {len(packed[0])} bytes, are equal")
    logs = [(place / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    rows = [[json.loads(line) for line in log.splitlines()] for log in logs]
    pairs = list(zip(*rows, strict=True))
    require(all(a[k] == b[k] for a, b in pairs for k in a if k not in ("seconds", "images_per_second")), "so are the metrics")


# ---- very many updates ----------------------------------------------------------------------------


def private_memory(processes: list[int]) -> float:
    """MB that these processes alone have written; pages of libraries are theirs or not as other programs come and go."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
    return total / 1000


def steps(place: Path, count: int, seed: int) -> None:
    """A long run, watched."""
    per_epoch = 1437 // 8
    epochs = -(-count // per_epoch)
    command = [*COMMON, f"schedule.epochs={epochs}", "data.batch_size=8", "data.workers=1", "ema.enabled=true",
               "data.augment.mixup=0.2", "checkpoint.recovery_steps=100", f"seed={seed}", "--no-export"]  # fmt: skip
    process = nulsq(*command, "-o", place / "long")
    samples: list[tuple[int, float]] = []
    log, last = place / "long/summary.csv", 1  # its head
    while process.poll() is None:
        if log.exists() and (lines := len(log.read_text().splitlines())) > last:
            time.sleep(0.2)  # its loader of the evaluation has ended
            samples.append((lines - 1, private_memory(members(process.pid))))
            last = lines
        time.sleep(0.05)
    finished(process)
    size = max(len(samples) // 10, 1)
    tenths = [statistics.median(mb for _, mb in samples[at : at + size]) for at in range(0, len(samples) - size + 1, size)]
    early, late = tenths[min(1, len(tenths) - 1)], tenths[-1]
    print(f"{epochs * per_epoch} updates in {epochs} epochs; private memory of process and loader, median of each tenth, MB: "
          + " ".join(f"{mb:.1f}" for mb in tenths) + f"; at most {max(mb for _, mb in samples):.1f}", flush=True)  # fmt: skip
    require(late <= GROWTH * early, f"it does not grow (by more than {GROWTH - 1:.0%})")


# ---- a loader that dies ---------------------------------------------------------------------------


def worker(place: Path, count: int, seed: int) -> None:
    """An evaluation that loses one of its loaders."""
    draw(place / "data/val", count, seed, 8)
    finished(nulsq(*COMMON, "schedule.epochs=0", "-o", place / "run"))
    packed = place / "run/export/model.safetensors"
    before = packed.read_bytes()
    command = ["eval", packed, "--data-dir", place / "data", "--dataset", "", "--val-split", "val", "-b", 50, "-j", 8, "--json"]
    process = nulsq(*command, stdout=subprocess.PIPE)
    while len(found := [p for p in members(process.pid) if p != process.pid]) < 8:
        if process.poll() is not None:
            raise SystemExit(f"it never had 8 loaders:\n{process.stderr.read()}")
        time.sleep(0.002)
    os.kill(random.Random(seed).choice(found), signal.SIGKILL)
    said = finished(process, code=3)
    said = said[said.index("error: ") :]  # torch warns of 8 loaders where there are fewer cores
    print(said, end="", flush=True)
    require(said.count("\n") == 2 and said.startswith("error: "), "one sentence and its way out, exit code 3")
    require(not members(process.pid), "the other loaders end, too")
    again = json.loads(finished(nulsq(*command, stdout=subprocess.PIPE)).splitlines()[-1])
    require(packed.read_bytes() == before and again["samples"] == count, f"nothing is lost: {count} images, when asked again")


def main() -> None:
    """Make the data, put on the load, say what was seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load", choices=("files", "steps", "worker"))
    parser.add_argument("--count", type=int, help="of files, updates or images (default: 200 000, 10 000, 20 000)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and of the moment (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to be tried (default: a temporary folder)")
    given = parser.parse_args()
    load, count = {"files": (files, 200_000), "steps": (steps, 10_000), "worker": (worker, 20_000)}[given.load]
    place = Path(tempfile.mkdtemp(prefix="load-", dir=given.folder))
    load(place, given.count or count, given.seed)
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
