from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from nulsq_cli import artifact
from nulsq_cli.errors import InputError
from nulsq_cli.models import create_float_model, float_info
from nulsq_cli.values import Bits
from tests.test_convert import policy, quantized

SIZE = (3, 16, 16)


def packed(path, bits="3/3", method="nulsq-wa", **more):
    torch.manual_seed(0)
    model, _ = quantized(create_float_model("resnet8_cifar"), SIZE, policy(bits, method, **more))
    info = float_info(model)
    meta = {"arch": info["architecture"], "arch_kwargs": {}, "num_classes": 10, "data_cfg": {}, "bits": bits, "method": method,
            "counts": {}}  # fmt: skip
    return model.eval(), meta, artifact.save(path, model, meta)


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "grid.safetensors"
    packed(path, grid="int8")
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "good.safetensors"
    packed(path)
    return path


@pytest.mark.parametrize(("bits", "method", "more"), [
    ("2/2", "nulsq-wa", {}), ("3/3", "nulsq-a", {}), ("4/4", "nulsq-w", {"granularity": "channel"}), ("5/8", "lsq", {}),
    ("3/32", "lsq", {"granularity": "channel"}), ("32/4", "nulsq-a", {"first_last_bits": Bits(32, 32)}),
    ("3/3", "nulsq-wa", {"grid": "int8", "granularity": "channel"}),
    ("4/32", "nulsq-w", {"grid": "int8"}),
])  # fmt: skip
def test_the_file_computes_exactly_what_the_model_computes(tmp_path, bits, method, more):
    model, _, sizes = packed(tmp_path / "a.safetensors", bits, method, **more)
    fresh, _ = artifact.load(tmp_path / "a.safetensors")
    images = torch.randn(5, *SIZE)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    assert sizes.file == (tmp_path / "a.safetensors").stat().st_size
    assert sizes.ideal_weights <= sizes.packed_weights < sizes.float_model


def test_three_bits_take_three_bits(good):
    read = artifact.read(good)
    for name, entry in read.meta["layers"].items():
        count = int(np.prod(entry["shape"]))
        assert read.tensors[f"{name}.weight.codes"].numel() == -(-count * entry["weight_bits"] // 8)
    assert read.meta["layers"]["layer1.0.conv1"]["weight_bits"] == 3


def test_the_same_model_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        packed(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    with safe_open(tmp_path / "one", "pt") as file:
        assert list(file.metadata()) == ["nulsq"]
        text = file.metadata()["nulsq"]
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


@pytest.mark.parametrize("more", [{}, {"granularity": "channel"}, {"grid": "int8", "granularity": "channel"}])
def test_the_reader_in_the_documentation_gets_the_weights_bit_for_bit(tmp_path, more):
    model, _, _ = packed(tmp_path / "a.safetensors", **more)
    text = (Path(__file__).parents[1] / "docs/format.md").read_text()
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S).group(1), namespace)
    meta, tensors, weights = namespace["read"](tmp_path / "a.safetensors")
    integers, codes = namespace["integers"], {}
    for name in weights if meta["grid"] == "int8" else ():
        scale, codes = integers(meta, tensors, name)
        assert np.array_equal(codes.astype(np.float32) * scale, weights[name])
        stored = tensors[f"{name}.act.levels_q8"].astype(np.int16) - tensors[f"{name}.act.zero_point"]
        assert np.array_equal(stored, model.get_submodule(name).input_quantizer.codebook(torch.zeros(1)).integers)
    assert set(weights) == {"conv1", "linear", *(f"layer{k}.0.conv{j}" for k in (1, 2, 3) for j in (1, 2))}
    for name, weight in weights.items():
        assert np.array_equal(weight, model.get_submodule(name).quantized_weight().detach().numpy())


def rewritten(good, path, change):
    """A file that is well-formed, with a right checksum, but says something else."""
    read = artifact.read(good)
    meta, tensors = json.loads(json.dumps(read.meta)), dict(read.tensors)
    change(meta, tensors)
    if meta.get("sha256") == read.meta["sha256"]:
        meta["sha256"] = artifact._digest(tensors)
    path.write_bytes(safetensors.torch.save(tensors, metadata={"nulsq": json.dumps(meta)}))
    return path


