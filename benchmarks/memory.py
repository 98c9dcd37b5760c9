"""The bytes that a quantized model keeps for backward, against those of the same model in float.

    python benchmarks/memory.py [--short] [--reference PATH]

`kept_mb` is what is allocated during the forward pass and still there after it, the loss not counted: the unique storages
that wait for backward, whoever holds them. PyTorch's profiler counts allocations themselves; hooks on saved tensors would
not see what layers pack by hooks of their own. There is nothing to repeat: the same bytes come out in every run.
"""

from __future__ import annotations

from cases import Case, Step, cases, variants
from pairing import Report, arguments, compiled
from torch.profiler import ProfilerActivity, profile


def kept(step: Step) -> int:
    """Bytes allocated in the forward pass that are still in use after it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = step.loss()
    live = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    return live - loss.untyped_storage().nbytes()


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
        found = kept(step)
        base = found if base is None else base
        report.add(model=case.model, batch=case.batch, side=case.side, **row, kept_mb=found / 1e6, ratio=found / base)


def main() -> None:
    options = arguments(__doc__, reference=True).parse_args()
    report = Report("memory")
    for case in cases(options, short=(32, 2), full=(128, 16)):
        measure(case, options, report)
    report.table(["model", "batch", "code", "method", "bits", "kept_mb", "ratio"])


if __name__ == "__main__":
    main()
