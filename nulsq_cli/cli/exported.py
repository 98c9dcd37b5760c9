"""What people see of an export for a runtime."""

from __future__ import annotations

from typing import Any

from nulsq_cli.cli.show import Show, size


def show_export(found: dict[str, Any], show: Show) -> None:
    """Sizes, how file, twin and run agree, shares of integers, speed, and what to beware of."""
    names = {"float_bytes": "float network", "bytes": "this file", "packed_weight_bytes": "weight codes, packed",
             "ideal_weight_bytes": "ideal", "entropy_bound_bytes": "entropy of the codes",
             "rest_bytes": "all but the codes"}  # fmt: skip
    show.table("", ["", "size"], [[words, size(found[key])] for key, words in names.items()], right={1})
    verified = found["verified"]
    rows = [_row(f"{name} and twin", c) for name, c in verified["runtimes"].items()]
    rows.append(_row("twin and the run's own tables", verified["twin_and_model"]))
    show.table("", ["", "images", "same class", "logit error", "median", "top-1"], rows, right={1, 2, 3, 4, 5})
    if "model_top1" in verified:
        show.say(f"  the run itself has {verified['model_top1']:.2f} % on these images")
    for runtime, share in verified["integer_layers"].items():
        show.say(f"  {100 * share:.0f} % of the layers compute in integers in {runtime}")
    for runtime in ("onnxruntime", "openvino"):
        if runtime in found["latency"]:
            rows = [[name, f"{t['ms']:.2f}", f"{t['ratio']:.3f}"] for name, t in found["latency"][runtime].items()]
            show.table("", [f"{runtime}, 1 thread, batch 1", "ms", "of float32"], rows, right={1, 2})
    for sentence in found["warnings"]:
        show.say(f"  ! {sentence}", style="bold yellow")
    show.say(f"  {found['path']}")


def _row(name: str, c: dict[str, Any]) -> list[str]:
    top1 = f"{c['top1']:.2f} %" if "top1" in c else ""
    return [name, str(c["samples"]), f"{c['top1_agreement']:.2f} %", f"{c['relative_error']:.1e}",
            f"{c['median_error']:.1e}", top1]  # fmt: skip
