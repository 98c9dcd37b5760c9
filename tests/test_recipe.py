"""Reading recipes: what is right is read exactly, what is wrong is said with its place, nothing is a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nulsq_cli import recipe
from nulsq_cli.errors import InputError, NulsqError, RecipeError, UsageError
from nulsq_cli.recipe import source
from nulsq_cli.values import Bits


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Put recipes into an empty folder and stand in it, so that complaints name them without a folder."""
    monkeypatch.chdir(tmp_path)

    def put(text: str, name: str = "r.yaml") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return Path(name)

    return put


def complaints(path: Path, **changes) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, **changes)
    assert caught.value.exit_code == 2
    where = f"{caught.value.where}: " if caught.value.where else ""
    return (where + caught.value.what).splitlines()


def test_nothing_heavy_is_imported():
    code = "import sys; from nulsq_cli import recipe; recipe.shipped(); print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("torch", "timm", "numpy", "matplotlib") if f"'{name}'" in loaded]


# ---- one mistake, one sentence --------------------------------------------------------------------

MISTAKES = [
    ("quant: {bits: 40/3}", "quant.bits: bits must be 2..8, or 32 for float, got 40/3"),
    ("quant: {bits: 1/3}", "quant.bits: bits must be 2..8, or 32 for float, got 1/3"),
    ("quant: {bits: 9/9}", "quant.bits: bits must be 2..8, or 32 for float, got 9/9"),
    ("quant: {bits: 3}", "quant.bits: bits must be WEIGHTS/ACTIVATIONS, got '3'"),
    ("quant: {bits: 3:3}", "quant.bits: must be weight bits/activation bits, got 3:3; write 3/3"),
    ("quant: {bits: {w: 3}}", "quant.bits: bits must be WEIGHTS/ACTIVATIONS"),
    ("quant: {method: lsqq}", "quant.method: no method called 'lsqq'; did you mean 'lsq'?"),
    ("quant: {method: [lsq]}", "quant.method: no method called ['lsq']"),
    ("quant: {init: {weights: nmes}}", "quant.init.weights: no initializer called 'nmes'; did you mean 'nmse'?"),
    ("quant: {signed: maybe}", "quant.signed: must be auto, true or false, got 'maybe'"),
    ("engine: {compile: [1]}", "engine.compile: must be auto, true, false or model, got [1]"),
    ("engine: {amp: bf16}", "engine.amp: must be 'bfloat16' or 'float16', got 'bf16' (did you mean 'bfloat16'?)"),
    ("quant: {granularity: layer}", "quant.granularity: must be 'tensor' or 'channel', got 'layer'"),
    ("quant: {grid: int4}", "quant.grid: must be 'float' or 'int8', got 'int4'"),
    ("quant: {grid: int8, bits: 8/8}",
     "quant.method: nulsq-wa has weights of at most 7 bits on an int8 grid, asked for 8"),
    ("quant: {grid: int8, first_last: {method: uniq}}",
     "quant.first_last.method: uniq has weights of at most 7 bits on an int8 grid, asked for 8"),
    ("quant: {rules: [{match: 're:(', skip: true}]}", "quant.rules.0.match: must be a regular expression"),
    ("quant: {rules: [{match: '', skip: true}]}", "quant.rules.0.match: must not be empty, got ''"),
    ("quant: {rules: [{skip: true}]}", "quant.rules.0.match: is missing"),
    ("quant: {rules: {match: a}}", "quant.rules: must be a list, got {'match': 'a'}"),
    ("quant: {calibration: {samples: 0}}", "quant.calibration.samples: must be 1 or more, got 0"),
    ("quant: 3/3", "quant: must be a section of `key: value` lines, got '3/3'"),
    ("optimizer: {weights: {lr: .nan}}", "optimizer.weights.lr: must be a finite number, got nan"),
    ("optimizer: {weights: {lr: .inf}}", "optimizer.weights.lr: must be a finite number, got inf"),
    ("optimizer: {steps: {lr: -1e-3}}", "optimizer.steps.lr: must be 0 or more, got -0.001"),
    ("optimizer: {weights: {lr: true}}", "optimizer.weights.lr: must be a number, got true"),
    ("optimizer: {weights: {lr: fast}}", "optimizer.weights.lr: must be a number, got 'fast'"),
    ("optimizer: {clip_grad: 0}", "optimizer.clip_grad: must be more than 0, got 0"),
    ("optimizer: {weights: {opt: ''}}", "optimizer.weights.opt: must not be empty, got ''"),
    ("schedule: {epochs: -1}", "schedule.epochs: must be 0 or more, got -1"),
    ("schedule: {epochs: yes}", "schedule.epochs: must be a number, got true"),
    ("schedule: {epochs: 1.5}", "schedule.epochs: must be a whole number, got 1.5"),
    ("schedule: {min_lr: 0.1}", "schedule.min_lr: must not exceed optimizer.weights.lr, 0.01, got 0.1"),
    ("data: {batch_size: 0}", "data.batch_size: must be 1 or more, got 0"),
    ("data: {hold_out: 0.6}", "data.hold_out: must be 0..0.5, got 0.6"),
    ("data: {val_split: no}", "data.val_split: must be text, got false (write it in quotes)"),
    ("data: {train_split: 7}", "data.train_split: must be text, got 7 (write it in quotes)"),
    ("data: {input_size: [3, 32]}", "data.input_size: must have 3 values, got [3, 32]"),
    ("data: {input_size: [3, 0, 32]}", "data.input_size.1: must be 1 or more, got 0"),
    ("data: {input_size: [3, 9, 9], mean: [0, 1]}", "data.mean: has 2 values for images of 3 channels"),
    ("data: {std: [0.0]}", "data.std.0: must be more than 0, got 0.0"),
    ("data: {augment: {scale: [1.0, 0.1]}}", "data.augment.scale: must go from the smaller to the larger number"),
    ("data: {augment: {smoothing: 1}}", "data.augment.smoothing: must be 0 or more and less than 1, got 1"),
    ("ema: {decay: 1}", "ema.decay: must be more than 0 and less than 1, got 1"),
    ("seed: -1", "seed: must be 0 or more and less than 9.22337e+18, got -1"),
    ("export: maybe", "export: must be true or false, got 'maybe'"),
    ("version: 2", "version: must be 1, got 2"),
    # unknown keys
    ("sead: 3", "unknown key 'sead' (did you mean 'seed'?)"),
    ("lr: 3", "unknown key 'lr' (did you mean 'optimizer.weights.lr' or 'optimizer.steps.lr'?)"),
    ("optimizer: {lr: 3}", "unknown key 'optimizer.lr' (did you mean 'optimizer.weights.lr' or 'optimizer.steps.lr'?)"),
    ("data: {mixup: 0.2}", "unknown key 'data.mixup' (did you mean 'data.augment.mixup'?)"),
    ("data: {augment: {auto_augment: x}}", "unknown key 'data.augment.auto_augment' (did you mean 'data.augment.aa'?)"),
    ("quant: {init: {weight: lsq}}", "unknown key 'quant.init.weight' (did you mean 'quant.init.weights'?)"),
    ("quant: {rules: [{match: a, bit: 3/3}]}", "unknown key 'quant.rules.0.bit' (did you mean 'quant.rules.0.bits'?)"),
    ("zzzz: 1", "unknown key 'zzzz'"),
    # YAML itself
    ("seed: 1\nseed: 1", "duplicate key 'seed' (first at r.yaml:1)"),
    ("seed: !!python/name:os.system", "tags such as !!python/name:os.system are not read"),
    ("seed: !!python/object/apply:os.getcwd []", "tags such as !!python/object/apply:os.getcwd are not read"),
    ("description: !mine x", "tags such as !mine are not read"),
    ("export: !!bool perhaps", "export: must be true or false, got 'perhaps'"),
    ("? [a]\n: 3", "a key must be a word"),
    ("<<: {seed: 3}", "<< is not read here; write extends: [recipe] at the top"),
    ("data:\n\tseed: 1", "is no valid YAML: found character '\\t' that cannot start any token"),
    ("seed: 1\n---\nseed: 2", "is no valid YAML: but found another document"),
    ("- seed", "is no recipe: it must be a mapping of sections"),
    ("[" * 3000, "is nested too deeply"),
    ("quant: &q {options: *q}", "is nested too deeply, or repeats itself through aliases"),
    ("extends: quickstart", "extends: must be a list of recipe names or files"),
    ("extends: [r]", "extends: 'r' extends itself"),
    ("extends: [quikstart]", "extends: no recipe called 'quikstart'"),
]


