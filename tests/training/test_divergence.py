"""What a run does when its numbers stop being numbers: name the layer, go back once, then give up."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nulsq_cli.calibrate import initialize, layers_to_measure, measure_inputs
from nulsq_cli.convert import Policy, convert, make_plan
from nulsq_cli.errors import DivergedError, Interrupted
from nulsq_cli.models import create_float_model
from nulsq_cli.training import checkpoint, watch
from nulsq_cli.training.engine import Settings, Trainer
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.world import World
from nulsq_cli.values import Bits, Score
from tests.processes import nulsq

HERE = World(0, 1, torch.device("cpu"))
BATCHES = 4
SOMETHING = "(the gradients are not finite|the loss became nan)"  # the loops hand a NaN in a table on, the eager look-up does not
STEPS = "layer2.0.conv1.weight_quantizer"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Everything here is tiny, and a busy machine lets several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Task(nn.Module):
    """What timm's tasks are to the engine."""

    def __init__(self, model):
        super().__init__()
        self.trainable_module = model

    def forward(self, images, target):
        output = self.trainable_module(images)
        return {"loss": nn.functional.cross_entropy(output, target), "output": output}


class Logs(SimpleNamespace):
    """A watcher that remembers."""

    def step(self, *_):
        pass

    def epoch(self, progress):
        self.rows, self.steps = progress.rows, progress.steps

    def write(self, progress):
        self.written = [(row["epoch"], row["batch"]) for row in progress.steps]

    def say(self, text):
        self.said.append(text)


def images(epoch, batch):
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(97 * epoch + batch))


