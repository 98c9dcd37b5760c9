"""Flags that mean more than one key of a recipe, and words from files on a screen."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from nulsq_cli import recipe
from nulsq_cli.cli.finetune import FLAGS, read
from nulsq_cli.cli.show import Show
from nulsq_cli.errors import InputError, NulsqError, RecipeError

KEY = "checkpoint.recovery_steps"


@pytest.mark.parametrize(("text", "steps", "minutes"), [("500", 500, 15.0), ("10m", None, 10.0), ("0.5m", None, 0.5)])
def test_a_recovery_interval_is_in_updates_or_minutes(text, steps, minutes):
    found = read([], {KEY: ("--recovery-interval", text)}).checkpoint
    assert (found.recovery_steps, found.recovery_minutes) == (steps, minutes)


@pytest.mark.parametrize("text", ["", "m", "10s", "-3", "0m", "1.5"])
def test_what_is_neither_is_a_sentence_with_the_flag(text):
    with pytest.raises(RecipeError, match="--recovery-interval: checkpoint.recovery"):
        read([], {KEY: ("--recovery-interval", text)})


def test_what_stands_in_files_is_shown_and_not_obeyed(capsys):
    Show().table("runs/[/red]", ["layer"], [["re:[a-z]"], ["[/x]"]])
    said = capsys.readouterr().out.replace("\n", "")  # a title is as wide as its table
    assert all(word in said for word in ("runs/[/red]", "re:[a-z]", "[/x]"))
    assert str(NulsqError("a\x1b[2Jb\u202ec\nd", fix="é")) == "a\\x1b[2Jb\\u202ec\nd\n  fix: é"


@pytest.mark.parametrize(("given", "amp", "whole"), [
    ({"amp": ("--amp", True)}, "bfloat16", "auto"),
    ({"amp": ("--amp", True), "engine.amp": ("--amp-dtype", "float16")}, "float16", "auto"),
    ({"amp": ("--amp", False), "torchcompile": ("--torchcompile", True)}, None, "model"),
])  # fmt: skip
def test_timm_s_switches_of_the_engine(given, amp, whole):
    found = read([], given).engine
    assert (found.amp, found.compile) == (amp, whole)


def test_every_flag_is_a_key_of_the_recipe():
    resolved = recipe.load("quickstart").model_dump(mode="json")
    for flag, key, *_ in FLAGS:
        at = resolved
        for part in key.split(".") if key not in ("amp", "torchcompile") else ():
            assert part in at, flag
            at = at[part]


def test_timm_s_flags_of_mixup_and_averages_arrive():
    words = {"--vflip": 0.5, "--train-interpolation": "random", "--mixup-prob": 0.7, "--mixup-switch-prob": 0.2,
             "--mixup-mode": "elem", "--mixup-off-epoch": 3, "--layer-decay": 0.5, "--model-ema-warmup": False}  # fmt: skip
    keys = {flag: key for flag, key, *_ in FLAGS}
    r = read([], {keys[flag]: (flag, value) for flag, value in words.items()})
    a = r.data.augment
    assert [a.vflip, a.train_interpolation, a.mixup_prob, a.mixup_switch_prob, a.mixup_mode, a.mixup_off_epoch,
            r.optimizer.weights.layer_decay, r.ema.warmup] == list(words.values())  # fmt: skip


def test_a_run_that_goes_on_brings_its_own_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("extends: [quickstart]\nquant: {bits: 4/4, method: lsq}\n")
    found = read(["schedule.epochs=3"], {"seed": ("--seed", 7)}, resume=str(tmp_path))
    assert (str(found.quant.bits), found.quant.method, found.schedule.epochs, found.seed) == ("4/4", "lsq", 3, 7)
    assert str(read(["quickstart"], {}, resume=str(tmp_path)).quant.bits) == "2/2"
    with pytest.raises(InputError, match="no run to resume"):
        read([], {}, resume=str(tmp_path / "none"))


def test_what_two_recipes_do_differently():
    before = recipe.load("quickstart")
    after = recipe.load("quickstart", overrides=["seed=1", "description=x", "quant.rules=[{match: conv1, skip: true}]"])
    found = recipe.differences(before, after)
    assert found["seed"] == (before.seed, 1) and found["quant.rules.0.match"] == (None, "conv1")
    assert "description" not in found and not recipe.differences(before, before)


@pytest.mark.parametrize(("quiet", "as_json", "mute", "out"), [
    (False, False, False, ["progress", "result", "layer"]), (True, False, False, ["result", "layer"]),
    (True, True, False, []), (True, False, True, []),
])  # fmt: skip
def test_quiet_leaves_results_and_the_log_has_everything(capsys, tmp_path, quiet, as_json, mute, out):
    show = Show(quiet=quiet, as_json=as_json)
    show.mute = mute
    show.say("progress")
    with show.outcome() as alone:
        show.say("result")
        show.table("", ["layer"], [["conv1"]])
    show.log_to(tmp_path / "train.log")
    show.say("later")
    words = ("progress", "result", "layer")
    said = capsys.readouterr()
    assert [w for w in words if w in said.out + said.err] == out and alone == quiet
    log = (tmp_path / "train.log").read_text()
    places = [log.index(word) for word in (*words, "conv1", "later")]
    assert places == sorted(places) and log.count("progress") == 1


def test_the_live_line_says_the_step():
    show = Show()
    show.console = Console(file=StringIO(), force_terminal=True, width=150)
    show.start_training(3, 40, 0)
    show.step({"epoch": 1, "batch": 20, "batches": 40, "train_loss": 0.5, "lr_weights": 0.1, "lr_steps": None,
               "images_per_second": 100.0})  # fmt: skip
    task = show.live.tasks[0]
    assert task.description == "epoch 2/3  step 20/40" and task.completed == 60
    show.stop_training()
