"""Flags that mean more than one key of a recipe."""

from __future__ import annotations

import pytest

from nulsq_cli.cli.finetune import read
from nulsq_cli.errors import RecipeError

KEY = "checkpoint.recovery_steps"


@pytest.mark.parametrize(("text", "steps", "minutes"), [("500", 500, 15.0), ("10m", None, 10.0), ("0.5m", None, 0.5)])
def test_a_recovery_interval_is_in_updates_or_minutes(text, steps, minutes):
    found = read([], {KEY: ("--recovery-interval", text)}).checkpoint
    assert (found.recovery_steps, found.recovery_minutes) == (steps, minutes)


@pytest.mark.parametrize("text", ["", "m", "10s", "-3", "0m", "1.5"])
def test_what_is_neither_is_a_sentence_with_the_flag(text):
    with pytest.raises(RecipeError, match="--recovery-interval: checkpoint.recovery"):
        read([], {KEY: ("--recovery-interval", text)})
