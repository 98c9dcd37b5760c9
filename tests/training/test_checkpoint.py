"""Checkpoints: whole or not at all, damage found, and an older one used in its place."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

import nulsq_cli
from nulsq_cli import files, recipe
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.jobs.logs import Logs
from nulsq_cli.training import checkpoint
from nulsq_cli.training.state import STEPS_KEPT, Progress
from tests import metrics, processes

SHORT = ("schedule.epochs=2", "quant.calibration.samples=64", "bn.reestimate_samples=64", "data.hold_out=0.5",
         "data.batch_size=128", "engine.device=cpu")  # fmt: skip
TENSORS = {
    "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7), "c": torch.zeros(0), "d": torch.tensor([True, False])},
    "ema": {"a": torch.ones(2, 3, dtype=torch.bfloat16)},
}
NOTES = {"progress": {"epoch": 3, "loss": 0.1 + 0.2}, "x": [1, None, 1e-300], "y": {"10": 1, "9": 2}}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Everything here is tiny, and a busy machine lets several threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "c" / "last.safetensors"
    checkpoint.save(path, TENSORS, NOTES)
    tensors, notes = checkpoint.load(path)
    assert notes == NOTES and list(notes) == list(NOTES)  # logs are written from them: the order counts
    assert set(safetensors.torch.load_file(path)) == {"model/a", "model/b", "model/c", "model/d", "ema/a"}
    for group, members in TENSORS.items():
        for name, tensor in members.items():
            assert tensors[group][name].dtype == tensor.dtype and torch.equal(tensors[group][name], tensor)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    shuffled = {g: dict(reversed(members.items())) for g, members in reversed(TENSORS.items())}
    checkpoint.save(tmp_path / "a.safetensors", TENSORS, NOTES)
    checkpoint.save(tmp_path / "b.safetensors", shuffled, NOTES)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "x.safetensors"
    checkpoint.save(path, TENSORS, NOTES)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(InputError, match="truncated or damaged") as caught:
        checkpoint.load(path)
    assert caught.value.exit_code == 3 and str(path) in str(caught.value)


def test_every_flipped_bit_of_the_tensors_and_every_truncation_is_found(whole, tmp_path):
    path = tmp_path / "x.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(header, len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            refused(path, bytes(damaged))
    for length in range(len(whole)):
        refused(path, whole[:length])
    refused(path, whole + b"\0")


@given(st.data())
def test_a_changed_byte_in_the_header_is_found_or_changes_nothing(whole, tmp_path_factory, data):
    position = data.draw(st.integers(0, 7 + int.from_bytes(whole[:8], "little")))
    damaged = bytearray(whole)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    path.write_bytes(damaged)
    try:
        tensors, notes = checkpoint.load(path)
    except InputError as refusal:
        assert "truncated or damaged" in str(refusal)
    else:  # white space, or another spelling of the same
        assert notes == NOTES
        assert {g: {k: t.tolist() for k, t in m.items()} for g, m in tensors.items()} == {
            g: {k: t.tolist() for k, t in m.items()} for g, m in TENSORS.items()
        }


def test_files_of_others_are_refused(tmp_path):
    tensor = {"model/a": torch.ones(1)}
    for metadata in (None, {"nulsq": "1"}, {"nulsq": "{}"}, {"nulsq": '{"notes": 1}'}, {"nulsq": '{"notes": {}, "sha256": 0}'}):
        refused(tmp_path / "x.safetensors", safetensors.torch.save(tensor, metadata=metadata))
    with pytest.raises(InputError, match="cannot be read"):
        checkpoint.load(tmp_path / "none.safetensors")


def number(n: int) -> tuple[dict, dict]:
    return {"model": {"n": torch.tensor(n)}}, {"n": n}


def test_the_last_one_is_kept_as_previous_and_used_when_newer_ones_are_damaged(tmp_path):
    said: list[str] = []
    assert checkpoint.latest(tmp_path, said.append) is None
    for n in (1, 2, 3):
        checkpoint.save(tmp_path / "last.safetensors", *number(n))
    checkpoint.save(tmp_path / "recovery.safetensors", *number(4))
    checkpoint.save(tmp_path / "best.safetensors", *number(9))
    for name, n in (("recovery", 4), ("last", 3), ("previous", 2)):
        found = checkpoint.latest(tmp_path, said.append)
        assert (found.path.stem, found.notes) == (name, {"n": n}) and found.tensors["model"]["n"] == n
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        assert checkpoint.load(tmp_path / "best.safetensors")[1] == {"n": 9}
    said.clear()
    with pytest.raises(InputError, match="recovery.safetensors, last.safetensors, previous.safetensors"):
        checkpoint.latest(tmp_path, said.append)
    assert len(said) == 3 and all("damaged" in line for line in said)


class Died(BaseException):
    """Stands for the end of the process: nothing handles it."""


CALLS = [("open", os), ("fsync", os), ("replace", os), ("write_bytes", Path), ("unlink", Path)]


@pytest.mark.parametrize("error", [Died, OSError], ids=["killed", "disk error"])
def test_whichever_call_fails_in_a_save_a_whole_checkpoint_is_left(tmp_path, monkeypatch, error):
    """One try for every call into the file system: it fails, and everything after it too if the process died."""
    tries = 0
    for fails in range(100):
        folder = tmp_path / f"{error.__name__}{fails}"
        folder.mkdir()
        for n in (1, 2):
            checkpoint.save(folder / "last.safetensors", *number(n))
        count = 0

        def counted(real, fails=fails):
            def call(*arguments, **more):
                nonlocal count
                count += 1
                if count == fails + 1 or (error is Died and count > fails):
                    raise error("here")
                return real(*arguments, **more)

            return call

        with monkeypatch.context() as patch:
            for name, owner in CALLS:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            try:
                checkpoint.save(folder / "last.safetensors", *number(3))
                ended = True
            except (Died, InputError):
                ended = False
        found = checkpoint.latest(folder, lambda text: pytest.fail(text))
        assert found.notes["n"] in ((3,) if ended else (2, 3))
        if ended and count <= fails:
            break
        tries += 1
    assert tries >= 6
    files.remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    nulsq_cli.finetune("quickstart", *SHORT, output=folder)
    return folder


@pytest.mark.parametrize("damaged", [["last"], ["last", "metrics", "leftover"]], ids=["last", "everything"])
def test_a_run_with_a_damaged_checkpoint_says_so_and_ends_the_same(run, tmp_path, damaged):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    shutil.rmtree(folder / "export")
    path = folder / "checkpoints/last.safetensors"
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content) // 2, len(content))] ^= 4
    path.write_bytes(content)
    if "metrics" in damaged:
        for name in ("metrics.jsonl", "summary.csv", "result.json"):
            (folder / name).unlink()
    if "leftover" in damaged:
        (folder / "checkpoints/.best.safetensors.99.tmp").write_bytes(b"half")
    nulsq_cli.finetune("quickstart", *SHORT, output=folder, resume="auto")
    said = (folder / "train.log").read_text()
    assert "last.safetensors: is truncated or damaged" in said and "resumed from previous.safetensors: epoch 2" in said
    assert (folder / "export/model.safetensors").read_bytes() == (run / "export/model.safetensors").read_bytes()
    assert metrics.rows(folder) == metrics.rows(run) and not list(folder.rglob("*.tmp"))


def test_a_checkpoint_holds_the_newest_rows_and_the_log_the_others(tmp_path):
    step = lambda n: {"epoch": n // 1000, "batch": n % 1000 + 1}  # noqa: E731
    epochs = [{"epoch": n, "eval_top1": 1.0} for n in range(3)]
    log = Logs(tmp_path, SimpleNamespace(step=lambda row: None), True)
    for n in range(2500):
        log.step(step(n))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "bat')  # the machine stopped
    log.write(Progress(epoch=2, batch=400, rows=epochs[:2], steps=[step(n) for n in range(1400, 2400)]))
    assert metrics.rows(tmp_path) == [*map(step, range(1000)), epochs[0], *map(step, range(1000, 2000)), epochs[1],
                                      *map(step, range(2000, 2400))]  # fmt: skip
    log.write(Progress())
    assert metrics.rows(tmp_path) == [] and STEPS_KEPT == 1000


def test_logs_that_a_kill_swallowed_are_written_again(run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "summary.csv").write_text("half a li")
    nulsq_cli.finetune("quickstart", *SHORT, output=folder, resume="auto")
    for name in ("metrics.jsonl", "summary.csv"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_a_run_that_goes_on_with_other_settings_says_so_and_keeps_them(run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    nulsq_cli.finetune("quickstart", *SHORT, "optimizer.weights.lr=0.5", "log.interval=7", output=folder, resume="auto")
    said = (folder / "train.log").read_text()
    assert [line.split("began: ")[1] for line in said.splitlines() if "changed since the run began" in line] == [
        "log.interval: 50 -> 7", "optimizer.weights.lr: 0.02 -> 0.5"]  # fmt: skip
    now = recipe.load(folder / "recipe.yaml")
    assert (now.optimizer.weights.lr, now.log.interval) == (0.5, 7)
    assert recipe.differences(recipe.load(run / "recipe.yaml"), now).keys() == {"log.interval", "optimizer.weights.lr"}
    assert "layer1.0.conv1" in said and said.startswith("● Model")  # the plan, and what was said before there was a folder


def test_a_damaged_or_missing_best_is_not_replaced_by_something_else(run, tmp_path):
    folder = tmp_path / "r"
    shutil.copytree(run, folder)
    best = folder / "checkpoints/best.safetensors"
    best.write_bytes(best.read_bytes()[:-9])
    with pytest.raises(InputError, match="best.safetensors: is truncated or damaged"):
        nulsq_cli.load(folder)
    best.unlink()
    with pytest.raises(InputError, match="best.safetensors: is missing"):
        nulsq_cli.load(folder)


def test_a_recovery_is_written_by_the_clock(tmp_path, monkeypatch):
    names: list[str] = []
    real = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, *rest: (names.append(path.stem), real(path, *rest)))
    nulsq_cli.finetune("quickstart", *SHORT, "schedule.epochs=1", "checkpoint.recovery_minutes=1e-9", output=tmp_path / "r")
    assert names.count("recovery") == 5 and names[0] == names[-1] == "last"  # 719 images are 5 whole batches


def test_another_plan_is_refused_by_layer_and_changes_nothing(run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "train.log"}
    for rule, layers in (
        ("quant.rules=[{match: 'layer2.*', bits: 4/4}]", "layer2.0.conv1, layer2.0.conv2"),
        ("quant.rules=[{match: 'layer1.0.conv1', skip: true}]", "layer1.0.conv1"),
        ("quant.granularity=channel", "layer1.0.conv1, layer1.0.conv2, layer2.0.conv1"),
        ("quant.options={grad_scale: lsq}", "the method options"),
    ):
        with pytest.raises(UsageError, match=f"another plan; it differs in .*{layers}"):
            nulsq_cli.finetune("quickstart", *SHORT, rule, output=run, resume="auto")
    command = ["finetune", "quickstart", *SHORT, "quant.rules=[{match: 'layer2.*', bits: 4/4}]", "-o", run, "--resume", "auto"]
    done = processes.refused(*command, code=2, words="another plan")
    assert "it differs in layer2.0.conv1, layer2.0.conv2\n" in done.stderr and "fix:" in done.stderr
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != "train.log"}
