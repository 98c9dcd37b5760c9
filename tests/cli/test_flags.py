"""Flags that mean more than one key of a recipe, and words from files on a screen."""

from __future__ import annotations

import pytest

from nulsq_cli.cli.finetune import read
from nulsq_cli.cli.show import Show
from nulsq_cli.errors import NulsqError, RecipeError

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
