from __future__ import annotations

import pytest
import torch

from nulsq_cli import artifact
from nulsq_cli.jobs import benching
from nulsq_cli.models import create_float_model, float_info
from tests.exporters.test_exported import command, file  # noqa: F401 a fixture
from tests.test_convert import policy, quantized


def packed(path, config):
    torch.manual_seed(0)
    model, _ = quantized(create_float_model("resnet8_cifar", num_classes=10), (3, 16, 16), policy())
    info = float_info(model)
    arguments = {key: value for key, value in info["arguments"].items() if key != "num_classes"}
    artifact.save(path, model, {"arch": info["architecture"], "arch_kwargs": arguments, "num_classes": 10, "data_cfg": config,
                                "bits": "3/3", "method": "nulsq-wa"})  # fmt: skip
    return path


def test_everything_is_timed_beside_its_engines_float_network(file, tmp_path):  # noqa: F811 a fixture
    path = packed(tmp_path / "a.safetensors", {"input_size": [3, 16, 16]})
    threads = torch.get_num_threads()
    code, found = command("bench", path, file, "--batch-size", "1,2", "--rounds", 3, "--static-int8", "--json")
    assert code == 0 and (found["threads"], found["rounds"]) == (1, 3)
    assert torch.get_num_threads() == threads
    rows = {(r["kind"], r["runtime"], r["batch"]): r for r in found["results"]}
    kinds = [(kind, engine) for engine in ("onnxruntime", "openvino") for kind in ("float", "onnx", "static int8")]
    assert sorted({key[:2] for key in rows}) == sorted([("float", "torch"), ("artifact", "torch"), *kinds])
    assert len(found["results"]) == len(rows) == 2 * (2 + len(kinds))
    for (kind, engine, batch), r in rows.items():
        low, high = r["ms_quartiles"]
        assert 0 < low <= r["ms"] <= high
        assert r["images_per_second"] == pytest.approx(1000 * batch / r["ms"])
        assert r["ratio"] == pytest.approx(r["ms"] / rows["float", engine, batch]["ms"])
        assert r["target"] == str({"artifact": path, "onnx": file}.get(kind, "resnet8_cifar"))


def test_every_network_gets_as_many_images_as_were_asked_for_in_turns():
    seen = []
    network = benching.Network("a", "{}", 2, (3, 4, 5))
    entries = [benching.Entry(name, "float", "torch", network, lambda x, name=name: seen.append((name, tuple(x.shape))))
               for name in "ab"]  # fmt: skip
    benching._time(entries, 6, rounds=2)
    assert seen == [(name, (6, 3, 4, 5)) for _ in range(4) for name in "ab"]  # two of the four rounds warm up
    assert [len(e.times[6]) for e in entries] == [2, 2]


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (("nowhere",), 3, "does not exist"), (("--batch-size", "0", "x"), 2, "--batch-size must be"),
    (("--batch-size", "a", "x"), 2, "--batch-size must be"), (("--runtime", "tensorrt", "x"), 2, "no runtime called"),
])  # fmt: skip
def test_mistakes_are_said_in_a_sentence(arguments, code, words):
    found, said = command("bench", *arguments)
    assert found == code and words in said


def test_a_packed_file_without_the_size_of_its_images_is_refused(tmp_path):
    code, said = command("bench", packed(tmp_path / "a.safetensors", {}))
    assert code == 3 and "how large its images are" in said
