from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nulsq_cli import artifact as packing
from nulsq_cli.errors import CheckFailedError, InputError, UsageError
from nulsq_cli.exporters import EXPORTERS
from nulsq_cli.exporters.lower import Options, lower
from nulsq_cli.exporters.trace import trace
from nulsq_cli.exporters.twin import Twin, settle
from tests.exporters.nets import NETS, images, packed, quantized

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx

from nulsq_cli.exporters import deploy, layer_proof, runtimes
from nulsq_cli.exporters.onnx_file import build


@pytest.fixture(autouse=True)
def only_onnxruntime(request, monkeypatch):
    """One runtime is enough for most tests."""
    if "openvino" not in request.node.name:
        monkeypatch.setattr(runtimes, "here", lambda name: name != "openvino")


def export(arch, path, target="onnx", bits="3/3", act="auto", grid="int8", **more):
    model, artifact = packed(arch, bits, **more)
    material = deploy.Material([images(arch, 32, seed=1)], [(images(arch, 24, seed=2), torch.arange(24) % 10)], 24)
    options = deploy.options_for(target, grid, act, 7)
    return deploy.deploy(target, model, artifact, path, options, material, rounds=0, say=lambda _: None)


@pytest.mark.parametrize("arch", NETS)
def test_every_family_computes_in_integers_and_agrees_with_its_twin(arch, tmp_path):
    found = export(arch, tmp_path / "a.onnx")
    assert found["bytes"] == (tmp_path / "a.onnx").stat().st_size
    verified = found["verified"]
    assert verified["integer_layers"]["onnxruntime"] == 1 and not found["float_layers"]
    assert verified["codes_equal"] and verified["layers_equal"]
    for name in ("onnxruntime", "onnxruntime, optimizers off"):
        assert verified["runtimes"][name]["samples"] == 24 and verified["runtimes"][name]["median_error"] < 2e-3
    assert {"samples", "max_abs_diff", "top1_agreement", "top1"} <= verified.keys()


def test_the_largest_of_rounded_values_is_looked_for_among_bytes(tmp_path):
    export("resnet18", tmp_path / "a.onnx")
    model = onnx.load(tmp_path / "a.onnx")
    producers = {output: node for node in model.graph.node for output in node.output}
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    rounded = producers[pool.input[0]]
    after = next(n for n in model.graph.node if pool.output[0] in n.input)
    assert rounded.op_type == "QuantizeLinear" and after.op_type == "DequantizeLinear" and after.input[1:] == rounded.input[1:]


@pytest.mark.parametrize(("bits", "act", "more"), [
    ("2/2", "sum8", {}), ("4/4", "auto", {"granularity": "channel"}), ("2/4", "where", {"method": "nulsq-w"}),
])  # fmt: skip
def test_widths_methods_and_forms(bits, act, more, tmp_path):
    found = export("resnet8_cifar", tmp_path / "a.onnx", bits=bits, act=act, **more)
    assert found["verified"]["runtimes"]["onnxruntime"]["top1_agreement"] > 95
    if act != "where":
        assert found["verified"]["integer_layers"]["onnxruntime"] == 1


def test_openvino_takes_integers_too(tmp_path):
    pytest.importorskip("openvino")
    found = export("resnet8_cifar", tmp_path / "a.xml", target="openvino")
    assert (tmp_path / "a.bin").exists() and found["act"] == "where"
    # all but the two layers of 8 bits, whose weights are uint8 to be exact without VNNI
    assert found["verified"]["integer_layers"]["openvino"] >= 6 / 8 and set(found["wide_layers"]) == {"conv1", "linear"}
    # with VNNI OpenVINO would round the inputs of layers in float, too, and whoever loads the file should not have to know
    started = runtimes.openvino_core().compile_model(str(tmp_path / "a.xml"), "CPU")
    assert started.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_where_openvino_errs_with_the_batch_open_the_file_is_for_one_size(tmp_path, monkeypatch):
    """As it does with ConvNeXt: no error is made up here, but its report."""
    pytest.importorskip("openvino")
    known = deploy.Trial.failures
    monkeypatch.setattr(deploy.Trial, "failures", lambda self, names: known(self, names) + [n for n in names if "any" in n])
    found = export("resnet8_cifar", tmp_path / "a.xml", target="openvino")
    assert "the file is for batches of 1" in found["warnings"][1]
    read = runtimes.openvino_core().read_model(str(tmp_path / "a.xml"))
    assert list(read.inputs[0].shape) == [1, 3, *[NETS["resnet8_cifar"][1]] * 2]
    run, x = runtimes.openvino(tmp_path / "a.xml")[0], images("resnet8_cifar", 3)
    torch.testing.assert_close(run(x), torch.cat([run(one[None]) for one in x]))


def test_the_float_form_computes_what_the_run_computes(tmp_path):
    found = export("resnet8_cifar", tmp_path / "a.onnx", grid="float")
    assert found["verified"]["twin_and_model"]["median_error"] < 1e-5
    assert found["warnings"][0].startswith("computes in float")


