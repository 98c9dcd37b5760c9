"""One function per command: the only place where the rooms meet."""

from nulsq_cli.jobs.environment import environment
from nulsq_cli.jobs.finetuning import finetune
from nulsq_cli.jobs.targets import entropy, evaluate, export, models, plan

__all__ = ["entropy", "environment", "evaluate", "export", "finetune", "models", "plan"]
