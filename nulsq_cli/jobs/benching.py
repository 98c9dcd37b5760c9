"""`nulsq bench`: how fast the same network is as a float model, a run, a packed file and in the runtimes, side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli import artifact, exporters, session
from nulsq_cli.errors import InputError
from nulsq_cli.layers import standing_still
from nulsq_cli.models import create_float_model
from nulsq_cli.pairing import one_operation

TORCH = "torch"


@dataclass(frozen=True)
class Timing:
    """How to time.

    Args:
        runtimes: for exported files; empty takes those that are installed.
        threads: of every engine.
        batches: sizes; 1 is latency, more is throughput.
        rounds: how often each network runs per size.
        static_int8: whether to time ONNX Runtime's own int8 network beside exported files.
    """

    runtimes: Sequence[str]
    threads: int
    batches: Sequence[int]
    rounds: int
    static_int8: bool


@dataclass(frozen=True)
class Network:
    """What a target is a form of."""

    arch: str
    arguments: str
    classes: int
    size: tuple[int, int, int]

    def float_model(self) -> nn.Module:
        """Its float form with fresh weights, on which speed does not depend."""
        arguments = json.loads(self.arguments)
        torch.manual_seed(0)
        return create_float_model(self.arch, num_classes=self.classes, in_chans=arguments.pop("in_chans", None), kwargs=arguments)


@dataclass
class Entry:
    """One network in one engine. `kind` is float, run, artifact, onnx, openvino or static int8."""

    target: str
    kind: str
    runtime: str
    network: Network
    run: Callable[[Tensor], Tensor]
    times: dict[int, list[float]] = field(default_factory=dict)


def bench(targets: Sequence[str], timing: Timing, *, show: Any) -> dict[str, Any]:
    """Time all targets in turns within one process, each engine's float network among them.

    Args:
        targets: runs, packed files, exported files.
        timing: how.
        show: for people.

    Raises:
        UsageError: a runtime that is not installed, or nothing to run an exported file with.
        InputError: a target that is missing or damaged.
    """
    for runtime in (*timing.runtimes, *(["onnxruntime"] if timing.static_int8 else [])):
        exporters.need(runtime)
    threads = torch.get_num_threads()
    torch.set_num_threads(timing.threads)
    try:
        entries = _entries(targets, timing, show)
        for batch in timing.batches:
            show.heading(f"Batch {batch}, {timing.threads} thread{'s' * (timing.threads > 1)}, {timing.rounds} rounds")
            _time(entries, batch, timing.rounds)
            with show.outcome():
                _table(entries, batch, show)
    finally:
        torch.set_num_threads(threads)
    rows = [_row(entry, batch, entries) for batch in timing.batches for entry in entries]
    return {"threads": timing.threads, "rounds": timing.rounds, "results": rows}


def _entries(targets: Sequence[str], timing: Timing, show: Any) -> list[Entry]:
    """Everything to time, files read and sessions started."""
    read = [_read(target, timing) for target in targets]
    found: list[Entry] = []
    for number, (target, network, runs) in enumerate(read):
        for kind, engine, run in runs:
            found.append(Entry(target, kind, engine, network, run))
        if network in (n for _, n, _ in read[:number]):
            continue
        model = network.float_model()
        found.append(Entry(network.arch, "float", TORCH, network, model))
        engines = dict.fromkeys(e for _, n, all_runs in read if n == network for kind, e, _ in all_runs
                                if kind in exporters.EXPORTED)  # fmt: skip
        found += _references(network, model, list(engines), timing)
    return sorted(found, key=lambda e: (e.network != found[0].network, e.runtime != TORCH, e.runtime, e.kind != "float"))


def _references(network: Network, model: nn.Module, engines: list[str], timing: Timing) -> list[Entry]:
    """The float network, and the runtime's own int8 one, in the runtimes that exported files are timed in."""
    if not engines:
        return []
    from nulsq_cli.exporters.exported import float_file, start
    from nulsq_cli.exporters.latency import static_int8

    plain = float_file(model, list(network.size))
    files = {"float": plain}
    if timing.static_int8:
        files["static int8"] = static_int8(plain, _images(network, 8))
    return [Entry(network.arch, kind, engine, network, start(content, engine, timing.threads, network.arch))
            for engine in engines for kind, content in files.items()]  # fmt: skip


