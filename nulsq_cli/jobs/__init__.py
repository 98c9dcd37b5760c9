"""One function per command: the only place where the rooms meet."""

from nulsq_cli.jobs.benching import Timing, bench
from nulsq_cli.jobs.comparison import Matrix, compare
from nulsq_cli.jobs.environment import environment
from nulsq_cli.jobs.exporting import export_for_runtime
from nulsq_cli.jobs.finetuning import finetune
from nulsq_cli.jobs.targets import check_top1, entropy, evaluate, export, models, plan

__all__ = ["Matrix", "Timing", "bench", "check_top1", "compare", "entropy", "environment", "evaluate", "export",
           "export_for_runtime", "finetune", "models", "plan"]  # fmt: skip