@pytest.mark.parametrize(("text", "said"), MISTAKES, ids=[text[:40].replace("\n", " ") for text, _ in MISTAKES])
def test_a_mistake_is_one_sentence_with_its_line(write, text, said):
    first, *others = complaints(write("# a comment moves every line down\n\n" + text + "\n"))
    at, _, what = first.partition(": ")
    assert at in ("r.yaml:3", "r.yaml:4")
    assert what.startswith(said.replace("r.yaml:1", "r.yaml:3"))
    assert all("!!" in text for _ in others)  # what a refused tag leaves behind may be wrong as well


def test_the_line_is_that_of_the_key(write):
    quant = "quant:\n  rules:\n    - match: a\n      bits: 1/1\n\n"
    path = write(f"schedule:\n  epochs: -1\n{quant}data:\n  mean:\n  - 0\n  - x\n")
    assert [c.split(": ")[:2] for c in complaints(path)] == [
        ["r.yaml:11", "data.mean.1"],
        ["r.yaml:6", "quant.rules.0.bits"],
        ["r.yaml:2", "schedule.epochs"],
    ]


def test_all_complaints_come_at_once_and_unknown_keys_first(write):
    found = complaints(write("seed: -1\nseed: -2\nquant: {bits: 9/9, method: x, bist: 3/3}\nscedule: {}\n"))
    assert ["unknown key 'quant.bist'" in found[0], "unknown key 'scedule'" in found[1]] == [True, True]
    for word in ("duplicate key 'seed'", "quant.bits", "quant.method"):
        assert any(word in c for c in found[2:])
    assert "got -2" in "\n".join(found)
    assert len(found) == 6


