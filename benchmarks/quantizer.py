"""A quantizer alone, forward and backward: against the eager truth, against its floor, and against the authors' code.

    python benchmarks/quantizer.py [--short] [--reference PATH]

The floor is memory: forward reads x and writes y, backward reads x and g and writes dx. `floor` is the share of the
bandwidth of `copy_` into an existing buffer, measured in the same rounds, that forward and backward together reach.
`growth` is the time at these bits over that at 2 bits. A ratio is a median over rounds; the spread is in the JSON lines.
"""

from __future__ import annotations

import statistics
import time

import torch
from pairing import Report, alternate, arguments, compiled, ratio, rounds, seconds
from torch import Tensor

from nulsq_cli.methods.base import Quantizer
from nulsq_cli.methods.lsq import LSQ
from nulsq_cli.methods.nulsq import NuLSQ
from nulsq_cli.values import QuantSpec

OPS = ("levels", "signed levels", "grid")
BITS = (2, 3, 4)


def make(op: str, bits: int) -> Quantizer:
    """A quantizer whose levels reach to 3, its gaps growing a little where they may."""
    spec = QuantSpec(bits, signed=op == "signed levels", role="activation")
    if op == "grid":
        quantizer: Quantizer = LSQ(spec)
        quantizer.step.data.fill_(3 / spec.positive)
    else:
        quantizer = NuLSQ(spec)
        sizes = (torch.arange(spec.gaps) - spec.negative + 0.5).abs() ** 0.3
        quantizer.gaps.data[0] = 3 * sizes / sizes[spec.negative :].sum()
    return quantizer.train()


def run(quantize, x: Tensor, g: Tensor, parameter: Tensor) -> tuple[float, float, list[Tensor]]:
    """(seconds forward, seconds backward, output and gradients)."""
    start = time.perf_counter()
    y = quantize(x)
    middle = time.perf_counter()
    grads = torch.autograd.grad(y, (x, parameter), g)
    return middle - start, time.perf_counter() - middle, [y.detach(), *grads]


def check(quantizer: Quantizer, x: Tensor, g: Tensor) -> None:
    """The compiled loops give what the eager functions give, or the benchmark ends here."""
    found = []
    for on in (False, True):
        compiled(on)
        found.append(run(quantizer.quantize, x, g, quantizer.steps()[0])[2])
    (y, dx, dp), (fast_y, fast_dx, fast_dp) = found
    torch.testing.assert_close(fast_y, y, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(fast_dx, dx, rtol=0, atol=0)
    # Both sum millions of terms of either sign; their size, not the sum's, sets the scale of rounding.
    torch.testing.assert_close(fast_dp, dp, rtol=1e-3, atol=1e-6 * float(g.abs().sum()))


def main() -> None:
    parser = arguments(__doc__, reference=True, models=False)
    options = parser.parse_args()
    shape = (2, 8, 8, 8) if options.tiny else (32, 64, 28, 28) if options.short else (32, 64, 56, 56)
    count = rounds(options, 7, 21)
    reference = None
    if options.reference:
        from reference import Reference

        reference = Reference(options.reference)
    report = Report("quantizer")
    torch.manual_seed(0)
    noise, g = torch.randn(shape), torch.randn(shape)
    buffer = torch.empty(shape)
    for op in OPS:
        x = (noise if op == "signed levels" else noise.relu()).requires_grad_()
        alternatives = {"copy": lambda x=x: seconds(lambda: buffer.copy_(x.detach()))}
        parts: dict[str, list[tuple[float, float]]] = {}

        def timed(name: str, on: bool, quantize, parameter: Tensor, x: Tensor = x, parts=parts):
            def once() -> float:
                compiled(on)
                forward, backward, _ = run(quantize, x, g, parameter)
                parts.setdefault(name, []).append((forward, backward))
                return forward + backward

            return once

        for bits in BITS:
            quantizer = make(op, bits)
            check(quantizer, x, g)
            for kind, on in (("ours", True), ("eager", False)):
                name = f"{kind} {bits}"
                alternatives[name] = timed(name, on, quantizer.quantize, quantizer.steps()[0])
            if reference is not None:
                ends = quantizer.spec.negative
                own = quantizer.steps()[0].detach().flatten()
                if op == "signed levels":
                    own = torch.cat((own[:ends].flip(0), own[ends:]))
                theirs, parameter = reference.quantizer(op, bits, own)
                alternatives[f"authors {bits}"] = timed(f"authors {bits}", False, theirs, parameter)
        times = alternate(alternatives, count)
        for bits in BITS:
            name = f"ours {bits}"
            forward, backward = ([part[i] for part in parts[name][-count:]] for i in (0, 1))
            floors = [2.5 * copy / both for copy, both in zip(times["copy"], times[name], strict=True)]
            eager, growth = ratio(times, f"eager {bits}", name), ratio(times, name, "ours 2")
            case = {
                "op": op, "bits": bits, "shape": list(shape), "forward_ms": 1e3 * statistics.median(forward),
                "backward_ms": 1e3 * statistics.median(backward), "eager": eager["ratio"],
                "eager_spread": [eager["least"], eager["most"]], "floor": statistics.median(floors),
                "floor_forward": statistics.median(c / f for c, f in zip(times["copy"], forward, strict=True)),
                "floor_backward": statistics.median(1.5 * c / b for c, b in zip(times["copy"], backward, strict=True)),
                "floor_spread": [min(floors), max(floors)], "growth": growth["ratio"],
                "growth_spread": [growth["least"], growth["most"]],
                "copy_gb_per_s": 8e-9 * x.numel() / statistics.median(times["copy"]),
            }  # fmt: skip
            if reference is not None:
                theirs = ratio(times, f"authors {bits}", name)
                case |= {"authors": theirs["ratio"], "authors_spread": [theirs["least"], theirs["most"]]}
            report.add(**case, rounds=count)
    columns = ["op", "bits", "forward_ms", "backward_ms", "eager", "floor", "growth"]
    report.table(columns + (["authors"] if reference is not None else []))


if __name__ == "__main__":
    main()
