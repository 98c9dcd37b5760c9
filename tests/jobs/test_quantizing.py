"""What a resumed run may not change, besides its plan."""

from __future__ import annotations

import pytest

from nulsq_cli import recipe
from nulsq_cli.convert import Plan
from nulsq_cli.errors import UsageError
from nulsq_cli.jobs.quantizing import same_run

PLAN = Plan((), "3/3", "lsq", {}, 0)
RULES = "quant.rules=[{match: conv1, bits: 4/4%s}]"


@pytest.mark.parametrize(("before", "now"), [
    ("quant.signed=auto", "quant.signed=true"), ("quant.signed=false", "quant.signed=auto"),
    (RULES % "", RULES % ", signed: true"), (RULES % ", signed: false", RULES % ", signed: true"),
])  # fmt: skip
def test_signs_that_a_recipe_declares_are_part_of_a_run(before, now):
    old, new = (recipe.load("quickstart", overrides=[change]) for change in (before, now))
    for same in (old, new):
        same_run(PLAN, PLAN, same, same)
    with pytest.raises(UsageError, match="other signs"):
        same_run(PLAN, PLAN, new, old)