def test_a_mistake_far_away_is_named_by_its_own_file(write):
    write("schedule:\n  epochs: -3\n", "base/cosine.yaml")
    write("extends: [cosine]\n", "base/middle.yaml")
    assert complaints(write("extends: [base/middle]\nseed: 1\n")) == [
        f"{Path('base/cosine.yaml')}:2: schedule.epochs: must be 0 or more, got -3"
    ]


def test_flags_and_changes_are_named_as_they_were_typed(write):
    path = write("seed: 1\n")
    flags = {"optimizer.weights.lr": ("--lr", -1.0), "quant.bits": ("--bits", "1/1")}
    said = complaints(path, flags=flags, overrides=["data.workers=-1", "data.batchsize=2", "quant.rules+={match: ''}"])
    assert [c.split(": ")[0] for c in said] == ["<command line>", "<command line>", "--bits", "<command line>", "--lr"]
    assert "unknown key 'data.batchsize' (did you mean 'data.batch_size'" in said[0]


@pytest.mark.parametrize("change", ["seed", "=3", "data.=3", ".seed=3", "a..b=3", ""])
def test_a_change_without_a_key_is_wrong_usage(write, change):
    with pytest.raises(UsageError, match="cannot read the change") as caught:
        recipe.load(write(""), overrides=[change])
    assert "key.path=value" in str(caught.value.fix)


def test_a_change_whose_value_is_no_yaml_is_refused(write):
    assert complaints(write(""), overrides=["data.mean=[0.5"])[0].startswith("<command line>: is no valid YAML")


def test_a_recipe_that_is_not_there(write, tmp_path):
    with pytest.raises(UsageError) as caught:
        recipe.load("quickstrat")
    assert caught.value.fix == "did you mean 'quickstart'?"
    for missing in ("./nothing.yaml", "nothing.yaml", "no/thing"):
        with pytest.raises(InputError):
            recipe.load(missing)
    for sly in ("../pyproject", "base/imagenet", ""):
        with pytest.raises(NulsqError):
            recipe.load(sly)


