"""Files from strangers: whatever reading or `tools/fuzz.py` found that was no sentence, and a short run of that tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nulsq_cli import artifact, recipe, session
from nulsq_cli.convert import Plan, convert
from nulsq_cli.errors import InputError, NulsqError
from nulsq_cli.models import create_float_model, rebuild
from nulsq_cli.report import entropy
from nulsq_cli.training import checkpoint
from tests.test_artifact import packed, rewritten

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "good.safetensors"
    packed(path)
    return path


@pytest.fixture
def no_network(monkeypatch):
    """timm's way to a hub is not even begun."""
    import timm.models._factory as factory

    monkeypatch.setattr(factory, "load_model_config_from_hf", lambda *_, **__: pytest.fail("asked a hub"))


def first(meta):
    return meta["layers"]["conv1"]


LIES = {
    "hub": lambda m, t: m.update(arch="hf-hub:evil/model"),
    "folder": lambda m, t: m.update(arch="local-dir:."),
    "giant": lambda m, t: m.update(arch="vit_giant_patch14_dinov2"),
    "classes": lambda m, t: m.update(num_classes=10**9),
    "many classes": lambda m, t: m.update(num_classes=60_000),
    "channels": lambda m, t: m["arch_kwargs"].update(in_chans=10**6),
    "weights from a file": lambda m, t: m["arch_kwargs"].update(checkpoint_path="/etc/passwd"),
    "weights from the net": lambda m, t: m["arch_kwargs"].update(pretrained=True),
    "strange argument": lambda m, t: m["arch_kwargs"].update(norm_layer="os.system"),
    "deep": lambda m, t: (m.update(arch="test_vit"), m["arch_kwargs"].update(depth=60_000, embed_dim=8, num_heads=1)),
    "large": lambda m, t: (m.update(arch="test_vit"), m["arch_kwargs"].update(img_size=10**5)),
    "window": lambda m, t: (m.update(arch="swin_tiny_patch4_window7_224"), m["arch_kwargs"].update(window_size=10**4)),
    "arguments": lambda m, t: m.update(arch_kwargs=[]),
    "no text": lambda m, t: m.update(recipe=3),
    "long recipe": lambda m, t: m.update(recipe="#" * 10**6),
    "no layers": lambda m, t: m.update(layers=[]),
    "no entry": lambda m, t: m["layers"].update(conv1=None),
    "name": lambda m, t: m["layers"].update({"../../x[/]": first(m)}),
    "shape that overflows": lambda m, t: first(m).update(shape=[2**31, 2**31, 2**31]),
    "many axes": lambda m, t: first(m).update(shape=[1] * 100),
    "float width": lambda m, t: first(m).update(weight_bits=3.0),
    "sign": lambda m, t: first(m).update(signed="yes"),
    "counts of something": lambda m, t: first(m).update(act_counts=["x"]),
    "nested counts": lambda m, t: first(m).update(act_counts=[[1]]),
    "counts": lambda m, t: first(m).update(act_counts=[1]),
    "half floats": lambda m, t: t.update({"conv1.act.thresholds": t["conv1.act.thresholds"].double()}),
    "shape of the rest": lambda m, t: t.update({"bn1.weight": torch.zeros(3)}),
    "empty rest": lambda m, t: t.update({"bn1.weight": torch.zeros(0)}),
    "complex": lambda m, t: t.update({"bn1.weight": torch.zeros(16, dtype=torch.complex64)}),
    "tiny float": lambda m, t: t.update({"conv1.weight.levels": t["conv1.weight.levels"].to(torch.float8_e4m3fn)}),
    "picture": lambda m, t: m.update(data_cfg={"input_size": [3, 10**6, 10**6]}),
    "widths": lambda m, t: m.update(bits="²/²"),
    "method": lambda m, t: m.update(method="\x1b[2J"),
    "numbers": lambda m, t: m.update(many=[{}] * 300_000),
    "tensors": lambda m, t: t.update({f"n{k}": torch.zeros(0) for k in range(20_001)}),
}


@pytest.mark.parametrize("name", LIES)
def test_a_packed_file_that_lies_is_a_sentence_and_costs_little(good, tmp_path, name, no_network):
    path = rewritten(good, tmp_path / "bad.safetensors", LIES[name])
    before = os.times().user
    with pytest.raises(NulsqError) as error:
        entropy.of_artifact(artifact.read(path))
        session.target_model(str(path))
    assert error.value.exit_code in (2, 3) and len(str(error.value)) < 1000
    assert os.times().user - before < 20  # not how fast, but that it ends


