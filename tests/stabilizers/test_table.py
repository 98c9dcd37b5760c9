"""The table, and how a recipe names what is in it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nulsq_cli import recipe
from nulsq_cli.errors import RecipeError
from nulsq_cli.recipe.schema import Stabilizer
from nulsq_cli.stabilizers import STABILIZERS


def load(*stabilizers, **more):
    return recipe.load("quickstart", flags={"quant.stabilizers": ("--stabilizer", list(stabilizers)),
                                            **{k: ("--flag", v) for k, v in more.items()}})  # fmt: skip


@pytest.mark.parametrize("name", STABILIZERS)
def test_a_line_lists_exactly_what_its_constructor_takes(name):
    line = STABILIZERS[name]
    module, kind = line.place.split(":")
    taken = set()
    for owner in getattr(import_module(f"nulsq_cli.stabilizers.{module}"), kind).__mro__[:-1]:
        if "__init__" in vars(owner):
            taken |= {p.name for p in inspect.signature(owner.__init__).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert taken == set(line.options) and taken < set(Stabilizer.model_fields)


@pytest.mark.parametrize("name", STABILIZERS)
def test_a_recipe_says_what_the_authors_do_and_reads_back_the_same(name):
    r = load({"name": name, "last": 0.5})
    (written,) = r.model_dump(mode="json")["quant"]["stabilizers"]
    assert written == {"name": name, **STABILIZERS[name].options, "last": 0.5}
    assert recipe.loads(r.to_yaml()) == r


@pytest.mark.parametrize(
    ("items", "more", "words"),
    [
        ([{"name": "dampning"}], {}, "quant.stabilizers.0.name: no stabilizer called 'dampning'; did you mean 'dampening'?"),
        ([{"first": 1}], {}, "quant.stabilizers.0.name: is missing"),
        ([{"name": "freezing", "momentun": 1}], {}, "did you mean 'quant.stabilizers.0.momentum'?"),
        ([{"name": "bin-reg", "momentum": 0.1}], {}, "bin-reg has no option 'momentum'; choose from begin"),
        ([{"name": "bin-reg", "begin": 2}], {}, "quant.stabilizers.0.begin: must be 0..1, got 2"),
        ([{"name": "freezing", "momentum": 1}], {}, "must be more than 0 and less than 1"),
        ([{"name": "dampening", "aggregate": "means"}], {}, "did you mean 'mean'?"),
        ([{"name": "bin-reg"}, {"name": "freezing"}, {"name": "bin-reg"}], {}, "quant.stabilizers.2: bin-reg is there already"),
        ([{"name": "freezing"}], {"quant.bits": "8/8"}, "freezing is for weights of at most 4 bits"),
        ([{"name": "dampening"}], {"quant.bits": "32/32"}, "none are quantized to that"),
        (["dampening"], {}, "must be a section"),
    ],
)
def test_a_mistake_is_a_sentence_at_its_place(items, more, words):
    with pytest.raises(RecipeError) as said:
        load(*items, **more)
    # What contradicts another section, too, is shown where the stabilizer is written.
    assert str(said.value).startswith("--stabilizer") and words in str(said.value)


def test_a_rule_or_the_ends_may_be_what_there_is_to_stabilize():
    load({"name": "freezing"}, **{"quant.bits": "8/8", "quant.first_last.bits": "4/4"})
    load({"name": "freezing"}, **{"quant.bits": "8/8", "quant.rules": [{"match": "layer1.*", "bits": "3/3"}]})


def test_the_flag_may_be_repeated_and_the_list_needs_no_torch():
    code = "import sys; sys.argv = ['nulsq', 'ls', 'stabilizers', '--json']\nimport atexit\n" \
           "atexit.register(lambda: print({'torch', 'timm'} & set(sys.modules), file=sys.stderr))\n" \
           "from nulsq_cli.cli import main; main()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert [row["stabilizer"] for row in json.loads(done.stdout)["stabilizers"]] == list(STABILIZERS)
    assert done.stderr.strip().endswith("set()")

    from typer.testing import CliRunner

    from nulsq_cli import jobs
    from nulsq_cli.cli import app

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "plan", lambda r, **_: seen.append(r) or {})
        for flags in ([], ["--stabilizer", "bin-reg"], ["--stabilizer", "freezing", "--stabilizer", "dampening"]):
            assert CliRunner().invoke(app, ["plan", "quickstart", "-q", *flags]).exit_code == 0
    assert [[s.name for s in r.quant.stabilizers] for r in seen] == [[], ["bin-reg"], ["freezing", "dampening"]]