def trainer(folder, trouble=lambda t, images: None, bits="2/2", sched="cosine", **settings):
    """Three epochs of four batches; `trouble` sees the trainer and may spoil it or the images before each batch."""
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar")
    if bits is not None:
        plan = make_plan(model, Policy(Bits.parse(bits), "nulsq-wa"), (3, 16, 16))
        stats = measure_inputs(model, layers_to_measure(plan), lambda: [(0, images(0, 0))], 1)
        convert(model, plan)
        initialize(model, stats, "lloyd", "lloyd")
    options = {"lr": 0.01, "weight_decay": 0.0, "momentum": 0.9, "filter_bias_and_bn": True, "kwargs": {}}
    schedule = {"sched": sched, "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.001}
    pair = Pair(model, options | {"opt": "momentum"}, options | {"opt": "adamw", "lr": 0.001}, schedule, 3, BATCHES)

    def batches(epoch, first):
        for batch in range(first, BATCHES):
            x = images(epoch, batch)
            trouble(made, x)
            yield x, torch.arange(8) % 10

    task = Task(model)
    made = Trainer(lambda _: task, model, pair, HERE, Settings(epochs=3, recovery_steps=3, **settings), folder, batches, BATCHES,
                   lambda m: Score(50.0, 90.0, 1.0, 8), Logs(said=[], rows=[]))  # fmt: skip
    made.save("last")
    return made


def at(t, update):
    return t.progress.updates == update and "went_back" not in t.progress.notes


def spoil_parameter(t, x):
    if at(t, 6):
        with torch.no_grad():
            t.model.get_submodule(STEPS).steps()[0].view(-1)[0] = float("nan")


def spoil_gradient(t, x):
    if at(t, 6) and not hasattr(t, "hook"):
        t.hook = t.model.get_submodule(STEPS).steps()[0].register_hook(lambda g: g * float("inf"))
    elif hasattr(t, "hook"):
        t.hook.remove()


def spoil_images(t, x):
    if at(t, 6):
        x.fill_(float("nan"))


def spoil_output(t, x):
    if at(t, 6):
        with torch.no_grad():
            t.model.linear.weight.fill_(3e38)
            t.model.linear.weight_quantizer.steps()[0].fill_(1e37)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """Schedule -> a run in which nothing happens."""

    @functools.cache
    def run(sched):
        t = trainer(tmp_path_factory.mktemp("calm"), sched=sched)
        t.run()
        return t

    return run


@pytest.mark.parametrize(
    ("spoil", "where", "what", "sched"),
    [
        (spoil_parameter, STEPS, SOMETHING, "cosine"),
        (spoil_parameter, STEPS, SOMETHING, "none"),
        (spoil_gradient, f"the gradient of {STEPS}", "the gradients are not finite", "cosine"),
        (spoil_images, "the images", "the loss became nan", "cosine"),
        (spoil_output, "the output of linear", "the loss became nan", "cosine"),
    ],
)
def test_it_names_the_layer_goes_back_once_and_ends_with_a_smaller_step_rate(tmp_path, calm, spoil, where, what, sched):
    calm, t = calm(sched), trainer(tmp_path / "t", spoil, sched=sched)
    t.run()
    (said,) = t.watcher.said
    assert said.startswith(f"  {where}") and re.search(f"epoch 2, update 6: {what}", said)
    assert "went back to the start of epoch 2, with a tenth of the steps' rate" in said
    assert t.progress.updates == 12 and len(t.watcher.rows) == 3
    assert [row["note"] for row in t.watcher.rows] == [None, said.strip(), None]
    for row, reference in zip(t.watcher.rows, calm.watcher.rows, strict=True):
        slower = 1 if row["epoch"] == 0 else 0.1
        assert row["lr_weights"] == reference["lr_weights"]
        assert row["lr_steps"] == pytest.approx(slower * reference["lr_steps"])
    assert watch.first_bad(t.model) is None


def test_a_second_time_ends_the_run_with_everything_kept(tmp_path):
    def spoil(t, x):
        if t.progress.updates == 6:
            x.fill_(float("nan"))

    t = trainer(tmp_path, spoil)
    with pytest.raises(DivergedError, match="again, after going back once") as caught:
        t.run()
    assert caught.value.exit_code == 4 and caught.value.where == "the images" and caught.value.fix
    assert len(t.watcher.said) == 1
    for name in ("best", "last", "previous", "recovery"):
        tensors, _ = checkpoint.load(tmp_path / f"{name}.safetensors")
        assert all(torch.isfinite(v).all() for v in tensors["model"].values() if v.is_floating_point()), name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_evaluation_of_the_last_epoch_is_obeyed(tmp_path, number, code):
    t = trainer(tmp_path)
    score = t.choose

    def choose(model):
        if t.progress.epoch == 2:
            os.kill(os.getpid(), number)
        return score(model)

    t.choose = choose
    with pytest.raises(Interrupted) as caught:
        t.run()
    assert caught.value.exit_code == code
    assert checkpoint.load(tmp_path / "last.safetensors")[1]["progress"]["epoch"] == 3


def test_the_logs_lose_the_steps_that_were_taken_back(tmp_path):
    t = trainer(tmp_path, spoil_parameter, log_interval=1)
    t.run()
    assert t.watcher.written == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert [(row["epoch"], row["batch"]) for row in t.watcher.steps] == [(e, b) for e in range(3) for b in range(1, 5)]


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    t = trainer(tmp_path_factory.mktemp("whole"), spoil_parameter)
    t.run()
    return t


@pytest.mark.parametrize("killed_at", [4, 7, 11])  # at the start of the second epoch, in it and in the third
def test_the_smaller_rate_and_the_one_chance_survive_a_resume(tmp_path, whole, killed_at):
    def kill(t, x):
        spoil_parameter(t, x)
        if t.progress.updates == killed_at and "went_back" in t.progress.notes:
            raise Killed

    t = trainer(tmp_path / "killed", kill)
    with pytest.raises(Killed):
        t.run()
    found = checkpoint.latest(tmp_path / "killed", pytest.fail)
    again = trainer(tmp_path / "other", spoil_parameter)
    again.folder = tmp_path / "killed"
    again.restore(found)
    again.run()
    assert again.watcher.said == []  # it remembers that it went back
    drop = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert drop(again.watcher.rows) == drop(whole.watcher.rows)
    assert [(row["epoch"], row["batch"]) for row in again.watcher.steps] == [(0, 4), (1, 4), (2, 4)]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_a_float_model_has_no_step_rate_to_lower_and_gives_up_at_once(tmp_path):
    t = trainer(tmp_path, spoil_images, bits=None)
    with pytest.raises(DivergedError, match="epoch 2, update 6"):
        t.run()
    assert not t.watcher.said and checkpoint.load(tmp_path / "last.safetensors")[1]["progress"]["epoch"] == 1


def test_a_spoilt_state_is_never_saved_as_a_recovery(tmp_path):
    """NaN appears after the sixth update, at which a recovery is due: only the next update can notice."""
    t = trainer(tmp_path)
    real = t.pair.zero_grad

    def spoil():
        real()
        if at(t, 5):
            spoil_parameter(SimpleNamespace(progress=SimpleNamespace(updates=6, notes={}), model=t.model), None)

    t.pair.zero_grad = spoil
    saved = []
    keep = t.save
    t.save = lambda name: (saved.append((name, t.progress.updates, watch.first_bad(t.model))), keep(name))
    t.run()
    assert len(t.watcher.said) == 1 and t.progress.updates == 12
    assert all(bad is None for *_, bad in saved) and ("recovery", 4, None) in saved


def test_infinite_gradients_of_a_scaled_loss_are_the_scalers_business(tmp_path):
    t = trainer(tmp_path)
    t.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**127)
    t.run()
    assert not t.watcher.said and t.progress.updates == 12 and t.scaler.get_scale() < 2.0**127