def test_deep_json_and_foreign_notes_are_refused(good, tmp_path):
    tensors = {"a": torch.zeros(1)}
    for note in ("[" * 100_000, '{"a":' * 5000, "9" * 5000, "nonsense", "[]", "1", "null", '{"format_version": {}}'):
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors.torch.save(tensors, metadata={"nulsq": note}))
        for reader in (artifact.read, checkpoint.load):
            with pytest.raises(InputError):
                reader(path)
    (tmp_path / "plan.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="no valid JSON"):
        session.read_json(tmp_path / "plan.json")


def test_a_network_is_not_built_larger_than_its_tensors():
    for name, arguments in (
        ("vit_giant_patch14_dinov2", {}), ("resnet8_cifar", {"num_classes": 60_000}), ("test_vit", {"depth": 60_000,
                                                                                                   "embed_dim": 8,
                                                                                                   "num_heads": 1}),
        ("swin_tiny_patch4_window7_224", {"window_size": 10**4}), ("resnet8_cifar", {"x": 1}), ("hf-hub:a/b", {}), (3, {}),
        ("resnet18", {"layers": 3}), ("resnet18", {"pretrained_cfg": {}}), ("resnet8_cifar", [1]), ("test_vit",
                                                                                                    {"patch_size": 0}),
    ):  # fmt: skip
        with pytest.raises(InputError, match="model.json"):
            rebuild(name, arguments, elements=80_000, tensors=60, where="model.json")


@pytest.mark.parametrize("name", ["resnet20_cifar", "mobilenetv3_small_050", "test_vit", "test_convnext", "test_efficientnet"])
def test_every_true_network_is_built(name):
    state = create_float_model(name).state_dict()
    built = rebuild(name, {}, elements=sum(t.numel() for t in state.values()), tensors=len(state), where="x")
    assert {k: t.shape for k, t in built.state_dict().items()} == {k: t.shape for k, t in state.items()}


# ---- checkpoints and run folders -------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import fuzz_targets

    folder = tmp_path_factory.mktemp("run") / "r"
    folder.mkdir()
    found = fuzz_targets.make_run(folder, fuzz_targets.BASES["plain"])
    model = convert(create_float_model("resnet8_cifar", num_classes=10, in_chans=1), found.plan)
    return found, fuzz_targets.make_state(model, found.recipe, folder)


def momentum(tensors):
    return tensors["optimizer.weights"]


NOT_OURS = {
    "no progress": lambda t, n: n.pop("progress"),
    "a list of it": lambda t, n: n.update(progress=[]),
    "a position before the start": lambda t, n: n["progress"].update(epoch=-1),
    "no number": lambda t, n: n["progress"].update(batch="3"),
    "an unknown key": lambda t, n: n["progress"].update(x=1),
    "rows": lambda t, n: n["progress"].update(rows=[{"epoch": 0}]),
    "steps": lambda t, n: n["progress"].update(steps=[{"epoch": 0}]),
    "a step of no epoch": lambda t, n: n["progress"].update(steps=[{"epoch": None, "batch": 1}]),
    "best": lambda t, n: n["progress"].update(best={"top1": 3}),
    "notes": lambda t, n: n["progress"].update(notes=[]),
    "split": lambda t, n: n.update(split={"processes": "x", "images": 3}),
    "no optimizer": lambda t, n: n.pop("optimizer.weights"),
    "no groups": lambda t, n: n["optimizer.weights"].pop("groups"),
    "fewer groups": lambda t, n: n["optimizer.steps"].update(groups=[]),
    "a rate that is text": lambda t, n: n["optimizer.weights"]["groups"][0].update(lr="fast"),
    "no list of parameters": lambda t, n: n["optimizer.weights"]["groups"][0].update(params=3),
    "unhashable parameters": lambda t, n: n["optimizer.weights"]["groups"][0].update(params=[[1]]),
    "nothing else": lambda t, n: n["optimizer.weights"].pop("rest"),
    "momentum of another shape": lambda t, n: momentum(t).update({next(iter(momentum(t))): torch.zeros(1, 2, 3, 4)}),
    "momentum of nothing": lambda t, n: momentum(t).update({"999.momentum_buffer": torch.zeros(3)}),
    "momentum without a number": lambda t, n: momentum(t).update({"x.y": torch.zeros(3)}),
    "no model": lambda t, n: t.pop("model"),
    "no average": lambda t, n: t.pop("ema"),
    "a shape": lambda t, n: t["model"].update({"conv1.weight": torch.zeros(3)}),
    "a tensor too many": lambda t, n: t["model"].update(stranger=torch.zeros(3)),
}


@pytest.mark.parametrize("name", NOT_OURS)
def test_a_whole_checkpoint_of_something_else_is_a_sentence(run, tmp_path, name):
    _, state = run
    tensors, notes = checkpoint.load(state.folder / "last.safetensors")
    NOT_OURS[name](tensors, notes)
    checkpoint.save(tmp_path / "x.safetensors", tensors, notes)
    with pytest.raises(InputError, match="does not belong to this run") as error:
        state.restore(checkpoint.Saved(tmp_path / "x.safetensors", *checkpoint.load(tmp_path / "x.safetensors")))
    assert "\n  fix: " in str(error.value)


def test_a_run_folder_that_lies_is_a_sentence(run, no_network):
    found, _ = run
    path = found.folder / "model.json"
    kept = path.read_text()
    for key, value in (("architecture", "hf-hub:evil/model"), ("architecture", ["x"]), ("arguments", 3), ("data_cfg", {}),
                       ("arguments", {"num_classes": 10**9}), ("arguments", {"checkpoint_path": "/etc/passwd"})):  # fmt: skip
        path.write_text(json.dumps({**json.loads(kept), key: value}))
        with pytest.raises(InputError):
            session.target_model(str(found.folder))
    path.write_text(kept)
    session.target_model(str(found.folder))
    plan = found.plan.to_json()
    for change in ({"weight_bits": "3"}, {"weight_bits": 33}, {"shape": ["x"]}, {"signed": 3}, {"granularity": {}},
                   {"method": None}):
        with pytest.raises(InputError, match="plan is damaged"):
            Plan.from_json({**plan, "layers": [{**plan["layers"][0], **change}]})
    for change in ({"options": []}, {"bits": 3}, {"layers": {}}, {"layers": [3]}, {"float_bytes": None}):
        with pytest.raises(InputError, match="plan is damaged"):
            Plan.from_json({**plan, "layers": [], **change} if "layers" not in change else {**plan, **change, "bits": None})


# ---- recipes ---------------------------------------------------------------------------------------

RECIPES = {
    "a name too long for a file": f"extends: [{'a' * 300}]",
    "a pattern too deep": f"quant: {{rules: [{{match: 're:{'(' * 3000}'}}]}}",
    "a short one that is too deep": f"quant: {{rules: [{{match: 're:{'(' * 150}'}}]}}",
    "many unknown keys": "quant: {" + ", ".join(f"k{k}: 1" for k in range(4000)) + "}",
    "many bad items": "published: [" + "1, " * 4000 + "]",
    "a long word": f"quant: {{method: {'lsq' * 10_000}}}",
    "half a character": 'description: "\\ud800"',
    "a zero byte": 'model: {name: "a\\0b"}',
    "a key with a zero byte": '"a\\0b": 1',
    "more parts than epochs": "scheme: {name: profit, options: {parts: 1000000000}}\nteacher: {name: self}",
    "epochs": f"schedule: {{epochs: {'9' * 400}}}\nscheme: {{name: qkd}}\nteacher: {{name: self}}",
    "widths": "quant: {bits: ²/³}",
    "no number in the arguments of others": "model: {kwargs: {a: [1, {b: .nan}]}}",
    "large": "#" * (1 << 18),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_is_a_trick_is_a_sentence(tmp_path, name):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPES[name])
    with pytest.raises(NulsqError) as error:
        recipe.load(path)
    assert error.value.exit_code in (2, 3) and len(str(error.value)) < 20_000


def test_an_index_that_only_looks_like_one_and_a_path_without_end(tmp_path):
    for change in ("quant.rules.²=3", "quant.stabilizers.²=3", "quant.rules.99999999999999999999=3", "a." * 5000 + "b=1"):
        with pytest.raises(NulsqError):
            recipe.load("quickstart", overrides=["quant.rules=[{match: 'x'}]", change])


def test_recipes_together_may_not_be_larger_than_one(tmp_path):
    for k in range(5):
        (tmp_path / f"r{k}.yaml").write_text(f"extends: [{f'r{k + 1}' if k < 4 else ''}]\n#" + "x" * 40_000)
    with pytest.raises(NulsqError, match="too large"):
        recipe.load(tmp_path / "r0.yaml")


# ---- the tool ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_short_fuzz_breaks_nothing():
    """In a process of its own: its children are forks, and one that has trained must not be forked to train."""
    done = subprocess.run([sys.executable, TOOLS / "fuzz.py", "--cases", "40", "--seed", "7"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counted = [line.split(": ", 1) for line in done.stdout.splitlines()]
    assert [kind for kind, _ in counted] == ["artifact", "checkpoint", "recipe"]
    assert all(text.startswith("40 cases") for _, text in counted)
    assert "refused" in done.stdout


def test_the_guard_of_the_fuzzer_sees_what_it_forbids(tmp_path):
    """In a process of its own: an audit hook stays."""
    code = "\n".join([
        "import sys, subprocess; sys.path.insert(0, sys.argv[1])", "from pathlib import Path", "import fuzz",
        "guard = fuzz.Guard(Path(sys.argv[2]))", "seen = []",
        "acts = [lambda: subprocess.run(['true']), lambda: open('/etc/hostname'), lambda: eval('1'), lambda: bytearray(2 << 30)]",
        "for act in acts:",
        "    try:", "        with guard.watching(100): act()", "    except (fuzz.Broken, MemoryError): seen.append(1)",
        "print(len(seen))",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, TOOLS, tmp_path], capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr
