import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.models import create_float_model, float_info, input_channels, list_models, resolved_name


def saved(model, path):
    torch.save(model.state_dict(), path)
    return path


def equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def error_of(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        create_float_model(*args, **kwargs)
    assert caught.value.fix
    return str(caught.value)


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    model = create_float_model("preresnet20_cifar", num_classes=3)
    path = saved(model, tmp_path / "x.pth")
    again = create_float_model("preresnet20_cifar", checkpoint=path)
    assert equal(model, again) and not again.training
    assert float_info(again)["source"] == "checkpoint" and float_info(again)["checkpoint"] == str(path)


def test_class_and_channel_counts_are_the_checkpoints_unless_given(tmp_path):
    path = saved(create_float_model("resnet8_cifar", num_classes=3, in_chans=1), tmp_path / "x.pth")
    model = create_float_model("resnet8_cifar", checkpoint=path)
    assert (model.num_classes, input_channels(model)) == (3, 1)
    assert float_info(model)["arguments"] == {"num_classes": 3, "in_chans": 1}
    text = error_of(InputError, "resnet8_cifar", checkpoint=path, num_classes=10)
    assert "has 3 classes (linear.weight), asked was 10" in text
    text = error_of(InputError, "resnet8_cifar", checkpoint=path, in_chans=3)
    assert "has 1 input channels (conv1.weight), asked was 3" in text


def test_half_precision_weights_become_float(tmp_path):
    model = create_float_model("resnet8_cifar")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, tmp_path / "x")
    again = create_float_model("resnet8_cifar", checkpoint=tmp_path / "x")
    assert again.conv1.weight.dtype == torch.float32
    assert torch.equal(again.conv1.weight, model.conv1.weight.half().float())


def test_a_checkpoint_from_before_batches_were_counted_loads(tmp_path):
    model = create_float_model("resnet8_cifar")
    old = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(old, tmp_path / "x.pth")
    assert equal(model, create_float_model("resnet8_cifar", checkpoint=tmp_path / "x.pth"))


def test_tensors_that_do_not_fit_are_listed_and_the_list_ends(tmp_path):
    path = saved(create_float_model("resnet20_cifar"), tmp_path / "x.pth")
    text = error_of(InputError, "resnet8_cifar", checkpoint=path)
    assert "does not fit resnet8_cifar: 72 unexpected" in text and "layer1.1.conv1.weight" in text
    assert "and 62 more" in text
    text = error_of(InputError, "resnet32_cifar", checkpoint=path)
    assert "60 missing" in text  # the batch counters of the other 12 would have been filled in
    wide = create_float_model("resnet8_cifar").state_dict()
    wide["bn1.weight"] = torch.ones(17)
    torch.save(wide, path)
    text = error_of(InputError, "resnet8_cifar", checkpoint=path)
    assert "1 of another shape" in text and "bn1.weight is 17, the model has 16" in text and "more" not in text


def test_integers_where_floats_belong_are_refused(tmp_path):
    tensors = create_float_model("resnet8_cifar").state_dict()
    tensors["conv1.weight"] = tensors["conv1.weight"].to(torch.int8)
    torch.save(tensors, tmp_path / "x.pth")
    assert "conv1.weight holds int8" in error_of(InputError, "resnet8_cifar", checkpoint=tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet20_cifer", "did you mean 'resnet20_cifar'"),
        ("qqqqqqqqqq", "nulsq ls models"),
        ("timm/resnet18", "hf-hub:timm/resnet18"),
        ("nulsq/digit_resnet8", "did you mean 'nulsq/digits_resnet8'"),
        ("resnet18.tv_in1", "did you mean resnet18.tv_in1k?"),
        ("resnet18.zzzzzz", "a1_in1k"),
        ("ftp:resnet18", "hf-hub"),
    ],
)
def test_a_name_that_does_not_exist_is_answered_with_one_that_does(name, words):
    assert words in error_of(UsageError, name)


def test_a_folder_that_is_no_model_is_named(tmp_path):
    assert "no config.json" in error_of(InputError, f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError):
        create_float_model(f"local-dir:{tmp_path}")


def test_a_model_saved_by_timm_can_be_built_again_from_what_is_known_of_it(tmp_path):
    model = create_float_model("resnet8_cifar", num_classes=4, in_chans=1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = create_float_model(f"local-dir:{tmp_path}", pretrained=True)
    assert equal(model, again)
    info = json.loads(json.dumps(float_info(again)))
    bare = create_float_model(info["architecture"], kwargs=info["arguments"])
    assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_weights_that_do_not_exist_and_arguments_that_do_not_fit_are_usage_errors():
    assert "--initial-checkpoint" in error_of(UsageError, "resnet20_cifar", pretrained=True)
    assert "wombat=3" in error_of(UsageError, "resnet8_cifar", kwargs={"wombat": 3})


@pytest.mark.parametrize("reason", [OSError("offline"), ConnectionError("offline"), RuntimeError("offline")])
def test_a_failed_download_names_the_way_out(monkeypatch, reason):
    def fail(*args, **kwargs):
        raise reason

    monkeypatch.setattr(timm, "create_model", fail)
    text = error_of(InputError, "resnet18", pretrained=True)
    assert "offline" in text and "--initial-checkpoint" in text


def test_a_checkpoint_is_read_instead_of_a_download(monkeypatch, tmp_path):
    path = saved(create_float_model("resnet8_cifar"), tmp_path / "x.pth")
    real = timm.create_model
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or real(*a, **k))
    create_float_model("resnet8_cifar", pretrained=True, checkpoint=path)
    assert asked == [False]


def test_names_carry_their_tag():
    assert resolved_name(create_float_model("resnet18")) == "resnet18.a1_in1k"
    assert resolved_name(create_float_model("resnet18.tv_in1k")) == "resnet18.tv_in1k"
    assert resolved_name(create_float_model("nulsq/digits_resnet8")) == "resnet8_cifar.nulsq_digits"


def test_models_are_listed_by_pattern():
    assert list_models("resnet2?_cifar") == ["resnet20_cifar"]
    assert "preresnet56_cifar" in list_models("cifar") and "nulsq/digits_resnet8" in list_models("digits")
    assert {"nulsq/digits_resnet8", "resnet18", "resnet56_cifar"} <= set(list_models())
    assert list_models("no such model") == []


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("resnet20_cifar", "resnet20-12fca82f.th"),
        ("resnet56_cifar", "resnet56-4bfd9763.th"),
        ("resnet20_cifar", "resnet20_cifar10_jpeg.safetensors"),
    ],
)
def test_public_checkpoints_load_as_they_are(shared, model, file):
    loaded = create_float_model(model, checkpoint=shared / "data" / "checkpoints" / file)
    assert loaded.num_classes == 10
    assert loaded.bn1.running_var.min() > 0 and not torch.equal(loaded.bn1.running_mean, torch.zeros(16))
