"""Every method as a short run: what it trained is what its packed file computes, and what entropy counts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import nulsq_cli
from nulsq_cli import artifact
from nulsq_cli.methods import METHODS
from nulsq_cli.report import entropy
from nulsq_cli.training.pictures import Digits
from tests import metrics

FAST = ("schedule.epochs=1", "data.hold_out=0.5", "quant.calibration.samples=128", "bn.reestimate_samples=128", "quant.bits=3/3")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_every_method_is_its_packed_file(method, tmp_path):
    result = nulsq_cli.finetune("quickstart", *FAST, f"quant.method={method}", output=tmp_path / "r")
    assert result["method"] == method and result["best"]["top1"] > 60 and len(metrics.epochs(tmp_path / "r")) == 1
    pictures = [image for image, _ in list(Digits("validation"))[:64]]
    images = torch.stack([torch.tensor(list(image.getdata())).view(1, 8, 8) / 255 for image in pictures])
    with torch.no_grad():
        trained, packed = (nulsq_cli.load(target)(images) for target in (tmp_path / "r", result["artifact"]))
    assert torch.equal(trained, packed)
    read = artifact.read(Path(result["artifact"]))
    for row in entropy.of_artifact(read)["layers"]:
        if row["tensor"] == "weight":
            assert sum(row["counts"]) == read.codes(row["name"]).numel()
        assert 0 <= row["entropy"] <= math.log2(len(row["levels"])) + 1e-9
        assert row["levels_used"] == sum(count > 0 for count in row["counts"]) > 1
