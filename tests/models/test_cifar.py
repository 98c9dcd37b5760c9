import pytest
import timm
import torch
from torch.nn import functional as F

from nulsq_cli.models import cifar, create_float_model

DEPTHS = {
    "resnet8_cifar": 8,
    "resnet20_cifar": 20,
    "resnet32_cifar": 32,
    "resnet44_cifar": 44,
    "resnet56_cifar": 56,
    "preresnet20_cifar": 20,
    "preresnet56_cifar": 56,
}


@pytest.mark.parametrize("name", DEPTHS)
def test_each_network_is_in_timms_registry_with_its_depth(name):
    model = timm.create_model(name).eval()
    weighted = [m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1]
    shortcuts = [n for n, _ in model.named_modules() if n.endswith("identity_conv")]
    assert len(weighted) - len(shortcuts) == DEPTHS[name]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    modules = dict(model.named_modules())
    cfg = model.pretrained_cfg
    assert isinstance(modules[cfg["first_conv"]], torch.nn.Conv2d)
    assert modules[cfg["classifier"]] is model.get_classifier()
    assert (cfg["input_size"], cfg["crop_pct"], cfg["num_classes"]) == ((3, 32, 32), 1.0, 10)


def test_parameter_counts_are_the_published_ones():
    count = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in DEPTHS}
    # He et al. 2016, table 6 (0.27, 0.46, 0.66, 0.85 million), to the last parameter as akamaster's list has them
    assert count["resnet20_cifar"] == 269722
    assert count["resnet32_cifar"] == 464154
    assert count["resnet44_cifar"] == 658586
    assert count["resnet56_cifar"] == 853018
    assert count["preresnet20_cifar"] == 272282  # pytorchcv's own figures
    assert count["preresnet56_cifar"] == 855578


@pytest.mark.parametrize("name", ["resnet8_cifar", "preresnet20_cifar"])
def test_head_and_features_come_apart_and_the_head_can_be_exchanged(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    x = torch.randn(2, 1, 16, 16)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 4, 4)
    assert torch.equal(model.forward_head(features), model(x))
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean((2, 3)))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(x), features.mean((2, 3)))


def test_the_shortcut_of_option_a_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = cifar.BasicBlock(2, 4, stride=2)
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    out = block.shortcut(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert torch.equal(out[:, [0, 3]], torch.zeros(1, 2, 2, 2))


def test_a_basic_block_is_the_formula():
    block = cifar.BasicBlock(2, 4, stride=2).eval()
    x = torch.randn(1, 2, 6, 6)
    inner = torch.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=2, padding=1)))
    outer = block.bn2(F.conv2d(inner, block.conv2.weight, padding=1)) + block.shortcut(x)
    assert torch.equal(block(x), torch.relu(outer))


def test_a_pre_activation_shortcut_starts_from_the_activated_input_only_where_the_shape_changes():
    x = torch.randn(1, 2, 6, 6)
    for outputs, stride in ((2, 1), (4, 2)):
        unit = cifar.PreUnit(2, outputs, stride).eval()
        torch.nn.init.zeros_(unit.body["conv2"].conv.weight)  # only the shortcut is left
        active = torch.relu(unit.body["conv1"].bn(x))
        expected = x if stride == 1 else F.conv2d(active, unit.identity_conv.weight, stride=2)
        assert torch.equal(unit(x), expected)


def test_names_are_those_of_public_checkpoints():
    plain = list(timm.create_model("resnet8_cifar").state_dict())
    assert [n for n in plain if n.endswith("weight")] == [
        "conv1.weight", "bn1.weight",
        *(f"layer{k}.0.{part}.weight" for k in (1, 2, 3) for part in ("conv1", "bn1", "conv2", "bn2")),
        "linear.weight",
    ]  # fmt: skip
    pre = list(timm.create_model("preresnet20_cifar").state_dict())
    for name in (
        "features.init_block.weight", "features.stage1.unit1.body.conv1.bn.running_var",
        "features.stage1.unit1.body.conv1.conv.weight", "features.stage2.unit1.identity_conv.weight",
        "features.stage3.unit3.body.conv2.conv.weight", "features.post_activ.bn.weight", "output.bias",
    ):  # fmt: skip
        assert name in pre
    assert len([n for n in pre if "identity_conv" in n]) == 2


def test_the_digits_network_has_settings_of_its_own_and_is_not_the_default():
    digits = create_float_model("nulsq/digits_resnet8")
    assert digits.pretrained_cfg["input_size"] == (1, 8, 8)
    assert digits(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert create_float_model("resnet8_cifar").pretrained_cfg["input_size"] == (3, 32, 32)
