"""What a method or scheme cannot do is said when the recipe is checked, before anything is loaded."""

from __future__ import annotations

import pytest

from nulsq_cli import recipe
from nulsq_cli.errors import RecipeError

PROFIT = ["scheme.name=profit", "teacher.name=self"]


@pytest.mark.parametrize(("changes", "words"), [
    (["quant.method=pact", "quant.bits=4/32"], "quant.method: pact quantizes activations"),
    (["quant.method=apot", "quant.bits=7/7"], "quant.method: apot has activations of at most 6 bits, asked for 7"),
    (["quant.method=apot", "quant.bits=8/4"], "quant.method: apot has weights of at most 7 bits, asked for 8"),
    (["quant.method=duq", "quant.signed=false"], "quant.method: duq has one form for signed inputs and another"),
    (["scheme.name=qkd"], "scheme.name: qkd needs a teacher"),
    (["scheme.name=profit"], "scheme.name: profit needs a teacher"),
    ([*PROFIT, "quant.method=apot", "quant.bits=4/4"],
     "scheme.options.ladder: apot has activations of at most 6 bits, asked for 8 in the phase 'activations 8' of profit"),
    ([*PROFIT, "quant.method=apot", "quant.bits=4/32"], "scheme.options.ladder: apot has weights of at most 7 bits"),
    ([*PROFIT, "quant.method=nulsq-w", "quant.bits=4/4", "quant.grid=int8"],
     "scheme.options.ladder: nulsq-w has weights of at most 7 bits on an int8 grid, asked for 8 in the phase 'weights 8'"),
    ([*PROFIT, "quant.method=ewgs", "quant.bits=4/4"],
     "scheme.name: ewgs keeps the scale of its activations in the weights' quantizer, and weights are left in float in the"),
    ([*PROFIT, "quant.bits=4/4", "quant.rules=[{match: conv1, method: apot}]"], "scheme.options.ladder: apot has activations"),
    (["quant.method=ewgs", "quant.bits=32/4"], "quant.method: ewgs keeps the scale of its activations"),
    (["quant.method=dorefa", "quant.granularity=channel"], "quant.method: dorefa has one weight table per tensor"),
])  # fmt: skip
def test_what_a_method_or_scheme_cannot_do_is_said_when_the_recipe_is_checked(changes, words):
    with pytest.raises(RecipeError) as said:
        recipe.load("quickstart", overrides=changes)
    assert said.value.exit_code == 2 and f"<command line>: {words}" in str(said.value)


@pytest.mark.parametrize("changes", [
    ["quant.method=apot", "quant.bits=4/4", "scheme.options.ladder=[6, 5]"],
    ["quant.method=ewgs", "quant.bits=4/32"],
    ["quant.method=nulsq-wa", "quant.bits=4/4", "quant.grid=int8", "scheme.options.ladder=[6]"],
    ["quant.method=lsq", "quant.bits=4/4", "quant.rules=[{match: conv1, method: apot, bits: 4/4}]"],
])  # fmt: skip
def test_a_ladder_that_a_method_can_go_down_is_accepted(changes):
    assert recipe.load("quickstart", overrides=[*PROFIT, *changes]).phases()
