"""A training step of a quantized model against the step of the same model in float.

    python benchmarks/step.py [--short] [--channels-last] [--reference PATH]

`control` is a second float model: how far its ratio is from 1 is what this machine adds. The authors' layers are measured
with their first and last layer in float, where ours have 8 bits.
"""

from __future__ import annotations

import torch
from cases import Case, Step, cases, variants
from pairing import Report, alternate, arguments, compiled, ratio, rounds, seconds


def measure(case: Case, options, report: Report) -> None:
    """One model: float, control and all variants, alternately."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    images = case.images().to(memory_format=layout)
    compiled(True)
    steps = {"float": Step(case.float_model().to(memory_format=layout), images)}
    steps["control"] = Step(case.float_model().to(memory_format=layout), images)
    rows = {"control": {"code": "ours", "method": "control", "bits": 32}}
    for row, model in variants(case, options):
        name = " ".join(map(str, row.values()))
        if row["code"] == "ours":  # not with channels last: there torch's own BatchNorm adds up floats, which moves codes
            Step(model, case.images()).check()
        rows[name], steps[name] = row, Step(model.to(memory_format=layout), images)
    compiled(True)
    count = rounds(options, 3, 11 if case.side < 100 else 7)
    times = alternate({name: lambda step=step: seconds(step) for name, step in steps.items()}, count, warmup=1)
    float_ms = ratio(times, "float", "float")["ms"]
    for name, row in rows.items():
        report.add(model=case.model, batch=case.batch, side=case.side, channels_last=options.channels_last, **row,
                   float_ms=float_ms, **ratio(times, name, "float"), rounds=count)  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, reference=True)
    parser.add_argument("--channels-last", action="store_true", help="images and weights in this layout, on both sides")
    options = parser.parse_args()
    report = Report("step")
    for case in cases(options, short=(64, 2), full=(128, 16)):
        measure(case, options, report)
    report.table(["model", "batch", "code", "method", "bits", "float_ms", "ms", "ratio", "least", "most"])


if __name__ == "__main__":
    main()
