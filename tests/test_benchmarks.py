"""Every benchmark runs from end to end on the smallest sizes; nothing is timed here, and nothing compiled."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
OURS = [path.stem for path in FOLDER.glob("*.py")]


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks; `compiled` does nothing in it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in OURS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("pairing").compiled = lambda on: None
    yield importlib.import_module
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def run(load, monkeypatch, capsys):
    """Run a script as a user does; the cases that it printed as JSON, and its table."""

    def script(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        out = capsys.readouterr().out
        lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert all(line["benchmark"] == name for line in lines)
        return lines, [line for line in out.splitlines() if line.startswith("|")]

    return script


@pytest.mark.parametrize(
    ("name", "keys", "cases"),
    [
        ("quantizer", {"eager", "floor", "growth", "copy_gb_per_s"}, 9),
        ("step", {"ratio", "least", "most", "float_ms"}, 4),
        ("memory", {"kept_mb", "ratio"}, 4),
        ("evaluation", {"ratio", "least", "most", "float_ms"}, 3),
    ],
)
def test_a_benchmark_prints_a_line_per_case_and_a_table(run, name, keys, cases):
    (machine, *lines), table = run(name, "--tiny")
    assert {"torch", "threads", "processor", "load"} <= machine.keys()
    assert len(lines) == cases and len(table) == cases + 2
    for line in lines:
        assert keys <= line.keys() and all(line[key] > 0 for key in keys)


def test_the_first_step_of_a_new_process(load, capsys):
    startup = load("startup")
    for method in ("float", "nulsq-wa"):
        startup.child("resnet8_cifar", 2, 8, method)
        assert json.loads(capsys.readouterr().out)["first"] > 0


def test_startup_runs_pairs_of_processes_on_an_empty_and_on_a_used_cache(load, monkeypatch, capsys):
    startup, seen = load("startup"), []

    def first_step(place, method, cache):
        used = cache in [c for c, m in seen if m != "float"]
        seen.append((cache, method))
        return 1.0 if method == "float" else 2.0 if used else 11.0

    monkeypatch.setattr(startup, "first_step", first_step)
    monkeypatch.setattr(sys, "argv", ["startup", "--tiny"])
    startup.main()
    _, first, later = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (first["when"], first["overhead_s"]) == ("first time", 10) and (later["when"], later["overhead_s"]) == ("later run", 1)


def test_alternatives_take_turns_and_each_round_begins_with_another(load):
    pairing, order = load("pairing"), []
    times = pairing.alternate({name: lambda name=name: order.append(name) or float(ord(name)) for name in "abc"}, 3, warmup=1)
    assert "".join(order) == "abc" "abc" "bca" "cab"
    assert times == {name: [float(ord(name))] * 3 for name in "abc"}


def test_a_ratio_is_a_median_over_rounds_with_its_ends(load):
    found = load("pairing").ratio({"x": [2.0, 9.0, 4.0], "float": [1.0, 3.0, 4.0]}, "x", "float")
    assert found == {"ratio": 2, "least": 1, "most": 3, "ms": 4000}


def test_a_fast_path_that_is_wrong_is_not_timed(load):
    cases = load("cases")
    case = cases.Case("resnet8_cifar", 2, 8)
    step = cases.Step(cases.quantized(case.float_model(), "nulsq-wa", 2, case.images()), case.images())
    step.check()

    def compiled(on):
        with torch.no_grad():
            step.model.layer1[0].conv1.input_quantizer.gaps.mul_(1.2 if on else 1)

    cases.compiled = compiled
    with pytest.raises(AssertionError):
        step.check()


def test_bytes_are_those_that_wait_for_backward(load):
    memory = load("memory")

    class Exponential(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(10_000))

        def forward(self, x):
            scaled = 2 * self.w  # freed: nothing needs it
            return x * scaled.exp().view(1000, 10).sum(0)  # kept: the gradient of exp is its result

    step = memory.Step(Exponential(), torch.ones(50, 10))
    step()
    # Cross entropy keeps log-probabilities, 50 x 10, and a few numbers.
    assert 40_000 + 2_000 <= memory.kept(step) <= 40_000 + 2 * 2_000 + 200


def test_what_is_no_checkout_is_refused(load, tmp_path):
    with pytest.raises(SystemExit, match="no checkout"):
        load("reference").Reference(str(tmp_path))
