from __future__ import annotations

import json

import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from nulsq_cli import cli, exporters
from nulsq_cli.errors import InputError, NulsqError, UsageError
from nulsq_cli.exporters import exported
from nulsq_cli.exporters.deploy import as_target
from nulsq_cli.exporters.lower import Options, lower
from nulsq_cli.exporters.onnx_file import build, check_operators
from nulsq_cli.exporters.trace import trace
from nulsq_cli.exporters.twin import settle
from tests.exporters.nets import images, packed

ARCH = "resnet8_cifar"
BOTH = ("onnxruntime", "openvino")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model, read = packed(ARCH)
    traced = trace(model, (3, 16, 16))
    check_operators(traced)
    network = lower(traced, read, Options())
    settle(network, [images(ARCH, 16, seed=3)])
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    path.write_bytes(build(network, read, [3, 16, 16]).SerializeToString())
    return path


@pytest.fixture(scope="module")
def ir(file, tmp_path_factory):
    """The same network as OpenVINO's own file."""
    pytest.importorskip("openvino")
    return as_target("openvino", onnx.load(file), tmp_path_factory.mktemp("ir"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures of noise in ten classes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for number in range(12):
        place = root / "validation" / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        picture = torch.randint(0, 256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(picture.numpy()).save(place / f"{number}.png")
    return root


def command(*arguments) -> tuple[int, dict | str]:
    try:
        found = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    except NulsqError as error:
        return error.exit_code, str(error)
    return found.exit_code, json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("runtime", BOTH)
def test_an_exported_file_is_evaluated_as_it_computes(file, folder, runtime):
    code, found = command("eval", file, "--data-dir", folder, "--runtime", runtime, "--json", "-b", 5)
    assert code == 0 and (found["kind"], found["runtime"], found["samples"]) == ("onnx", runtime, 12)
    run, right, loss = exported.read(file).run(runtime, 1), 0, 0.0
    for path in sorted(folder.glob("validation/*/*.png")):
        pixels = torch.tensor(list(Image.open(path).tobytes())).view(1, 16, 16, 3)
        picture = pixels.permute(0, 3, 1, 2)
        logits, target = run(((picture / 255 - 0.5) / 0.5).contiguous()), torch.tensor([int(path.parent.name[5:])])
        right += int(logits.argmax(1) == target)
        loss += float(torch.nn.functional.cross_entropy(logits, target))
    assert found["top1"] == pytest.approx(100 * right / 12)
    assert found["loss"] == pytest.approx(loss / 12, rel=1e-3)


def test_openvinos_own_file_is_evaluated_and_timed_like_the_onnx_file(ir, file, folder):
    _, here = command("eval", ir, "--data-dir", folder, "--json")
    _, there = command("eval", file, "--data-dir", folder, "--runtime", "openvino", "--json")
    assert (here.pop("kind"), there.pop("kind")) == ("openvino", "onnx") and here.pop("target") != there.pop("target")
    assert here["runtime"] == "openvino" and here["loss"] == pytest.approx(there["loss"], rel=1e-3) and here.pop("loss")
    assert here == {key: there[key] for key in here}
    code, found = command("bench", ir, "--batch-size", 1, "--rounds", 1, "--json")
    assert code == 0
    engines = sorted((r["runtime"], r["kind"]) for r in found["results"])
    assert engines == [("openvino", "float"), ("openvino", "openvino"), ("torch", "float")]
    for job in ("eval", "bench"):
        code, said = command(job, ir, "--runtime", "onnxruntime")
        assert code == 2 and "which onnxruntime does not read" in said
    code, said = command("entropy", ir)
    assert code == 2 and "is an exported file" in said
    code, said = command("export", ir, "--to", "onnx")
    assert code == 2 and "is an exported file already" in said


def test_a_damaged_or_foreign_ir_is_refused_with_a_sentence(ir, tmp_path):
    text = ir.read_text()
    (tmp_path / "foreign.xml").write_text(text.replace("<nulsq", "<other"))
    (tmp_path / "foreign.bin").write_bytes(ir.with_suffix(".bin").read_bytes())
    for name, content in (("cut", text[: len(text) // 2]), ("alone", text)):
        (tmp_path / f"{name}.xml").write_text(content)
        with pytest.raises(InputError, match="damaged or no model of OpenVINO, or its .bin file is not beside it"):
            exported.read(tmp_path / f"{name}.xml")
    with pytest.raises(InputError, match="not one that nulsq wrote"):
        exported.read(tmp_path / "foreign.xml")


def test_the_default_runtime_and_the_gate(file, folder):
    code, said = command("eval", file, "--data-dir", folder, "--min-top1", 101, "--json")
    assert code == 5 and "top-1 is" in said


def rewritten(file, path, change):
    model = onnx.load(file)
    meta = json.loads(model.metadata_props[0].value)
    change(meta)
    model.metadata_props[0].value = json.dumps(meta)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("change", [
    lambda m: m.pop("data_cfg"), lambda m: m["data_cfg"].update(input_size=[3, -1, 16]), lambda m: m.update(format="x"),
    lambda m: m.update(num_classes="ten"), lambda m: m.update(session={"providers": ["x"], "disabled_optimizers": []}),
    lambda m: m.update(session={"disabled_optimizers": "all"}), lambda m: m.update(data_cfg=3),
])  # fmt: skip
def test_a_file_that_says_nonsense_is_refused_with_a_sentence(file, tmp_path, change):
    with pytest.raises(InputError, match="cannot be used"):
        exported.read(rewritten(file, tmp_path / "a.onnx", change))


def test_what_is_no_file_of_ours_is_refused_with_a_sentence(file, tmp_path):
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:-100])
    foreign = onnx.load(file)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    for name, words in (("cut", "truncated or no ONNX"), ("foreign", "not one that nulsq wrote"), ("none", "cannot be read")):
        with pytest.raises(InputError, match=words):
            exported.read(tmp_path / f"{name}.onnx")
    broken = rewritten(file, tmp_path / "broken.onnx", lambda m: None)
    model = onnx.load(broken)
    model.graph.node[0].op_type = "NoSuchOperator"
    broken.write_bytes(model.SerializeToString())
    for runtime in BOTH:
        with pytest.raises(InputError, match=f"{runtime} does not take it"):
            exported.read(broken).run(runtime)


def test_the_session_options_are_those_that_the_file_asks_for(file, tmp_path):
    odd = rewritten(file, tmp_path / "a.onnx", lambda m: m["session"].update(disabled_optimizers=["ConstantFolding"]))
    asked = {}

    def stand_in(content, *, threads, session):
        asked.update(session)
        return lambda images: images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exported.runtimes, "onnxruntime", stand_in)
        exported.read(odd).run("onnxruntime")
    assert asked == {"disabled_optimizers": ["ConstantFolding"]}


def test_without_a_runtime_the_command_says_which_to_install(file, monkeypatch):
    known = exporters.find_spec
    monkeypatch.setattr(exporters, "find_spec", lambda name: None if name in BOTH else known(name))
    assert exporters.installed() == []
    for arguments, extra in ((("eval", file), "onnx"), (("eval", file, "--runtime", "openvino"), "openvino"),
                             (("bench", file), "onnx"), (("bench", file, "--runtime", "openvino"), "openvino")):  # fmt: skip
        code, said = command(*arguments)
        assert code == 2 and f"pip install 'nulsq[{extra}]'" in said
    with pytest.raises(UsageError, match="no runtime called 'onnxruntim'"):
        exporters.need("onnxruntim")


def test_a_runtime_for_what_needs_none_is_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"")
    code, said = command("eval", tmp_path / "a.safetensors", "--runtime", "openvino")
    assert code == 2 and "leave out --runtime" in said
    assert command("eval", "--model", "resnet18", "--runtime", "openvino")[0] == 2