@pytest.mark.parametrize(("lost", "trained_so"), [(0.9, False), (5, False), (5, True)])
def test_a_file_that_is_worse_than_its_run_says_so(lost, trained_so, tmp_path):
    found = export("tiny_inverted", tmp_path / "a.onnx")
    assert not any("top-1" in sentence for sentence in found["warnings"])
    found["verified"].update(model_top1=80.0, twin_and_model={"top1": 80.0 - lost})
    sentences = [sentence for sentence in deploy._warnings(found, trained_so=trained_so) if "top-1" in sentence]
    assert len(sentences) == (lost > 1) and all("5.00 points" in sentence for sentence in sentences)
    assert any("--grid int8" in sentence for sentence in sentences) is (lost > 1 and not trained_so)


def test_any_batch_size(tmp_path):
    export("tiny_inverted", tmp_path / "a.onnx")
    run = runtimes.onnxruntime(tmp_path / "a.onnx")
    x = images("tiny_inverted", 5)
    torch.testing.assert_close(run(x), torch.cat([run(one[None]) for one in x]))


def small(act="sum8", arch="resnet8_cifar"):
    model, artifact = packed(arch)
    size = [3, NETS[arch][1], NETS[arch][1]]
    network = lower(trace(model, tuple(size)), artifact, Options(act=act))
    settle(network, [images(arch, 8)])
    return model, artifact, network, build(network, artifact, size)


def test_a_wrong_code_and_a_wrong_integer_are_found():
    _, _, network, model = small()
    runs = {"ort": lambda content: runtimes.onnxruntime(content)}
    assert layer_proof.wrong_codes(model, network) == [] and layer_proof.wrong_layers(model, network, runs) == {"ort": []}
    broken = copy.deepcopy(model)
    codes = next(t for t in broken.graph.initializer if t.name == "layer2.0.conv1.weight.codes")
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    assert layer_proof.wrong_codes(broken, network) == ["layer2.0.conv1"]
    broken = copy.deepcopy(model)
    levels = next(t for t in broken.graph.initializer if t.name == "layer1.0.conv2.weight.levels")
    levels.raw_data = levels.raw_data[:-4] + (99).to_bytes(4, "little")
    assert layer_proof.wrong_layers(broken, network, runs) == {"ort": ["layer1.0.conv2"]}


def test_a_file_that_fails_its_proof_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "Twin", lambda network: lambda x: -Twin(network)(x))
    with pytest.raises(CheckFailedError, match="does not agree with its twin") as error:
        export("tiny_inverted", tmp_path / "a.onnx")
    assert error.value.exit_code == 5 and list(tmp_path.iterdir()) == []


def test_the_twin_multiplies_integers():
    model, artifact, network, _ = small()
    seen = {}
    twin = Twin(network, lambda node, value: seen.update({node.name: value}))
    twin(images("resnet8_cifar", 2))
    for name, layer in network.layers.items():
        total = seen[name].double() / (layer.unit.double().view(-1, 1, 1) if layer.convolution else layer.unit.double())
        if layer.convolution and name not in network.outputs:
            assert bool(((total - total.round()).abs() < 1e-3 + 1e-6 * total.abs()).all())


def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, monkeypatch):
    from nulsq_cli import jobs
    from nulsq_cli.cli.show import Show

    how = {"grid": "int8", "act": "auto", "reach": 7, "data_dir": None, "samples": 8, "rounds": 0, "show": Show(quiet=True)}
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="no packed file yet"):
        jobs.export_for_runtime(str(tmp_path / "run"), "onnx", None, **how)
    for key, value in (("grid", "int4"), ("act", "fast"), ("reach", 6)):
        with pytest.raises(UsageError, match="choose from"):
            deploy.options_for("onnx", *({**how, key: value}[k] for k in ("grid", "act", "reach")))
    monkeypatch.setattr("nulsq_cli.exporters.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'nulsq\[openvino\]'"):
        EXPORTERS["openvino"].check_installed()


def test_an_operator_without_translation_is_named(monkeypatch, tmp_path):
    from nulsq_cli.exporters import operators

    monkeypatch.delitem(operators.OPERATORS, operators.aten.mean.dim)
    with pytest.raises(UsageError, match="no ONNX form of mean"):
        export("resnet8_cifar", tmp_path / "a.onnx")


def test_the_command(tmp_path, capsys):
    from nulsq_cli.cli import app

    packing.save(tmp_path / "a.safetensors", *quantized("tiny_inverted"))
    with pytest.raises(SystemExit) as end:
        app(["export", str(tmp_path / "a.safetensors"), "--to", "onnx", "--json", "--samples", "16", "--rounds", "1"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "a.onnx") and found["format"] == "onnx"
    assert {"bytes", "float_bytes", "packed_weight_bytes", "ideal_weight_bytes", "entropy_bound_bytes"} <= found.keys()
    assert found["entropy_bound_bytes"] <= found["ideal_weight_bytes"] <= found["packed_weight_bytes"]
    assert set(found["latency"]["onnxruntime"]) == {"float32", "static int8", "this file"}



def test_the_example_in_the_documentation_runs_with_onnxruntime_alone(tmp_path, monkeypatch, capsys):
    from PIL import Image

    export("tiny_inverted", tmp_path / "model.onnx")
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    picture.save(tmp_path / "picture.jpg")
    text = (Path(__file__).parents[2] / "docs/deploy.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    pixels = torch.from_numpy(np.asarray(Image.open(tmp_path / "picture.jpg")).copy()).permute(2, 0, 1).float() / 255
    wanted = runtimes.onnxruntime(tmp_path / "model.onnx")((pixels[None] - 0.5) / 0.5).argmax(1)
    assert capsys.readouterr().out.strip() == str(wanted.numpy())
