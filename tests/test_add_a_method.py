"""docs/add-a-method.md, done as it says: the file, the line, then the laws, training and a packed file."""

from __future__ import annotations

import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import nulsq_cli
from nulsq_cli import artifact, methods, recipe
from nulsq_cli.layers import quant_layers, quantizers
from nulsq_cli.models import create_float_model
from nulsq_cli.values import INITIALIZER_NAMES, QuantSpec
from tests.laws import test_quantizers as laws

PAGE = (Path(__file__).parents[1] / "docs" / "add-a-method.md").read_text(encoding="utf-8")
FILE, LINE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
SPECS = [QuantSpec(3, True, "weight"), QuantSpec(3, True, "weight", "channel", 3), QuantSpec(2, False), QuantSpec(4, True)]


@pytest.fixture
def absmax(monkeypatch):
    module = types.ModuleType("nulsq_cli.methods.absmax")
    exec(compile(FILE, "absmax.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "nulsq_cli.methods.absmax", module)
    for name, line in eval("{" + LINE + "}", {"Method": methods.Method}).items():
        monkeypatch.setitem(methods.METHODS, name, line)
    return "absmax"


def test_the_example_obeys_every_law(absmax):
    """All that stand in the file, with the arguments that they ask for."""
    asked = {name: inspect.signature(law).parameters for name, law in vars(laws).items() if name.startswith("test_")}
    assert len(asked) >= 8
    for name, parameters in asked.items():
        for spec in SPECS if "spec" in parameters else SPECS[:1]:
            for rule in INITIALIZER_NAMES if "rule" in parameters else [None]:
                given = {"method": absmax, "spec": spec, "rule": rule}
                getattr(laws, name)(**{key: given[key] for key in parameters})


def test_the_example_has_a_section_and_a_place_in_recipes(absmax, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import methods_page

    page = methods_page.page()
    sys.modules.pop("methods_page")
    section = page.split("\n## absmax\n")[1]
    assert "Levels are the multiples of a fixed step" in section and "| [absmax](#absmax) |" in page
    r = recipe.loads("quant: {method: absmax, rules: [{match: conv1, method: absmax}]}")
    assert r.quant.method == absmax and recipe.loads(r.to_yaml()) == r


def test_the_example_trains_and_leaves_as_a_packed_file(absmax, tmp_path):
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar", num_classes=10)
    images, target = torch.rand(16, 3, 32, 32), torch.arange(16) % 10
    nulsq_cli.quantize(model, [images], bits="3/3", method=absmax)
    assert {type(q).__name__ for q in quantizers(model).values()} == {"AbsMax", "LSQ"}
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for quantizer in quantizers(model).values():
            quantizer.after_step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    path = tmp_path / "model.safetensors"
    artifact.save(path, model, {"arch": "resnet8_cifar", "arch_kwargs": {}, "num_classes": 10, "data_cfg": {}, "bits": "3/3",
                                "method": absmax})  # fmt: skip
    fresh, _ = artifact.load(path)
    assert torch.equal(fresh(images), model(images)) and len(quant_layers(fresh)) == len(quant_layers(model))
