"""The options of the engine, each on a network that really trains for an epoch."""

from __future__ import annotations

import json

import pytest
import torch

import nulsq_cli
from nulsq_cli import recipe
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.jobs.stretches import short_warmup, stretches
from nulsq_cli.layers import quantizers
from nulsq_cli.models import create_float_model
from nulsq_cli.training import checkpoint
from nulsq_cli.training.evaluate import evaluate
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World
from nulsq_cli.values import Bits
from tests import metrics

FAST = ("schedule.epochs=1", "data.hold_out=0.5", "quant.calibration.samples=128", "bn.reestimate_samples=128")
HERE = World(0, 1, torch.device("cpu"))


def losses(folder, *changes):
    """Of an epoch with these changes: of training, and of the model that is exported."""
    result = nulsq_cli.finetune("quickstart", *FAST, *changes, output=folder)
    assert result["best"]["top1"] > 50 and result["artifact"]
    (row,), steps = metrics.epochs(folder), metrics.steps(folder)
    assert steps[-1]["batch"] == steps[-1]["batches"] and steps[-1]["train_loss"] == row["train_loss"]
    assert row["train_loss"] < 2.5 and row["lr_steps"] is not None
    return row["train_loss"], row["eval_loss"]


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("without") / "r")


@pytest.mark.parametrize(
    "changes",
    [
        ["engine.grad_accum_steps=3"],
        ["teacher.name=self", "teacher.temperature=2"],
        ["teacher.name=nulsq/digits_resnet8"],
        ["data.augment.mixup=0.2"],
        ["data.augment.cutmix=0.5"],
        ["data.augment.smoothing=0.1"],
        ["bn.freeze_after=0"],
        ["engine.amp=bfloat16"],
        ["quant.granularity=channel"],
        ["optimizer.weights.layer_decay=0.5"],
        ["quant.options={grad_scale: lsq}"],
        ["quant.init.weights=nmse"],
    ],
    ids=lambda changes: changes[0],
)
def test_an_option_trains_in_another_way_and_its_file_is_the_run(tmp_path, without, changes):
    found = losses(tmp_path / "r", *changes)
    assert abs(found[0] - without[0]) > 1e-5, "the option changes nothing"


def test_an_average_is_what_is_evaluated_and_changes_no_training(tmp_path, without):
    found = losses(tmp_path / "r", "ema.enabled=true", "ema.decay=0.9")
    assert found[0] == without[0] and abs(found[1] - without[1]) > 1e-5


def test_loader_processes_change_nothing(tmp_path, without):
    assert losses(tmp_path / "r", "data.workers=2") == without


@pytest.mark.parametrize(("epochs", "said"), [(5, None), (3, "2 epochs, not 3: training has 3"), (1, "0 epochs, not 3")])
def test_a_warmup_that_does_not_fit_is_said(epochs, said):
    r = recipe.load("quickstart", overrides=[f"schedule.epochs={epochs}", "schedule.warmup_epochs=3"])
    sentence = short_warmup(r, stretches(r))
    assert sentence is None if said is None else said in sentence


def test_frozen_batchnorm_keeps_its_statistics_and_others_move(tmp_path):
    stats = {}
    for name, changes in (("frozen", ["bn.freeze_after=0"]), ("free", [])):
        nulsq_cli.finetune("quickstart", *FAST, *changes, output=tmp_path / name)
        after = checkpoint.load(tmp_path / name / "checkpoints/last.safetensors")[0]["model"]
        stats[name] = after["bn1.running_mean"]
    nulsq_cli.finetune("quickstart", *FAST, "schedule.epochs=0", output=tmp_path / "start")
    before = checkpoint.load(tmp_path / "start/checkpoints/last.safetensors")[0]["model"]["bn1.running_mean"]
    assert torch.equal(stats["frozen"], before) and not torch.equal(stats["free"], before)


def test_clipping_holds_the_weights_back_and_not_the_steps(tmp_path):
    states = []
    for epochs in (0, 1):
        nulsq_cli.finetune("quickstart", *FAST, f"schedule.epochs={epochs}", "optimizer.clip_grad=1e-7",
                           "optimizer.weights.weight_decay=0", output=tmp_path / str(epochs))  # fmt: skip
        states.append(checkpoint.load(tmp_path / str(epochs) / "checkpoints/last.safetensors")[0]["model"])
    moved = {name: float((states[1][name] - value).abs().max()) for name, value in states[0].items() if value.is_floating_point()}
    assert 0 < moved["layer1.0.conv1.weight"] < 1e-5 and moved["bn1.weight"] < 1e-5
    assert moved["layer1.0.conv1.weight_quantizer.gaps"] > 1e-3 and moved["layer1.0.conv1.input_quantizer.gaps"] > 1e-4


def pair(weights=None, steps=None, schedule=None):
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar")
    convert(model, make_plan(model, Policy(Bits(2, 2), "nulsq-wa", granularity="channel"), (3, 16, 16)))
    one = {"opt": "momentum", "lr": 0.1, "weight_decay": 1e-4, "momentum": 0.9, "filter_bias_and_bn": True, "kwargs": {}}
    two = {"opt": "adamw", "lr": 0.001, "weight_decay": 0.0, "momentum": 0.9, "kwargs": {}}
    three = {"sched": "cosine", "warmup_epochs": 1, "warmup_lr": 0.01, "min_lr": 0.005}
    return model, Pair(model, one | (weights or {}), two | (steps or {}), three | (schedule or {}), 5, 10)


def test_every_parameter_is_in_exactly_one_group_and_no_step_decays_with_the_weights():
    model, p = pair()
    own = {id(q) for m in quantizers(model).values() for q in m.steps()}
    groups = {name: [id(x) for g in o.param_groups for x in g["params"]] for name, o in p.optimizers.items()}
    assert set(groups["steps"]) == own and not own & set(groups["weights"])
    assert sorted(groups["steps"] + groups["weights"]) == sorted(id(x) for x in model.parameters() if x.requires_grad)
    assert not own & {id(x) for x in p.weight_parameters}


def test_the_steps_rate_keeps_its_proportion_through_warmup_and_to_the_end():
    _, p = pair()
    for update in range(51):
        p.update_rates(update)
        weights, steps = p.rates()
        assert steps == pytest.approx(weights * 0.01)
    assert p.rates()[0] == pytest.approx(0.005)


def test_an_optimizer_comes_back_as_it_was():
    runs = []
    for stop in (False, True):
        model, p = pair()
        for k in range(4):
            if stop and k == 2:
                saved = {n: checkpoint.optimizer_state(o) for n, o in p.optimizers.items()}
                weights = model.state_dict()
                model, p = pair()
                model.load_state_dict(weights)
                for n, o in p.optimizers.items():
                    checkpoint.restore_optimizer(o, saved[n][0], json.loads(json.dumps(saved[n][1])))
            p.update_rates(k)
            model.train()(torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(k))).square().sum().backward()
            for o in p.optimizers.values():
                o.step()
            p.zero_grad()
        runs.append(model.state_dict())
    assert all(torch.equal(v, runs[1][k]) for k, v in runs[0].items())


def test_accuracy_counts_every_sample_once():
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x

    logits = torch.eye(7)[[0, 1, 2, 3, 4]]
    target = torch.tensor([0, 1, 2, 0, 0])
    score = evaluate(Fixed(), [(logits[:3], target[:3]), (logits[3:], target[3:])], HERE)
    assert score.samples == 5 and score.top1 == 60
    assert score.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, target)), rel=1e-6)
