"""`nulsq compare` as a process: the matrix, going on after a kill, collecting, and what it refuses."""

from __future__ import annotations

import json
import re
import signal

import pytest

from nulsq_cli import recipe
from nulsq_cli.errors import UsageError
from nulsq_cli.jobs import comparison
from tests.processes import Process, nulsq, refused

FAST = ["schedule.epochs=1", "data.hold_out=0.5", "data.batch_size=128", "quant.calibration.samples=64",
        "bn.reestimate_samples=64"]  # fmt: skip
MATRIX = ["--methods", "lsq,nulsq-wa", "--bits", "2/2,3/3"]


def test_a_matrix_is_run_continued_after_a_kill_and_collected(tmp_path):
    folder = tmp_path / "matrix"
    command = ["compare", "quickstart", *FAST, *MATRIX, "-o", folder, "--json"]
    first = folder / "lsq-w2a2-s42" / "result.json"
    killed = Process(*command)
    killed.until(first)
    killed.send(signal.SIGKILL)
    killed.end()
    kept = first.stat().st_mtime_ns

    result = json.loads(nulsq(*command).stdout)
    assert first.stat().st_mtime_ns == kept, "a finished run was repeated"
    assert [(c["method"], c["bits"]) for c in result["cells"]] == [
        ("lsq", "2/2"), ("lsq", "3/3"), ("nulsq-wa", "2/2"), ("nulsq-wa", "3/3")]  # fmt: skip
    for cell in result["cells"]:
        run = json.loads((folder / f"{cell['method']}-w{cell['bits'].replace('/', 'a')}-s42" / "result.json").read_text())
        assert cell["top1"] == [run["best"]["top1"]] and cell["seeds"] == [42] and cell["spread"] is None
    for name in ("compare.md", "compare.json", "compare.png", "compare.svg"):
        assert (folder / name).stat().st_size > 100

    again = nulsq("compare", "quickstart", *FAST, *MATRIX, "-o", folder, "--collect", "--json")
    assert json.loads(again.stdout) == result
    refused("compare", "quickstart", *FAST, *MATRIX, "--lr", "0.5", "-o", folder, code=2,
            words="another recipe, with optimizer.weights.lr 0.02, not 0.5")


def test_impossible_matrices_are_refused_before_anything_runs(tmp_path):
    for arguments, code, words in (
        (["--methods", "lsq,nulsk"], 2, "no method called 'nulsk'"), (["--bits", "2/2,9/9"], 2, "bits must be 2..8"),
        (["--seeds", "a"], 2, "whole numbers"), (["--methods", ","], 2, "nothing to compare"),
        (["--collect"], 3, "no finished run"),
    ):  # fmt: skip
        refused("compare", "quickstart", *arguments, "-o", tmp_path / "none", code=code, words=words)
    assert not (tmp_path / "none").exists()


def test_only_what_is_compared_may_differ_from_the_recipe_that_a_folder_holds(tmp_path):
    r = recipe.load("quickstart")
    comparison._same_recipe(r, tmp_path)
    assert recipe.load(tmp_path / "compare.yaml") == r
    for change in ({"quant.method": "lsq"}, {"quant.bits": "4/4"}, {"seed": 7}, {"description": "x"}):
        comparison._same_recipe(recipe.with_values(r, change), tmp_path)
    for change in ({"quant.first_last.method": "nulsq-wa"}, {"quant.first_last.bits": "4/4"},
                   {"quant.rules": [{"match": "conv1", "bits": "4/4"}]}, {"model.kwargs": {"seed": 3}}):  # fmt: skip
        with pytest.raises(UsageError, match=re.escape(next(iter(change)))):
            comparison._same_recipe(recipe.with_values(r, change), tmp_path)


def test_a_figure_is_quoted_for_the_stabilizer_and_scheme_that_it_is_of(tmp_path, monkeypatch):
    quoted, matrix = [], comparison.Matrix(["lsq"], ["4/4"], [1])
    monkeypatch.setattr(comparison.comparison, "gather", lambda results, methods, widths, published: quoted.append(published))
    for name, change, expected in (
        ("imagenet_mobilenetv2_br", {}, 3), ("imagenet_mobilenetv2_br", {"quant.stabilizers": []}, 0),
        ("imagenet_mobilenetv2", {}, 12), ("imagenet_mobilenetv2_profit", {}, 1),
        ("imagenet_mobilenetv2_profit", {"scheme.name": "kd", "scheme.options": None}, 0),
    ):  # fmt: skip
        with pytest.raises(TypeError):  # nothing was gathered
            comparison._report(recipe.with_values(recipe.load(name), change), matrix, [], tmp_path, None)
        assert len(quoted.pop()) == expected, (name, change)
