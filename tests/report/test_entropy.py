from __future__ import annotations

import math

import pytest
import torch

from nulsq_cli import artifact
from nulsq_cli.report import entropy, plots
from tests.test_artifact import packed


def test_shannon_by_hand():
    assert entropy.shannon(torch.tensor([1, 1, 1, 1])) == 2
    assert entropy.shannon(torch.tensor([0, 7, 0])) == 0 and math.copysign(1, entropy.shannon(torch.tensor([7]))) == 1
    assert entropy.shannon(torch.tensor([2, 1, 1])) == 1.5
    assert entropy.shannon(torch.zeros(4)) == 0


def test_weight_histograms_are_those_of_the_weights(tmp_path):
    model, _, _ = packed(tmp_path / "a.safetensors")
    found = entropy.of_artifact(artifact.read(tmp_path / "a.safetensors"))
    row = next(r for r in found["layers"] if r["name"] == "layer2.0.conv1" and r["tensor"] == "weight")
    weight = model.layer2[0].conv1.quantized_weight().detach()
    levels, counts = weight.unique(return_counts=True)
    used = [(level, count) for level, count in zip(row["levels"], row["counts"], strict=True) if count]
    assert [c for _, c in used] == counts.tolist() and [v for v, _ in used] == levels.tolist()
    assert row["levels_used"] == len(levels) and 0 < row["entropy"] <= 3
    assert found["mean_weight_entropy"] <= 3 and found["mean_activation_entropy"] is None


def test_activation_histograms_are_those_of_the_inputs(tmp_path):
    model, _, _ = packed(tmp_path / "a.safetensors")
    images, inputs = torch.randn(4, 3, 16, 16), []
    layer = model.layer2[0].conv1
    layer.input_quantizer.register_forward_hook(lambda m, args, out: inputs.append(out))
    counts = entropy.count_activations(model, [images[:3], images[3:]])["layer2.0.conv1"]
    assert len(inputs) == 2
    levels = layer.input_quantizer.codebook(torch.zeros(1)).levels
    values = torch.cat([i.flatten() for i in inputs])
    assert counts == [int((values == level).sum()) for level in levels]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn_for_one_and_for_several(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    found = []
    for method in ("lsq", "nulsq-wa"):
        packed(tmp_path / method, method=method)
        found.append(entropy.of_artifact(artifact.read(tmp_path / method)))
        plots.entropy(found, tmp_path / f"{len(found)}.{suffix}")
    sizes = [(tmp_path / f"{n}.{suffix}").stat().st_size for n in (1, 2)]
    assert min(sizes) > 5000 and sizes[0] != sizes[1]


def test_targets_of_one_method_and_width_are_told_apart_by_their_run():
    same = {"method": "lsq", "bits": "2/2"}
    targets = [{**same, "target": "runs/a"}, {**same, "target": "runs/b.2/export/model.safetensors"}, {**same, "bits": "3/3"}]
    assert plots.labels(targets) == ["lsq 2/2 a", "lsq 2/2 b.2", "lsq 3/3"]
