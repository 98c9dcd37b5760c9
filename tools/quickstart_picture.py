"""docs/quickstart.svg: what `nulsq finetune` prints on a terminal, as a picture. Nothing else should run: the times are in it.

python tools/quickstart_picture.py docs/quickstart.svg
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from nulsq_cli import jobs, recipe
from nulsq_cli.cli.show import Show

OUTPUT = Path("output/quickstart")


class Still(Show):
    """Without the live line, which is gone when the run ends."""

    def start_training(self, epochs: int, batches: int, done: int) -> None:
        """Nothing moves in a picture."""


def main() -> None:
    """Run the quickstart in an empty folder, and draw what it shows."""
    target = Path(sys.argv[1]).resolve()
    show = Still()
    show.console = Console(record=True, width=116, force_terminal=True, highlight=False, file=io.StringIO())
    show.console.print(f"$ nulsq finetune -o {OUTPUT}", style="bold")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        jobs.finetune(recipe.load("quickstart"), OUTPUT, resume=None, export_after=True, dry_run=False, min_top1=None, show=show)
    target.write_text(show.console.export_svg(title="nulsq finetune"), encoding="utf-8")


if __name__ == "__main__":
    main()
