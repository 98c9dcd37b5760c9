"""Every scheme as a process on the digits: its phases in order, and killed and continued to the same bytes."""

from __future__ import annotations

import json
import signal

import pytest

from tests import metrics
from tests.processes import Process, nulsq, refused

SMALL = ["schedule.epochs=1", "data.hold_out=0.5", "quant.calibration.samples=64", "bn.reestimate_samples=64",
         "data.batch_size=128", "checkpoint.recovery_steps=2"]  # fmt: skip
CASES = {
    "qkd": ["--method", "lq-nets", "--bits", "3/3", "--kd-model-name", "self", "scheme.name=qkd", "schedule.epochs=3",
            "scheme.options.self_study=0.34", "scheme.options.co_study=0.34"],
    "profit": ["--method", "duq", "--bits", "4/4", "--kd-model-name", "self", "scheme.name=profit", "--model-ema",
               "scheme.options={ladder: [5], float_epochs: 0, parts: 2}"],
}  # fmt: skip
EPOCHS = {"qkd": 3, "profit": 6}


@pytest.mark.parametrize("name", CASES)
def test_a_scheme_runs_is_killed_goes_on_and_ends_the_same(name, tmp_path):
    command = ["finetune", "quickstart", *SMALL, *CASES[name], "--json"]
    whole = json.loads(nulsq(*command, "-o", tmp_path / "whole").stdout)
    rows = metrics.epochs(tmp_path / "whole")
    assert whole["epochs"] == EPOCHS[name] == len(rows) and [row["epoch"] for row in rows] == list(range(len(rows)))
    assert whole["best"]["top1"] > 85
    log = (tmp_path / "whole" / "train.log").read_text()
    if name == "profit":
        words = ["32/5: activations 5 (1)", "32/4: activations 4 (1)", "5/4: weights 5 (1)", "4/4: sampling (1)",
                 "4/4: frozen 0/2 (1)", "4/4: frozen 1/2 (1)"]  # fmt: skip
        assert sorted(words, key=log.index) == words
        assert whole["best"]["epoch"] >= 3, "an epoch at other widths was called the best"
    if name == "qkd":
        assert "self-study (1), co-study (1), tutoring (1)" in log

    cut = tmp_path / "cut"
    process = Process(*command, "-o", cut)
    rows_before = {"qkd": 1, "profit": 3}[name]  # co-study, and sampling

    def underway():
        done = len(metrics.epochs(cut)) if (cut / "summary.csv").exists() else 0
        return done >= rows_before and (cut / "checkpoints/recovery.safetensors").exists()

    process.until(underway)
    process.send(signal.SIGKILL)
    process.end()
    again = json.loads(nulsq(*command, "-o", cut, "--resume", "auto").stdout)
    assert (cut / "export/model.safetensors").read_bytes() == (tmp_path / "whole/export/model.safetensors").read_bytes()
    assert again["best"] == whole["best"] and again["last"] == whole["last"]


def test_what_a_scheme_needs_is_said_before_anything_is_loaded(tmp_path):
    for arguments, words in (
        (["scheme.name=qkd"], "scheme.name: qkd needs a teacher"),
        (["scheme.name=plain", "--kd-model-name", "self"], "plain has no teacher"),
        (["scheme.name=qkdd"], "did you mean 'qkd'?"),
        (["scheme.name=profit", "--kd-model-name", "self", "scheme.options.ladder=[4, 8]"], "descending"),
        (["scheme.name=kd", "--kd-model-name", "self", "scheme.options.depth=3"], "'depth'"),
    ):
        refused("finetune", "quickstart", *arguments, "-o", tmp_path / "none", code=2, words=words)
    assert not (tmp_path / "none").exists()
