from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

import nulsq_cli
from nulsq_cli import artifact
from nulsq_cli.errors import CheckFailedError, InputError, UsageError
from nulsq_cli.layers import quantizers
from nulsq_cli.models import create_float_model


def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples/own_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "step 2" in printed and "bits per weight" in printed


def test_quantize_trains_and_moves_every_step():
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar")
    images, labels = torch.randn(32, 3, 16, 16), torch.randint(10, (32,))
    nulsq_cli.quantize(model, [images[:16], images[16:]], bits="3/3")
    before = {name: [p.detach().clone() for p in q.steps()] for name, q in quantizers(model).items()}
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for q in quantizers(model).values():
            q.after_step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for name, q in quantizers(model).items():
        assert all(not torch.equal(a, b) for a, b in zip(before[name], q.steps(), strict=True)), name


@pytest.mark.parametrize("batches", [[], [(torch.zeros(2, 3, 16, 16), torch.zeros(2))]])
def test_quantize_says_what_it_needs(batches):
    with pytest.raises(UsageError, match="batches of images"):
        nulsq_cli.quantize(create_float_model("resnet8_cifar"), batches)


def test_finetune_load_and_export_from_python(tmp_path, monkeypatch):
    result = nulsq_cli.finetune("quickstart", "schedule.epochs=0", "quant.calibration.samples=64", output=tmp_path / "r")
    assert nulsq_cli.load(result["artifact"])(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert nulsq_cli.export(tmp_path / "r", tmp_path / "x.safetensors")["verified"]["max_abs_diff"] == 0
    with pytest.raises(InputError, match="does not exist"):
        nulsq_cli.load(tmp_path / "nothing")
    real = artifact.load

    def another_level(path):
        model, read = real(path)
        weight = model.layer1[0].conv1.weight.data
        weight[weight == weight.max()] += 1
        return model, read

    monkeypatch.setattr(artifact, "load", another_level)
    with pytest.raises(CheckFailedError, match="differs from the run") as error:
        nulsq_cli.export(tmp_path / "r", tmp_path / "y.safetensors")
    assert error.value.exit_code == 5 and not (tmp_path / "y.safetensors").exists()


def test_importing_the_package_loads_no_torch():
    import subprocess

    code = "import sys, nulsq_cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
