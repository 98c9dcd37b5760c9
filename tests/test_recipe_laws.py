"""Laws of reading recipes: what is written reads back the same, and no text and no value is a traceback."""

from __future__ import annotations

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from nulsq_cli import recipe
from nulsq_cli.errors import NulsqError

text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)  # no file can hold those
tricky = st.sampled_from(
    [
        "",
        "no",
        "yEs",
        "1e-3",
        "1e3",
        ".inf",
        "~",
        "3:3",
        "010",
        "2026-01-01",
        "#x",
        "<<",
        "\ufeff",
        "a\x85",
        "a\u2028b",
        "- a",
        "a: b",
    ]
)
words = text | tricky
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(allow_nan=False) | words
free = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=8)
widths = st.sampled_from([2, 3, 4, 5, 6, 7, 8, 32])
rules = st.fixed_dictionaries(
    {"match": text.map(lambda t: f"a{t}"), "skip": st.booleans()},
    optional={
        "bits": st.builds("{}/{}".format, widths, widths),
        "method": st.sampled_from(["lsq", "nulsq-w"]),
        "signed": st.booleans(),
    },
)
recipes = st.fixed_dictionaries(
    {
        "description": words,
        "seed": st.integers(0, 2**63 - 1),
        "model": st.fixed_dictionaries(
            {"kwargs": st.dictionaries(words, free, max_size=4), "initial_checkpoint": st.none() | words}
        ),
        "quant": st.fixed_dictionaries(
            {
                "bits": st.builds("{}/{}".format, widths, widths),
                "rules": st.lists(rules, max_size=3),
                "signed": st.sampled_from(["auto", True, False]),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {
                "steps": st.fixed_dictionaries({"lr": st.floats(0, 1e300)}),
                "clip_grad": st.none() | st.floats(1e-300, 1e9),
            }
        ),
        "data": st.fixed_dictionaries(
            {"mean": st.none() | st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=4), "val_split": words}
        ),
    }
)


@given(recipes)
def test_what_is_written_reads_back_the_same(data):
    made = recipe.Recipe.model_validate(data)
    again = recipe.loads(made.to_yaml())
    assert again == made
    assert again.to_yaml() == made.to_yaml()
    assert yaml.safe_load(made.to_yaml())["description"] == data["description"]  # other readers agree


@given(st.text(st.sampled_from(list("abq:{}[],-!&*#'\"\\|>?~%@` \n\t013./eE<+=é\x00"))) | st.text())
@example("quant: !!map [a]")
@example("? ")
@example("a: *b")
@example("%YAML 9.9\n---\n")
@example("quant: !!set {a, b}")
@example("seed: !!int '0b'")
@example("seed: !!float 'x'")
@example("extends: {a: 1}")
@example("model: {kwargs: {? {} : 1}}")
def test_no_text_is_a_traceback(text):
    try:
        recipe.loads(text)
    except NulsqError as said:
        assert said.exit_code == 2 and str(said)


@given(free)
def test_no_value_of_a_known_key_is_a_traceback(value):
    keys = "quant quant.bits quant.method quant.signed quant.rules quant.rules+ data.augment.scale seed engine.amp"
    for key in (*keys.split(), "model.kwargs", "export", "published", "version", "teacher"):
        try:
            recipe.load("quickstart", flags={key: ("--flag", value)})
        except NulsqError as said:
            assert "--flag" in str(said)
