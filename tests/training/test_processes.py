"""Several processes that train together must do what one does, and stop, fail and go on like one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nulsq_cli.cli import launch
from nulsq_cli.jobs.logs import Logs
from nulsq_cli.methods import make_quantizer
from nulsq_cli.training import checkpoint
from nulsq_cli.training.optim import Pair
from nulsq_cli.training.state import Progress, State, split_anew
from nulsq_cli.training.world import World, join
from nulsq_cli.values import QuantSpec
from tests import metrics
from tests.processes import CONTEXT, ROOT, Process

SMALL = ("finetune", "quickstart", "quant.calibration.samples=100", "bn.reestimate_samples=150", "--epochs", "1")


# ---- processes that train together -----------------------------------------------------------------


def place(rank, size, folder, **meeting):
    """The variables by which a process finds the others."""
    meeting = meeting or {"NULSQ_RENDEZVOUS": (folder / "meeting").as_uri()}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **meeting}


@dataclass
class Team:
    """Processes that train together."""

    processes: list[Process]

    def end_like_torchrun(self):
        """As soon as one has failed, end the others."""
        while any(p.alive() for p in self.processes) and not any(p.process.exitcode for p in self.processes):
            time.sleep(0.01)
        for process in self.processes:
            process.process.terminate()

    def codes(self, **limit):
        """Their exit codes."""
        return [process.end(**limit).returncode for process in self.processes]

    def text(self, name):
        """What they said on stdout (out) or stderr (err), all together."""
        return "".join(getattr(process, name).read_text() for process in self.processes)


@pytest.fixture
def team(tmp_path):
    """Start `nulsq` in some processes."""
    started = []

    def start(size, *arguments, **variables):
        folder = tmp_path / f"meeting{len(started)}"
        folder.mkdir()
        places = [place(rank, size, folder, **variables) if size > 1 else {} for rank in range(size)]
        started.append(Team([Process(*arguments, **where) for where in places]))
        return started[-1]

    yield start
    for process in (p for t in started for p in t.processes if p.alive()):
        process.process.kill()


@pytest.fixture
def train(team, tmp_path):
    """Train in some processes to the end; what they left in their folder."""

    def run(name, size, *changes):
        done = team(size, *SMALL, "--no-export", "-q", "-o", tmp_path / name, *changes)
        assert done.codes() == [0] * size, done.text("err")
        return tmp_path / name

    return run


def model(run, name="last"):
    return checkpoint.load(run / f"checkpoints/{name}.safetensors")[0]["model"]


# ---- the same numbers -------------------------------------------------------------------------------


def test_the_start_of_a_run_is_the_same_bytes_in_any_number_of_processes(train):
    """360 images in batches of 49 divide by nothing here; so do calibration's chunks of 64."""
    runs = [train(f"{size}", size, "--epochs", "0", "-vb", "49") for size in (1, 3)]
    for name in ("plan.json", "start.json", "checkpoints/last.safetensors"):
        assert len({(run / name).read_bytes() for run in runs}) == 1, name
    assert json.loads((runs[1] / "start.json").read_text())["init"]["samples"] == 360


