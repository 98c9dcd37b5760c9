"""docs/commands.md names the exit codes, commands and flags that there are."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from nulsq_cli import errors
from nulsq_cli.cli import app
from nulsq_cli.cli.finetune import FLAGS

PAGE = (Path(__file__).parents[1] / "docs/commands.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands


def test_exit_codes_are_those_of_the_errors():
    codes = {error.exit_code for error in (errors.NulsqError, *errors.NulsqError.__subclasses__())}
    named = {int(code) for cell in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.M) for code in cell.split(",")}
    assert named == {0, 130, 143} | codes, "an exit code is missing, or is none"


def test_commands_with_json_are_those_that_there_are():
    with_json = {name for name, command in COMMANDS.items() for p in command.params if "--json" in p.opts}
    assert set(re.findall(r"^\| `([a-z]+)", PAGE.split("## A run folder")[0], re.M)) == with_json


def test_flags_exist():
    known = {word for command in COMMANDS.values() for p in command.params for word in (*p.opts, *p.secondary_opts)}
    known |= {word for spelling, *_ in FLAGS for word in spelling.split(",")}
    assert set(re.findall(r"--[a-z][\w-]*(?<!-)\b", PAGE)) <= known | {"--help"}
