from __future__ import annotations

import pytest
import torch

from nulsq_cli import api
from nulsq_cli.layers import quantizers
from nulsq_cli.methods import METHODS
from nulsq_cli.models import create_float_model
from nulsq_cli.training.evaluate import evaluate
from nulsq_cli.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
IMAGES = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[k : k + 10], torch.arange(10)[: len(IMAGES[k : k + 10])]) for k in range(0, 24, 10)]


def quantized(method):
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar")
    return api.quantize(model, [IMAGES], bits="2/2", method=method, init="mse", first_last_method="lsq")


def loss_by_hand(model):
    with torch.no_grad():
        outputs = [torch.nn.functional.cross_entropy(model.eval()(x), y, reduction="sum") for x, y in BATCHES]
    return float(torch.stack(outputs).double().sum()) / 24


@pytest.mark.parametrize("method", METHODS)
def test_an_evaluation_computes_what_single_batches_do_and_remembers_nothing(method):
    model = quantized(method).train()
    for change in (1.0, 1.5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(change)
        score = evaluate(model, BATCHES, ALONE)
        assert model.training and score.samples == 24
        assert score.loss == pytest.approx(loss_by_hand(model), rel=1e-6)
        model.train()
    assert all(q.kept is None for q in quantizers(model).values())


def test_tables_are_computed_once_however_many_batches_there_are(monkeypatch):
    model, calls = quantized("nulsq-wa"), []
    for name, q in quantizers(model).items():
        monkeypatch.setattr(q, "tables", lambda x, own=q.tables, name=name: calls.append(name) or own(x))
    evaluate(model, BATCHES, ALONE)
    assert sorted(calls) == sorted(quantizers(model))


def test_an_evaluation_that_fails_leaves_nothing_behind():
    model = quantized("lsq")
    with pytest.raises(RuntimeError):
        evaluate(model, [*BATCHES, (IMAGES[:, :2], torch.zeros(24))], ALONE)
    assert all(q.kept is None for q in quantizers(model).values())