LIES = {
    "newer": lambda m, t: m.update(format_version="2.0"),
    "shape": lambda m, t: m["layers"]["linear"].update(shape=[10, 65]),
    "absurd shape": lambda m, t: m["layers"]["linear"].update(shape=[2**40, 2**40]),
    "negative shape": lambda m, t: m["layers"]["linear"].update(shape=[-10, -64]),
    "width": lambda m, t: m["layers"]["linear"].update(weight_bits=9),
    "no codes": lambda m, t: t.pop("linear.weight.codes"),
    "nan level": lambda m, t: t["linear.weight.levels"][3].fill_(float("nan")),
    "unsorted": lambda m, t: t.update({"conv1.act.levels": t["conv1.act.levels"].flip(0).contiguous()}),
    "short table": lambda m, t: t.update({"linear.weight.levels": t["linear.weight.levels"][:4].clone()}),
    "thresholds": lambda m, t: t.update({"conv1.act.thresholds": t["conv1.act.thresholds"][:-2].clone()}),
    "no layers": lambda m, t: m.pop("layers"),
    "checksum": lambda m, t: m.update(sha256="0" * 64),
    "rest": lambda m, t: t.pop("bn1.weight"),
    "extra": lambda m, t: t.update({"stranger": torch.zeros(3)}),
    "arch": lambda m, t: m.update(arch="resnet20_cifar"),
    "unknown arch": lambda m, t: m.update(arch="no_such_net"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_refused_with_a_sentence(good, tmp_path, name):
    path = rewritten(good, tmp_path / "bad.safetensors", LIES[name])
    with pytest.raises(InputError) as error:
        artifact.load(path)
    assert error.value.exit_code == 3 and error.value.what and "\n" not in error.value.what


GRID_LIES = {
    "a level": lambda m, t: t["linear.weight.levels"][3].mul_(1 + 2**-20),
    "an integer": lambda m, t: t["layer1.0.conv1.weight.levels_i8"][0].add_(1),
    "scale": lambda m, t: t["conv1.act.scale"].mul_(-1),
    "infinite scale": lambda m, t: t["conv1.act.scale"].fill_(float("inf")),
    "shape of a scale": lambda m, t: t.update({"conv1.act.scale": t["conv1.act.scale"][None].clone()}),
    "type of integers": lambda m, t: t.update({"conv1.act.levels_q8": t["conv1.act.levels_q8"].short()}),
    "short": lambda m, t: t.update({"conv1.act.levels_q8": t["conv1.act.levels_q8"][1:].clone()}),
    "zero point": lambda m, t: t["conv1.act.zero_point"].add_(1),
    "no zero point": lambda m, t: t.pop("conv1.act.zero_point"),
    "no integers": lambda m, t: t.pop("linear.weight.levels_i8"),
    "none at all": lambda m, t: [t.pop(k) for k in ("linear.weight.levels_i8", "linear.weight.scale")],
    "half of them, and no grid": lambda m, t: (m.update(grid="float"), t.pop("linear.weight.scale")),
}  # fmt: skip


@pytest.mark.parametrize("name", GRID_LIES)
def test_integers_that_lie_are_refused(on_grid, tmp_path, name):
    with pytest.raises(InputError) as error:
        artifact.load(rewritten(on_grid, tmp_path / "bad.safetensors", GRID_LIES[name]))
    assert error.value.exit_code == 3 and "damaged" in error.value.what


def test_files_of_version_1_0_are_read(good, tmp_path):
    old = rewritten(good, tmp_path / "a.safetensors", lambda m, t: m.update(format_version="1.0"))
    artifact.load(old)


def test_unknown_metadata_keys_are_ignored(good, tmp_path):
    artifact.load(rewritten(good, tmp_path / "a.safetensors", lambda m, t: m.update(later="yes", format_version="1.7")))


@settings(max_examples=150)
@given(st.data())
def test_truncation_and_flipped_bytes_are_refused(good, data):
    content = bytearray(good.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    bad = good.with_name("bad.safetensors")
    bad.write_bytes(bytes(content))
    try:
        read = artifact.read(bad)
    except InputError as error:
        assert error.exit_code == 3
    else:
        # Only what the metadata says about itself (a number in the recipe, say) may differ.
        assert read.meta["sha256"] == artifact.read(good).meta["sha256"]


def test_missing_foreign_and_empty_files(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    for name, words in (("missing", "cannot be read"), ("empty", "truncated"), ("foreign", "not one that nulsq wrote")):
        with pytest.raises(InputError, match=words):
            artifact.read(tmp_path / name)
