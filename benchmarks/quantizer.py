"""The compiled quantizer loops against the eager functions they copy: forward and backward, paired in one process.

    python benchmarks/quantizer.py [--short]

One JSON line per case, then a table: median ratio eager / compiled over rounds that alternate, with the
smallest and largest ratio. Both sides are checked against each other before anything is timed.
"""

import argparse
import json
import statistics
import time

import torch

from nulsq_cli.ops import codebook, fused, grid


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(eager, compiled, rounds: int) -> tuple[float, float, float]:
    for function in (eager, compiled, eager, compiled):
        function()
    ratios = [seconds(eager) / seconds(compiled) for _ in range(rounds)]
    return min(ratios), statistics.median(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--short", action="store_true")
    rounds = 9 if parser.parse_args().short else 31
    if not fused.use(True):
        raise SystemExit("nothing to compile with on this machine")
    torch.manual_seed(0)
    x, g = torch.randn(128, 16, 32, 32).relu_(), torch.randn(128, 16, 32, 32)
    rows = []
    for bits in (2, 3, 4):
        levels = torch.linspace(0, 3, 2**bits) ** 1.3
        cuts, step, top = codebook.midpoints(levels), torch.tensor([3 / (2**bits - 1)]), 2**bits - 1

        def eager_levels(levels=levels, cuts=cuts):
            y = torch.where(x.isnan(), x, codebook.decode(codebook.encode(x, cuts), levels))
            return y, *codebook.backward_eager(g, x, levels)

        def compiled_levels(levels=levels, cuts=cuts):
            return fused.lookup(x, levels, cuts), *fused.levels_backward(g, x, levels)

        def eager_grid(step=step, top=top):
            return (x / step).clamp_(0, top).round_() * step, *grid.backward_eager(g, x, step, 0, top)

        def compiled_grid(step=step, top=top):
            return fused.grid(x, step, 0, top), *fused.grid_backward(g, x, step, 0, top)

        for name, eager, compiled in (("levels", eager_levels, compiled_levels), ("grid", eager_grid, compiled_grid)):
            for a, b in zip(eager(), compiled(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)
            low, middle, high = compare(eager, compiled, rounds)
            row = {
                "op": name,
                "bits": bits,
                "eager_over_compiled": round(middle, 2),
                "least": round(low, 2),
                "most": round(high, 2),
            }
            print(json.dumps({**row, "shape": list(x.shape), "threads": torch.get_num_threads(), "torch": torch.__version__}))
            rows.append(row)
    print(f"\n{'op':8} {'bits':>4} {'eager / compiled':>17}  (least .. most)")
    for r in rows:
        print(f"{r['op']:8} {r['bits']:4} {r['eager_over_compiled']:17.1f}  ({r['least']:.1f} .. {r['most']:.1f})")


main()