def test_such_requests_of_rules_are_found_all_at_once_with_their_lines(write):
    path = write("""extends: [quickstart]
quant:
  bits: 7/7
  method: apot
  signed: false
  rules:
    - {match: conv1, method: pact, bits: 4/32}
    - {match: "layer1*", method: duq, bits: 4/4}
    - {match: "layer2*", method: duq, bits: 4/4, signed: false}
scheme: {name: qkd}
""")
    said = complaints(path)
    assert [line[:30] for line in said] == [
        "r.yaml:4: quant.method: apot h", "r.yaml:7: quant.rules.0: pact ", "r.yaml:8: quant.rules.1: duq h",
        "r.yaml:10: scheme.name: qkd ne",
    ]  # fmt: skip


def test_files_that_are_no_recipes(write, tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert complaints(Path("bytes.yaml")) == ["bytes.yaml: is no text"]
    write("#" * (4 * source.LARGEST_TEXT + 1), "large.yaml")
    assert complaints(Path("large.yaml")) == ["large.yaml: is too large for a recipe"]
    assert complaints(write("description: \x01\n"))[0].startswith("r.yaml: is no valid YAML")
    letters = "abcdefghijklmnopqrs"
    laughs = "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip(letters, letters[1:], strict=False))
    laughs = "a: &a [x, x]\n" + laughs
    assert complaints(write(laughs))[0].endswith("repeats itself through aliases")
    assert complaints(write("x: [" + "1," * source.MOST_NODES + "]\n"))[0].endswith("is too long for a recipe")


def test_a_tree_of_recipes_has_an_end(write):
    for level in range(10):
        write(f"extends: [x{level + 1}, x{level + 1}]\n", f"x{level}.yaml")
    write("seed: 1\n", "x10.yaml")
    assert f"extends more than {recipe.MOST_FILES} files" in complaints(Path("x0.yaml"))[0]
    write("extends: [b]\n", "a.yaml")
    write("extends: [a]\n", "b.yaml")
    assert complaints(Path("a.yaml")) == ["b.yaml:1: extends: 'a' extends itself"]


# ---- what is right --------------------------------------------------------------------------------


def test_precedence_from_low_to_high(write):
    write("seed: 1\nschedule: {epochs: 1}\nlog: {interval: 1}\ndata: {workers: 1, batch_size: 1}\n", "one.yaml")
    write("schedule: {epochs: 2}\nlog: {interval: 2}\ndata: {workers: 2}\n", "two.yml")
    path = write("extends: [one, two.yml]\nlog: {interval: 3}\ndata: {workers: 3}\n")
    r = recipe.load(path, flags={"data.workers": ("-j", 4)})
    assert (r.seed, r.schedule.epochs, r.log.interval, r.data.workers, r.data.batch_size) == (1, 2, 3, 4, 1)
    assert recipe.load(path, flags={"data.workers": ("-j", 4)}, overrides=["data.workers=5"]).data.workers == 5
    assert r.data.pin_mem is False


def test_figures_and_descriptions_are_not_inherited(write):
    r = recipe.load(write("extends: [imagenet_resnet18]\n"))
    assert recipe.load("imagenet_resnet18").published and r.model.name == "resnet18.tv_in1k"
    assert (r.published, r.description) == ([], "")


def test_a_copy_may_extend_the_shipped_recipe_of_its_own_name(write):
    r = recipe.load(write("extends: [quickstart]\nseed: 7\n", "quickstart.yaml"))
    assert (r.seed, r.data.dataset) == (7, "nulsq/digits")


def test_lists_are_replaced_and_plus_appends(write):
    write("quant: {rules: [{match: a, skip: true}]}\ndata: {mean: [1, 2, 3]}\n", "base.yaml")
    replaced = recipe.load(write("extends: [base]\nquant: {rules: [{match: b, skip: true}]}\ndata: {mean: [4]}\n"))
    assert ([x.match for x in replaced.quant.rules], replaced.data.mean) == (["b"], [4.0])
    path = write("extends: [base]\nquant: {rules+: [{match: b, skip: true}]}\n")
    appended = recipe.load(path, overrides=["quant.rules+={match: c, bits: 2/2}", "quant.rules.0.skip=no"])
    assert [(x.match, x.skip) for x in appended.quant.rules] == [("a", False), ("b", True), ("c", False)]
    alone = recipe.load(write("quant:\n  rules+:\n    - {match: z, bits: 8/8}\n", "alone.yaml"))
    assert alone.quant.rules[0].bits == Bits(8, 8)
    with pytest.raises(RecipeError, match="no number 3 in this list of 2"):
        recipe.load(path, overrides=["quant.rules.3.skip=no"])


def test_an_empty_section_changes_nothing_and_null_resets(write):
    write("teacher: {name: self}\nquant: {bits: 2/2, options: {grad_scale: lsq}}\ndata: {mean: [1]}\n", "base.yaml")
    kept = recipe.load(write("extends: [base]\nteacher:\nquant:\n  # bits: 3/3\n"))
    assert (kept.teacher.name, kept.quant.bits) == ("self", Bits(2, 2))
    reset = recipe.load(write("extends: [base]\nteacher: null\nquant: {options: null}\ndata: {mean: null}\n"))
    assert (reset.teacher.name, reset.quant.options, reset.quant.bits, reset.data.mean) == (None, {}, Bits(2, 2), None)
    assert recipe.load(write("quant:\ndata:\n")) == recipe.load(write(""))


@pytest.mark.parametrize(
    ("written", "means"),
    [("3/3", (3, 3)), ("'2/32'", (2, 32)), ("{w: 4, a: 8}", (4, 8)), ("32/32", (32, 32)), ("{w: 32, a: 2}", (32, 2))],
)
def test_bits(write, written, means):
    bits = recipe.load(write(f"quant: {{bits: {written}}}")).quant.bits
    assert (bits.weights, bits.activations) == means


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("1.5e-3", 1.5e-3),
        (".5", 0.5),
        ("1", 1),
        ("+1_0", 10),
        ("0", 0),
        ("2e2", 200.0),
        ("yes", True),
        ("No", False),
        ("off", False),
        ("~", None),
        ("null", None),
        ("y", "y"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1e", "1e"),
        ("'1e-3'", "1e-3"),
        ("'no'", "no"),
        ("!!str 3", "3"),
        ("１", "１"),
        ("[1e-6, no]", [1e-6, False]),
    ],
)
def test_scalars_mean_what_they_look_like(write, written, means):
    value = recipe.load(write(f"model: {{kwargs: {{x: {written}}}}}")).model.kwargs["x"]
    assert (value, type(value)) == (means, type(means))
    assert recipe.load(write(""), overrides=[f"model.kwargs.x={written}"]).model.kwargs["x"] == means


