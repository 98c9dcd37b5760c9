"""The command line: parse, call one job, show. No command loads torch before it has parsed its arguments."""

from __future__ import annotations

import sys
import traceback

import typer

from nulsq_cli.cli import commands, finetune
from nulsq_cli.errors import NulsqError

app = typer.Typer(
    name="nulsq", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a vision model to 2-4 bits with learned non-uniform step sizes, and pack it.",
)  # fmt: skip
app.command("finetune", context_settings={"allow_interspersed_args": True})(finetune.finetune)
app.command("plan")(finetune.plan)
for name, command in commands.COMMANDS.items():
    app.command(name)(command)


def _version(wanted: bool) -> None:
    if wanted:
        from nulsq_cli.version import __version__

        typer.echo(f"nulsq {__version__}")
        raise typer.Exit


@app.callback()
def top(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    """Fine-tune a vision model to 2-4 bits with learned non-uniform step sizes, and pack it."""


def main() -> None:
    """Run a command; every expected failure ends in two lines on stderr and its exit code."""
    arguments = sys.argv[1:]
    verbose = "-v" in arguments or "--verbose" in arguments
    try:
        app(args=[a for a in arguments if a not in ("-v", "--verbose")], prog_name="nulsq")
    except NulsqError as error:
        if verbose:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted\n  fix: go on with the same command and --resume auto", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if verbose:
            traceback.print_exc()
        print(f"error: unexpected {type(error).__name__}: {error}\n  fix: this is a bug; run again with -v and report it",
              file=sys.stderr)  # fmt: skip
        sys.exit(1)
