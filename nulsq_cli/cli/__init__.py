"""The command line: parse, call one job, show. No command loads torch before it has parsed its arguments."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import typer

from nulsq_cli.cli import bench, commands, compare, finetune, launch
from nulsq_cli.cli.everywhere import Verbose, everywhere, together
from nulsq_cli.errors import NulsqError, Stopped

app = typer.Typer(
    name="nulsq", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a vision model to 2-4 bits with learned non-uniform step sizes, and pack it.",
)  # fmt: skip
for name, command in {
    "finetune": finetune.finetune, "plan": finetune.plan, "compare": compare.compare, "bench": bench.bench,
    **commands.COMMANDS
}.items():  # fmt: skip
    app.command(name)(everywhere(command))


def _version(wanted: bool) -> None:
    if wanted:
        from nulsq_cli.version import __version__

        typer.echo(f"nulsq {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    verbose: Verbose = False,
) -> None:
    """Fine-tune a vision model to 2-4 bits with learned non-uniform step sizes, and pack it."""


def main() -> None:
    """Run a command; every expected failure ends in two lines on stderr and its exit code."""
    arguments = sys.argv[1:]
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        with _only_the_first_speaks(), _signals_obeyed():
            app(args=together(arguments), prog_name="nulsq")
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except (Exception, Stopped) as error:
        if verbose:
            traceback.print_exc()
        sys.exit(_end(error))


@contextlib.contextmanager
def _signals_obeyed() -> Iterator[None]:
    """SIGINT and SIGTERM end a command with a sentence, while there is one."""

    def stop(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


def _end(error: BaseException) -> int:
    """Say what went wrong, once however many processes it happens to, and return the exit code."""
    code = 1
    if isinstance(error, NulsqError):
        text, code = f"error: {error}", error.exit_code
    elif isinstance(error, Stopped):
        text, code = "error: interrupted\n  fix: give the same command again; a run goes on with --resume auto", error.exit_code
    elif str(error).startswith("DataLoader worker"):  # torch's words for a loader process that died
        text = (f"error: the images cannot be read any more: {str(error).splitlines()[0].strip()}\n  fix: if memory ran out, use"
                " fewer loaders with --workers; then give the same command again, a run's with --resume auto")  # fmt: skip
        code = 3
    else:
        text = f"error: unexpected {type(error).__name__}: {error}\n  fix: this is a bug; run again with -v and report it"
    if not launch.one_of_many():
        print(text, file=sys.stderr)
        return code
    if isinstance(error, Stopped) and os.environ["RANK"] != "0":
        return code  # the first is told as well, or says what became of this one
    from nulsq_cli.training import world

    if world.lost_another(error):
        text = ("error: another process of this run has ended, or cannot be reached any more\n"
                "  fix: see what became of it; then go on with the same command and --resume auto")  # fmt: skip
        time.sleep(1)  # it may still be about to say why
    return world.speak_once(text, code)


@contextlib.contextmanager
def _only_the_first_speaks() -> Iterator[None]:
    """Nothing that a command prints in one of many processes is seen, but for the first."""
    if not launch.one_of_many() or os.environ["RANK"] == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            yield
        except SystemExit as end:
            if end.code:  # a mistake in the command line: the first process makes it, too, and ends this one when it has spoken
                time.sleep(launch.PATIENCE)
            raise
