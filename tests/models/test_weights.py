import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nulsq_cli.errors import InputError
from nulsq_cli.models import create_float_model, read_weights


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    model = create_float_model("resnet8_cifar")
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def refused(path):
    with pytest.raises(InputError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".th", ".tar", ".bin", ".safetensors", ".weights"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_the_content_decides_not_the_name(tmp_path, tensors, kind, suffix):
    path = tmp_path / f"x{suffix}"
    if kind == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=kind == "zip")
    assert same(dict(sorted(read_weights(path).tensors.items())), dict(sorted(tensors.items())))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "net", "state_dict_ema"])
def test_wrappers_and_prefixes_are_removed_and_said(tmp_path, tensors, key, prefix):
    named = {prefix + name: value for name, value in tensors.items()}
    torch.save(named if key is None else {"epoch": 3, "best": 9.5, key: named}, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert same(weights.tensors, tensors)
    said = " ".join(weights.notes)
    assert (key is None) == ("taken from" not in said) and (key is None or repr(key) in said)
    assert ("module." in prefix) == ("'module.'" in said)


def test_plain_weights_are_preferred_to_averaged_ones_and_that_is_said(tmp_path, tensors):
    ema = {name: torch.zeros_like(value) for name, value in tensors.items()}
    torch.save({"state_dict_ema": ema, "state_dict": tensors}, tmp_path / "x.pth")
    weights = read_weights(tmp_path / "x.pth")
    assert same(weights.tensors, tensors)
    assert "the averaged weights in 'state_dict_ema' were not used" in weights.notes


def test_a_prefix_that_only_some_names_have_is_a_name(tmp_path):
    tensors = {"module.weight": torch.ones(2), "head.weight": torch.ones(2)}
    torch.save(tensors, tmp_path / "x.pth")
    assert list(read_weights(tmp_path / "x.pth").tensors) == list(tensors)


def test_timms_own_training_checkpoint_with_its_namespace_is_read(tmp_path, tensors):
    import argparse

    torch.save({"state_dict": tensors, "args": argparse.Namespace(lr=0.1)}, tmp_path / "x.pth.tar")
    assert same(read_weights(tmp_path / "x.pth.tar").tensors, tensors)


class Bomb:
    """Pickles into a call that would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["zip", "legacy", *range(2, pickle.HIGHEST_PROTOCOL + 1)])
def test_a_file_with_code_is_refused_and_nothing_runs(tmp_path, tensors, how):
    mark, path = tmp_path / "executed", tmp_path / "x.pth"
    content = {"state_dict": tensors, "extra": Bomb(mark)}
    if how in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    else:
        path.write_bytes(pickle.dumps({"extra": Bomb(mark)}, protocol=how))
    text = refused(path)
    assert not mark.exists()
    if how in ("zip", "legacy"):
        assert "contains code (io.open)" in text
    else:  # such a pickle is stopped at its first instruction; which one is up to torch
        assert "contains code" in text or "damaged" in text


def test_a_pickled_model_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    assert "contains code (torch.nn.modules.linear.Linear)" in refused(tmp_path / "x.pth")


def test_the_loader_never_asks_torch_for_more_than_weights(tmp_path, monkeypatch, tensors):
    asked = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: asked.append(k["weights_only"]) or load(*a, **k))
    torch.save(Bomb(tmp_path / "executed"), tmp_path / "x.pth")
    refused(tmp_path / "x.pth")
    assert asked == [True]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"hello, this is no checkpoint at all", "not a checkpoint"),
        (b"<!DOCTYPE html><html></html>", "not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"PK\x03\x04 but nothing after it", "truncated or damaged"),
        (b"\x80\x02}", "truncated or damaged"),
        (b"\xff" * 8 + b"{}", "truncated or damaged"),
    ],
)
def test_other_files_are_named(tmp_path, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    assert words in refused(path)


def test_missing_files_and_folders_are_named(tmp_path):
    assert "no such checkpoint" in refused(tmp_path / "absent.pth")
    assert "folder" in refused(tmp_path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(keep=st.floats(0.001, 0.999))
def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path, kind, keep):
    whole = tmp_path / "whole"
    small = {"conv.weight": torch.ones(4, 3), "conv.bias": torch.ones(4)}
    if kind == "safetensors":
        save_file(small, whole)
    else:
        torch.save(small, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[: max(1, int(len(content) * keep))])
    refused(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(2)], torch.ones(2), "text", {"model": {}}])
def test_files_of_torch_without_named_tensors_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    text = refused(tmp_path / "x.pth")
    assert "no tensors" in text or "not a checkpoint" in text


def test_entries_among_the_weights_that_are_no_tensors_are_named(tmp_path, tensors):
    torch.save({**tensors, "epoch": 3}, tmp_path / "x.pth")
    assert "not tensors stand among the weights: epoch" in refused(tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers_are_refused_by_name(tmp_path, tensors, value, dtype):
    bad = tensors["linear.weight"].to(dtype)
    bad[3, 5] = value
    torch.save({**tensors, "linear.weight": bad}, tmp_path / "x.pth")
    assert "linear.weight holds values that are not finite" in refused(tmp_path / "x.pth")


def test_complex_and_sparse_tensors_are_refused(tmp_path, tensors):
    for bad in (torch.ones(10, 64, dtype=torch.complex64), torch.ones(10, 64).to_sparse()):
        torch.save({**tensors, "linear.weight": bad}, tmp_path / "x.pth")
        assert "linear.weight" in refused(tmp_path / "x.pth")