def test_origins(write):
    write("# x\nseed: 3\nquant: {bits: 2/2}\n", "base.yaml")
    path = write("extends: [base]\n\nquant:\n  rules+:\n    - match: a\n      skip: true\ndata: {mean: [1]}\n")
    where = recipe.origins(path, flags={"data.workers": ("--workers", 0)}, overrides=["log.interval=3"])
    wanted = {
        "seed": "base.yaml:2",
        "quant.bits": "base.yaml:3",
        "quant.method": "default",
        "quant.rules.0.match": "r.yaml:5",
        "quant.rules.0.bits": "default",
        "quant.rules.0.skip": "r.yaml:6",
        "data.mean": "r.yaml:7",
        "data.std": "default",
        "data.workers": "--workers",
        "log.interval": "<command line>",
        "description": "default",
        "quant.options": "default",
    }
    assert {key: where[key] for key in wanted} == wanted


def test_origins_name_a_shipped_base_by_its_place():
    assert recipe.origins("cifar10_resnet20")["optimizer.weights.lr"].startswith("base/cifar.yaml:")


def test_with_values_checks_again():
    r = recipe.with_values(recipe.load("quickstart"), {"data.workers": 1, "data.mean": [0.5], "seed": 3})
    assert (r.data.workers, r.data.mean, r.seed) == (1, [0.5], 3)
    with pytest.raises(RecipeError, match="data.workers: must be 0 or more, got -1"):
        recipe.with_values(r, {"data.workers": -1})


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        recipe.load("quickstart").seed = 3


def test_the_schema_file_is_up_to_date():
    path = Path(__file__).parents[1] / "docs" / "recipe.schema.json"
    if not path.parent.is_dir():
        pytest.skip("no docs folder beside the tests")
    fresh = json.loads(json.dumps(recipe.json_schema()))
    assert json.loads(path.read_text()) == fresh, "nulsq validate --schema > docs/recipe.schema.json"
