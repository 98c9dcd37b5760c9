"""Stabilizers in runs that really train: as processes, interrupted, with averages, and packed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

import nulsq_cli
from nulsq_cli import artifact, recipe, session
from nulsq_cli.errors import UsageError
from nulsq_cli.layers import quant_layers
from nulsq_cli.methods import METHODS
from nulsq_cli.models import create_float_model
from nulsq_cli.stabilizers import make_stabilizers
from nulsq_cli.stabilizers.base import bins
from nulsq_cli.stabilizers.bin_reg import spread
from nulsq_cli.stabilizers.freezing import Freezing
from nulsq_cli.training import checkpoint
from tests.processes import Process, nulsq
from tests.test_convert import policy, quantized

FAST = ("schedule.epochs=1", "quant.calibration.samples=128", "bn.reestimate_samples=128")

# Averages and thresholds that a run of a dozen updates can reach.
QUICK = {
    "bin-reg": "{name: bin-reg, begin: 0, first: 10, last: 10}",
    "dampening": "{name: dampening, begin: 0, last: 1}",
    "freezing": "{name: freezing, begin: 0.2, first: 0.2, last: 0.05, momentum: 0.1}",
}


def result_of(*arguments):
    return json.loads(nulsq(*arguments).stdout)


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoints/last.safetensors")[0]["model"]


def frozen_count(state: dict[str, torch.Tensor]) -> int:
    return sum(int(v.sum()) for k, v in state.items() if k.endswith(".weight_freezer.frozen"))


@pytest.mark.parametrize("name", QUICK)
def test_a_run_with_it_trains_and_its_file_computes_the_same(tmp_path, name):
    flags = ["finetune", "quickstart", *FAST, f"quant.stabilizers=[{QUICK[name]}]", "--lr", 0.1]
    result = result_of(*flags, "-o", tmp_path / "r", "--json")
    assert result["best"]["top1"] > 50
    assert result_of("eval", result["artifact"], "--json")["top1"] == result["best"]["top1"]
    images = torch.randn(8, 1, 16, 16)
    run, packed = nulsq_cli.load(tmp_path / "r"), nulsq_cli.load(result["artifact"])
    with torch.no_grad():
        assert torch.equal(run(images), packed(images))
    assert (frozen_count(saved(tmp_path / "r")) > 0) == (name == "freezing")


@pytest.mark.parametrize("item", ["{name: bin-reg, begin: 0, first: 50, last: 50, widest: 2}",
                                  "{name: dampening, begin: 0, first: 0.3, last: 0.3, aggregate: sum}"])  # fmt: skip
def test_weights_end_nearer_to_their_levels_than_without(tmp_path, item):
    """With steps that rest, so that nothing but the weights can gather."""
    distance = {}
    for kind, items in (("with", item), ("without", "")):
        nulsq_cli.finetune("quickstart", *FAST, "quant.method=lsq", "optimizer.steps.lr=0", f"quant.stabilizers=[{items}]",
                           output=tmp_path / kind)  # fmt: skip
        layers = [
            x for x in quant_layers(session.read_run(tmp_path / kind).model()).values() if x.weight_quantizer.spec.bits == 2
        ]
        distance[kind] = [float(spread(x.weight.detach(), *(t.detach() for t in bins(x)))) for x in layers]
    assert len(distance["with"]) == 6
    assert all(a < b for a, b in zip(distance["with"], distance["without"], strict=True))
    assert sum(distance["with"]) < 0.85 * sum(distance["without"])


def test_an_interrupted_run_freezes_the_same_weights(tmp_path):
    common = ["finetune", "quickstart", *FAST, "schedule.epochs=3", f"quant.stabilizers=[{QUICK['freezing']}]", "--lr", 0.1,
              "log.interval=1", "--recovery-interval", 20]  # fmt: skip
    nulsq(*common, "-o", tmp_path / "whole", "--json")
    process = Process(*common, "-o", tmp_path / "cut", "-q")
    process.until(tmp_path / "cut/checkpoints/recovery.safetensors")
    process.send(signal.SIGKILL)
    process.end()
    before = checkpoint.load(tmp_path / "cut/checkpoints/recovery.safetensors")[0]["model"]
    nulsq(*common, "-o", tmp_path / "cut", "--resume", "auto", "--json")
    one, two = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert 0 < frozen_count(before) < frozen_count(one)
    packed = [(tmp_path / n / "export/model.safetensors").read_bytes() for n in ("whole", "cut")]
    assert packed[0] == packed[1]


def test_updates_are_counted_whatever_they_gather_and_averages_are_exported_with_them(tmp_path, monkeypatch):
    seen = []
    act = Freezing.after_update
    monkeypatch.setattr(Freezing, "after_update", lambda self, progress: (seen.append(progress), act(self, progress)))
    result = nulsq_cli.finetune("quickstart", *FAST, "schedule.epochs=2", "engine.grad_accum_steps=3", "ema.enabled=true",
                                "ema.decay=0.5", "optimizer.weights.lr=0.1", f"quant.stabilizers=[{QUICK['freezing']}]",
                                output=tmp_path / "r")  # fmt: skip
    d = recipe.load(tmp_path / "r/recipe.yaml").data
    batches = -(-round(1437 * (1 - d.hold_out)) // d.batch_size)
    updates = 2 * -(-batches // 3)
    assert seen == [pytest.approx((k + 1) / updates) for k in range(updates)]
    groups = checkpoint.load(tmp_path / "r/checkpoints/last.safetensors")[0]
    frozen = {k for k in groups["model"] if k.endswith(("weight_freezer.frozen", "weight_freezer.code"))}
    assert frozen and all(torch.equal(groups["model"][k], groups["ema"][k]) for k in frozen)
    assert result["artifact"] and frozen_count(groups["ema"]) > 0


def test_a_resumed_run_keeps_its_stabilizers(tmp_path):
    nulsq_cli.finetune("quickstart", *FAST, "quant.stabilizers=[{name: freezing}]", output=tmp_path / "r")
    for other in ("[]", "[{name: freezing, momentum: 0.1}]", "[{name: dampening}]"):
        with pytest.raises(UsageError, match=r"other stabilizers, or other options of them \(freezing\)"):
            nulsq_cli.finetune("quickstart", *FAST, f"quant.stabilizers={other}", output=tmp_path / "r", resume="auto")
    again = nulsq_cli.finetune("quickstart", *FAST, "quant.stabilizers=[{name: freezing}]", output=tmp_path / "r", resume="auto")
    assert again["artifact"]


@pytest.mark.parametrize("method", METHODS)
def test_the_packed_file_of_every_method_holds_the_frozen_codes(tmp_path, method):
    torch.manual_seed(0)
    model, _ = quantized(create_float_model("resnet8_cifar"), (3, 16, 16), policy("3/3", method))
    layers = quant_layers(model)
    make_stabilizers(layers, [{"name": "freezing"}])
    changed = 0
    for layer in layers.values():
        if layer.weight_freezer is not None:
            codes = layer.weight_codes()[1]
            layer.weight_freezer.frozen.view(-1)[::3] = True
            layer.weight_freezer.code.fill_(2)
            changed += int((layer.weight_codes()[1] != codes).sum())
    meta = {"arch": "resnet8_cifar", "arch_kwargs": {}, "num_classes": 10, "data_cfg": {}, "bits": "3/3", "method": method}
    artifact.save(tmp_path / "a.safetensors", model.eval(), meta)
    fresh, read = artifact.load(tmp_path / "a.safetensors")
    images = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    assert changed > 100 and not [k for k in read.tensors if "weight_freezer" in k]
