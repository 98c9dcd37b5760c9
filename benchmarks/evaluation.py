"""An evaluation pass of a quantized model, and a calibration pass, against an evaluation pass of the float model.

    python benchmarks/evaluation.py [--short]

All passes see the same images, from memory: reading them would cost all passes the same and hide what is compared. They
are evaluated in batches of 250 and 64, and calibrated in chunks of 64, as in a run. A calibration pass is `measure_inputs`,
which sees each image once; `start_ms` is what follows it once per model, whatever the number of images: statistics of the
weights and the first steps.
"""

from __future__ import annotations

import copy
import time

import torch
from cases import Case, cases, quantized, widths
from pairing import Report, alternate, arguments, compiled, ratio, rounds, seconds
from torch import Tensor, nn

from nulsq_cli import calibrate
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.pairing import one_operation
from nulsq_cli.session import CHUNK
from nulsq_cli.training.evaluate import evaluate
from nulsq_cli.training.world import World
from nulsq_cli.values import Bits

ALONE = World(0, 1, torch.device("cpu"))


def check_outputs(model: nn.Module, images: Tensor) -> None:
    """The compiled loops give the outputs of the eager functions."""
    found = []
    for on in (False, True):
        compiled(on)
        with torch.no_grad(), one_operation(model, images):
            found.append(model.eval()(images))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


def check_statistics(model: nn.Module, name: str, images: Tensor) -> None:
    """What one pass measures is what float64 gives of the whole tensor at once."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    stats = calibrate.measure_inputs(model, [name], lambda: [(0, images)], 1)[name]
    hook.remove()
    exact = {"mean_abs": seen[0].abs().mean(), "mean_square": seen[0].square().mean(), "largest": seen[0].amax()}
    for key, value in exact.items():
        torch.testing.assert_close(getattr(stats, key)[0], value, rtol=1e-6, atol=0)
    assert float(stats.mass.sum()) == seen[0].numel(), "entries are missing in the histogram"


def measure(case: Case, batches: int, options, report: Report) -> None:
    """One model: float evaluation, calibration, and evaluation of quantized ones."""
    images = [case.images() + 0.01 * k for k in range(batches)]
    chunks = list(torch.cat(images).split(CHUNK))
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in images]
    model = case.float_model().eval()
    plan = make_plan(model, Policy(Bits(2, 2), "nulsq-wa"), images[0].shape[1:])
    names = calibrate.layers_to_measure(plan)
    check_statistics(model, names[1], images[0])
    rows = {"calibration": {"pass": "calibration", "method": "", "bits": None}}
    alternatives = {
        "float": lambda: seconds(lambda: evaluate(model, labelled, ALONE)),
        "calibration": lambda: seconds(lambda: calibrate.measure_inputs(model, names, lambda: enumerate(chunks), len(chunks))),
    }
    for method in ("lsq", "nulsq-wa"):
        for bits in widths(options):
            made = quantized(model, method, bits, images[0])
            check_outputs(made, images[0][:16])
            rows[f"{method} {bits}"] = {"pass": "evaluation", "method": method, "bits": bits}
            alternatives[f"{method} {bits}"] = lambda made=made: seconds(lambda: evaluate(made, labelled, ALONE))
    compiled(True)
    count = rounds(options, 5, 15)
    times = alternate(alternatives, count, warmup=1)
    stats = calibrate.measure_inputs(model, names, lambda: enumerate(chunks), len(chunks))
    start = time.perf_counter()
    calibrate.initialize(convert(copy.deepcopy(model), plan), stats, "lloyd", "lloyd")
    rows["calibration"]["start_ms"] = 1e3 * (time.perf_counter() - start)
    for name, row in rows.items():
        report.add(model=case.model, batch=case.batch, side=case.side, images=batches * case.batch, **row,
                   float_ms=ratio(times, "float", "float")["ms"], **ratio(times, name, "float"), rounds=count)  # fmt: skip


def main() -> None:
    options = arguments(__doc__).parse_args()
    report = Report("evaluation")
    for case in cases(options, short=(250, 16), full=(250, 64)):
        measure(case, 1 if options.short or options.tiny else 2, options, report)
    report.table(["model", "batch", "pass", "method", "bits", "float_ms", "ms", "ratio", "least", "most", "start_ms"])


if __name__ == "__main__":
    main()