def _read(target: str, timing: Timing) -> tuple[str, Network, list[tuple[str, str, Callable[[Tensor], Tensor]]]]:
    """A target, what it is a form of, and the ways to run it as (kind, engine, function)."""
    kind = session.kind_of(target)
    if kind in exporters.EXPORTED:
        engines = exporters.runtimes_of(kind, timing.runtimes, target)
        from nulsq_cli.exporters import exported

        file = exported.read(Path(target))
        network = _network(target, file.meta, file.meta.get("arch_kwargs", {}))
        return target, network, [(kind, engine, file.run(engine, timing.threads)) for engine in engines]
    if kind == "artifact":
        model, packed = artifact.load(Path(target))
        return target, _network(target, packed.meta, packed.meta["arch_kwargs"]), [(kind, TORCH, model)]
    run = session.read_run(Path(target))
    info = run.info()
    meta = {"arch": info["architecture"], "num_classes": info["arguments"]["num_classes"], "data_cfg": info["data_cfg"]}
    return target, _network(target, meta, info["arguments"]), [(kind, TORCH, run.model())]


def _network(target: str, meta: dict[str, Any], arguments: dict[str, Any]) -> Network:
    arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
    size = meta["data_cfg"].get("input_size")
    if not size:
        raise InputError("does not say how large its images are", where=target, fix="export the run again")
    return Network(meta["arch"], json.dumps(arguments, sort_keys=True), meta["num_classes"], tuple(size))


def _images(network: Network, count: int) -> Tensor:
    return torch.randn(count, *network.size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _time(entries: list[Entry], batch: int, rounds: int) -> None:
    from nulsq_cli.exporters.latency import times_in_turns

    images = {network: _images(network, batch) for network in {entry.network for entry in entries}}
    still = ExitStack()  # as in an evaluation: tables and quantized weights are computed once
    for entry in entries:
        if isinstance(entry.run, nn.Module):
            still.enter_context(one_operation(entry.run, images[entry.network]))
            still.enter_context(standing_still(entry.run))
    runs = {number: (lambda _, e=entry: e.run(images[e.network])) for number, entry in enumerate(entries)}
    with still:
        for number, found in times_in_turns(runs, torch.empty(0), rounds).items():
            entries[number].times[batch] = found


def _row(entry: Entry, batch: int, entries: list[Entry]) -> dict[str, Any]:
    """Median and quartiles in ms, images per second, and the median's ratio to the same engine's float network."""
    low, middle, high = _quartiles(entry.times[batch])
    plain = next(e for e in entries if (e.kind, e.runtime, e.network) == ("float", entry.runtime, entry.network))
    return {"target": entry.target, "kind": entry.kind, "runtime": entry.runtime, "batch": batch, "ms": middle,
            "ms_quartiles": [low, high], "images_per_second": 1000 * batch / middle,
            "ratio": middle / statistics.median(plain.times[batch])}  # fmt: skip


def _quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return low, middle, high


def _table(entries: list[Entry], batch: int, show: Any) -> None:
    rows = []
    for entry in entries:
        r = _row(entry, batch, entries)
        rows.append([r["target"], r["kind"], r["runtime"], f"{r['ms']:.2f}", "{:.2f}–{:.2f}".format(*r["ms_quartiles"]),
                     f"{r['images_per_second']:.1f}", f"{r['ratio']:.3f}"])  # fmt: skip
    show.table("", ["network", "kind", "engine", "ms", "middle half", "images/s", "of its float"], rows, right={3, 4, 5, 6})