def test_a_resumed_run_has_the_scale_of_the_loss_as_it_was(tmp_path):
    """Halved while gradients were infinite, and on its way to double after four updates with finite ones."""
    scaler = {"enabled": True, "init_scale": 2.0**125, "growth_interval": 4}

    def made(folder, kill=False):
        def trouble(t, x):
            if kill and t.progress.updates == 7:
                raise Killed

        t = trainer(folder, trouble)
        t.scaler = torch.amp.GradScaler("cpu", **scaler)
        return t

    whole = made(tmp_path / "whole")
    whole.run()
    killed = made(tmp_path / "killed", kill=True)
    with pytest.raises(Killed):
        killed.run()
    found = checkpoint.latest(tmp_path / "killed", pytest.fail)
    assert found.path.stem == "recovery" and 0 < found.notes["scaler"]["scale"] < 2.0**125
    again = made(tmp_path / "again")
    again.restore(found)
    again.run()
    assert again.scaler.state_dict() == whole.scaler.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_one_number_sees_everything():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    assert torch.isfinite(watch.one_number(model.parameters(), 1.0))
    for loss in (float("nan"), float("inf")):
        assert not torch.isfinite(watch.one_number(model.parameters(), loss))
    for name, parameter in model.named_parameters():
        kept = parameter.grad.clone()
        for value in (float("nan"), float("inf"), float("-inf")):
            parameter.grad.view(-1)[-1] = value
            assert not torch.isfinite(watch.one_number(model.parameters(), 1.0))
            assert watch.first_bad(model) == f"the gradient of {name}"
        parameter.grad.copy_(kept)


def test_as_a_process_it_is_one_sentence_and_exit_code_4(tmp_path):
    short = ["schedule.epochs=1", "quant.calibration.samples=64", "bn.reestimate_samples=64", "engine.device=cpu"]
    done = nulsq("finetune", "quickstart", *short, "--lr", "1e30", "-o", tmp_path / "r", code=4)
    assert done.stderr.count("\n") == 2
    assert "diverged again" in done.stderr and "went back to the start of epoch 1" in done.stdout
    notes = checkpoint.load(tmp_path / "r/checkpoints/recovery.safetensors")[1]
    assert notes["progress"]["notes"]["went_back"]["epoch"] == 0
    assert json.loads((tmp_path / "r/start.json").read_text())