def test_a_step_on_two_half_batches_is_a_step_on_the_whole_batch(train):
    """1293 images: an epoch is one update. BatchNorm is frozen, for its batch is that of a process."""
    one, two = (train(f"{size}", size, "bn.freeze_after=0", "-vb", "128", "-b", 1200 // size) for size in (1, 2))
    whole, halves, before = model(one), model(two), model(one, "previous")
    torch.testing.assert_close(halves, whole, rtol=1e-5, atol=2e-6)
    moved = [name for name in whole if (whole[name] - before[name]).abs().max() > 1e-4]
    assert "conv1.weight" in moved and "layer1.0.conv1.weight_quantizer.gaps" in moved
    (first,), (second,) = metrics.epochs(one), metrics.epochs(two)
    assert first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-6)


def test_only_the_first_process_writes(tmp_path):
    other = World(1, 2, torch.device("cpu"))
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    options = {"opt": "sgd", "lr": 0.1, "weight_decay": 0.0, "momentum": 0.9, "filter_bias_and_bn": False}
    pair = Pair(net, options, options, {"sched": "cosine", "warmup_epochs": 0, "warmup_lr": 0, "min_lr": 0}, 1, 1)
    state = State(net, pair, other, tmp_path)
    state.progress.rows, state.progress.steps = [{"epoch": 0}], [{"epoch": 0, "batch": 1}]
    show = SimpleNamespace(step=lambda row: None, epoch=lambda row: None)
    all_three = {"last.safetensors", "metrics.jsonl", "summary.csv"}
    for world, written in ((other, set()), (World(0, 2, torch.device("cpu")), all_three)):
        state.world = world
        logs = Logs(tmp_path, show, world.primary)
        state.save("last")
        logs.step(state.progress.steps[0])
        logs.epoch(state.progress)
        assert {path.name for path in tmp_path.iterdir()} == written


def share_statistics(variables, how, folder):
    """What one process does in the next test."""
    os.environ.update(variables)
    world = join("cpu")
    norms = [nn.BatchNorm1d(1) for _ in range(3)]
    for norm in norms:
        norm.running_mean.fill_(1.0 + 2.0 * world.rank)
    tables = [make_quantizer("lq-nets", QuantSpec(2, False)) for _ in range(2)]
    for table in tables:
        table.basis.mul_(1.0 + 2.0 * world.rank)
    model, averaged = (nn.Sequential(norm, table) for norm, table in zip(norms, tables, strict=False))
    run = SimpleNamespace(world=world, model=model, ema=SimpleNamespace(module=averaged), also={"teacher": norms[2]})
    State.share_running_statistics(run, how)
    world.leave()
    found = [norm.running_mean.item() for norm in norms] + [table.basis[0].tolist() for table in tables]
    (folder / str(world.rank)).write_text(json.dumps(found))


@pytest.mark.parametrize(("how", "means"), [("reduce", [2, 2]), ("broadcast", [1, 1]), ("none", [1, 3])])
def test_running_statistics_become_the_mean_of_all_processes_or_those_of_the_first(tmp_path, how, means):
    """Those of the averaged model are always those of the first, which is what its checkpoint holds; a teacher's never differ.

    Nor do the tables that LQ-Nets fits to the images of each process: accuracies are of one set of levels.
    """
    processes = [CONTEXT.Process(target=share_statistics, args=(place(rank, 2, tmp_path), how, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [
        [mean, 1, 2 if how == "reduce" else 1, [2, 4] if how == "reduce" else [1, 2], [1, 2]] for mean in means
    ]


def test_a_teacher_that_studied_along_is_the_same_in_both_processes(train, tmp_path):
    """A checkpoint has the first process's, to which both go back; that must change nothing."""
    command = ("--kd-model-name", "self", "-b", 256, "scheme.name=qkd", "scheme.options={self_study: 0, co_study: 0.5}",
               "--epochs", 2)  # fmt: skip
    whole = train("whole", 2, *command)
    (tmp_path / "again").mkdir()
    for path in whole.rglob("*.*"):
        if path.is_file() and path.stem not in ("last", "recovery"):
            copy = tmp_path / "again" / path.relative_to(whole)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy.with_stem("last") if path.stem == "previous" else copy)
    again = train("again", 2, *command, "--resume", "auto")
    assert "resumed from last" in (again / "train.log").read_text()
    for name, tensor in model(whole).items():
        assert torch.equal(tensor, model(again)[name]), name


def test_another_split_keeps_the_position_in_samples():
    for before, batch, now, batches, accumulated, expected in (
        (128, 5, 64, 20, 1, 10), (128, 5, 128, 10, 1, 5), (64, 5, 128, 10, 1, 3), (64, 5, 128, 10, 2, 4),
        (64, 19, 192, 6, 1, 6), (128, 0, 64, 20, 1, 0),
    ):  # fmt: skip
        progress = Progress(epoch=2, batch=batch, updates=99, loss_sum=0.5 * batch)
        split_anew(progress, before, now, batches, accumulated)
        assert progress.batch == expected and progress.loss_sum == pytest.approx(0.5 * expected)
        assert progress.updates == 2 * -(-batches // accumulated) + -(-expected // accumulated)


# ---- stopping and going on ---------------------------------------------------------------------------

LONG = (*SMALL, "-b", "64", "--recovery-interval", "3", "--model-ema", "--mixup", "0.3")


def test_a_run_that_was_told_to_stop_goes_on_to_the_same_bytes(team, tmp_path):
    whole = team(2, *LONG, "-q", "-o", tmp_path / "whole")
    parts = team(2, *LONG, "-o", tmp_path / "parts")
    parts.processes[0].until(tmp_path / "parts/checkpoints/recovery.safetensors")
    parts.processes[1].send(signal.SIGTERM)  # one is enough
    assert parts.codes() == [143, 143] and parts.text("err").count("error:") == 1
    assert "recovery checkpoint was written" in parts.text("err")
    rest = team(2, *LONG, "-o", tmp_path / "parts", "--resume", "auto", "--json")
    assert (rest.codes(), whole.codes()) == ([0, 0], [0, 0]), rest.text("err")
    assert json.loads(rest.text("out"))["epochs"] == 1 and "exact up to" not in rest.text("err")
    assert "resumed from recovery" in rest.text("err")
    assert len({(tmp_path / name / "export/model.safetensors").read_bytes() for name in ("whole", "parts")}) == 1
    last = [checkpoint.load(tmp_path / name / "checkpoints/last.safetensors")[0] for name in ("whole", "parts")]
    assert list(last[0]) == list(last[1])
    for group in last[0]:
        torch.testing.assert_close(last[0][group], last[1][group], rtol=0, atol=0)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_is_killed_the_others_stop_and_any_number_goes_on(team, tmp_path, victim):
    killed = team(2, *LONG, "-o", tmp_path / "r")
    killed.processes[0].until(tmp_path / "r/checkpoints/recovery.safetensors")
    killed.processes[victim].send(signal.SIGKILL)
    codes = killed.codes(within=60)  # what is promised: a minute
    assert (codes[victim], codes[1 - victim]) == (-9, 1)
    assert killed.text("err").count("error:") == 1 and "another process of this run has ended" in killed.text("err")
    rest = team(1, *LONG, "-o", tmp_path / "r", "--resume", "auto")
    assert rest.codes() == [0], rest.text("err")
    assert "2 processes with 128 images per batch became 1 with 64: the run is exact up to this" in rest.text("out")
    assert len(metrics.epochs(tmp_path / "r")) == 1


# ---- one voice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("quikstart",), 2, "no recipe called"),
        (("--no-such-flag",), 2, "No such option"),
        (("quickstart", "--data-dir", "nowhere", "--dataset", ""), 3, "nowhere"),
        (("quickstart", "--epochs", "0", "--min-top1", "101", "--no-export"), 5, "below the 101"),
        (("quickstart", "--sync-bn"), 2, "leave out --sync-bn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_said_once_and_has_its_exit_code(team, tmp_path, arguments, code, words):
    """As under torchrun, where an agent keeps the store, and ends the others when one has failed."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    agent = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = team(2, "finetune", *arguments, "-o", tmp_path / "r", **agent)
    done.end_like_torchrun()
    codes = done.codes()
    assert codes[0] == code and codes[1] in (0, code, 143, -signal.SIGTERM)
    assert done.text("err").lower().count("error") == 1 and words in done.text("err")


STAND_IN = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
assert os.environ["WORLD_SIZE"] == "2" and os.environ["NULSQ_RENDEZVOUS"].startswith("file:///")
what = sys.argv[1 + rank]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
if what == "tell":
    time.sleep(0.3)
    os.kill(os.getppid(), signal.SIGTERM)
    what = "stay"
if what == "stay":
    time.sleep(60)
if what == "kill":
    os.kill(os.getpid(), 9)
sys.exit(int(what))
"""


@pytest.mark.parametrize(
    ("ways", "code", "words"),
    [(("0", "0"), 0, ""), (("3", "3"), 3, ""), (("5", "0"), 5, ""), (("stay", "4"), 4, ""), (("stay", "tell"), 143, ""),
     (("stay", "kill"), 1, "process 1 of 2 was ended by SIGKILL")],
)  # fmt: skip
def test_the_launcher_ends_as_its_processes_do(tmp_path, monkeypatch, capfd, ways, code, words):
    (tmp_path / "nulsq_cli").mkdir()
    (tmp_path / "nulsq_cli/__init__.py").touch()  # without it an installed nulsq would be found first
    (tmp_path / "nulsq_cli/__main__.py").write_text(STAND_IN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "PATIENCE", 1.0)
    before = signal.getsignal(signal.SIGTERM)
    assert launch.launch(ways, 2) == code
    said = capfd.readouterr().err
    assert words in said and said.count("error:") == bool(words)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_the_launcher_is_the_command(tmp_path):
    def nulsq(*arguments):
        return subprocess.run([sys.executable, "-m", "nulsq_cli", *map(str, arguments), "--nproc-per-node", "2"], cwd=tmp_path,
                              capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip

    wrong = nulsq(*SMALL, "--bits", "3")
    assert wrong.returncode == 2 and wrong.stderr.count("error:") == 1
    right = nulsq(*SMALL, "--epochs", "0", "--json")
    assert right.returncode == 0, right.stderr
    assert json.loads(right.stdout)["init"]["top1"] > 50 and right.stderr.count("● Result") == 1


@pytest.mark.slow
def test_two_torchruns_stand_for_two_machines(tmp_path):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "7",
               "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost",
               "-m", "nulsq_cli", *SMALL, "-b", "600", "-o", str(tmp_path / "r"), "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) for _ in "ab"]
    said = [agent.communicate(timeout=300) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said[0][1] + said[1][1]
    assert json.loads(said[0][0] + said[1][0])["best"]["top1"] > 50
    split = checkpoint.load(tmp_path / "r/checkpoints/last.safetensors")[1]["split"]
    assert split == {"processes": 2, "images": 1200}
