"""The bytes that a quantized model keeps for backward, against those of the same model in float.

    python benchmarks/memory.py [--short] [--reference PATH]

`kept_mb` is what is allocated during the forward pass and still there after it (PyTorch's profiler counts every allocation,
whoever makes it). `saved_mb` is what autograd itself holds: the unique storages of saved tensors, without parameters,
buffers and images. `ratio` is that of `kept_mb`. There is nothing to repeat: the same bytes come out in every run.
"""

from __future__ import annotations

import torch
from cases import Case, Step, cases, variants
from pairing import Report, arguments, compiled
from torch.profiler import ProfilerActivity, profile


def kept(step: Step) -> int:
    """Bytes allocated in the forward pass that are still in use after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = step.loss()
    live = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    return live - loss.untyped_storage().nbytes()


def saved(step: Step) -> int:
    """Bytes of the unique storages of tensors that autograd saves, without those that are there anyway."""
    known = [*step.model.parameters(), *step.model.buffers(), step.images, step.target]
    there = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = step.loss()
    del loss
    return sum(found.values())


def measure(case: Case, options, report: Report) -> None:
    """One model: float and all variants."""
    compiled(True)
    images = case.images()
    models = [({"code": "ours", "method": "float", "bits": 32}, case.float_model()), *variants(case, options)]
    base = None
    for row, model in models:
        step = Step(model, images)
        if row["code"] == "ours" and row["bits"] != 32:
            step.check()
        step()  # whatever is allocated once and for all
        bytes_kept, bytes_saved = kept(step), saved(step)
        base = bytes_kept if base is None else base
        report.add(model=case.model, batch=case.batch, side=case.side, **row, kept_mb=bytes_kept / 1e6,
                   saved_mb=bytes_saved / 1e6, ratio=bytes_kept / base)  # fmt: skip


def main() -> None:
    options = arguments(__doc__, reference=True).parse_args()
    report = Report("memory")
    for case in cases(options, short=(32, 2), full=(128, 16)):
        measure(case, options, report)
    report.table(["model", "batch", "code", "method", "bits", "kept_mb", "saved_mb", "ratio"])


if __name__ == "__main__":
    main()
