"""What `python -m nulsq_cli` and torchrun start."""

from nulsq_cli.cli import main

main()
