"""Architectures of many families: planned, trained a step, packed, reloaded, and exactly equal. No weights needed."""

from __future__ import annotations

import pytest
import timm
import torch

from nulsq_cli import artifact, calibrate
from nulsq_cli.convert import make_plan
from nulsq_cli.layers import quant_layers, quantizers
from nulsq_cli.models import create_float_model, float_info
from tests.test_convert import policy, quantized

SMALL = {"img_size": 64}
ZOO: dict[str, dict] = {
    "resnet8_cifar": {}, "preresnet20_cifar": {}, "resnet18": {}, "resnet26d": {}, "seresnet18": {}, "resnetv2_18": {},
    "mobilenetv2_050": {}, "mobilenetv3_small_050": {}, "tf_mobilenetv3_small_minimal_100": {}, "mobilenetv4_conv_small_050": {},
    "efficientnet_lite0": {}, "tf_efficientnet_b0": {}, "efficientnet_b0": {}, "mixnet_s": {}, "mnasnet_small": {},
    "ghostnet_050": {}, "lcnet_050": {}, "tinynet_e": {}, "regnetx_002": {}, "regnety_002": {}, "regnetz_005": {},
    "vit_tiny_patch16_224": SMALL, "deit_tiny_distilled_patch16_224": SMALL, "swin_tiny_patch4_window7_224": SMALL,
    "swinv2_cr_tiny_ns_224": SMALL, "convnext_atto": {}, "convnextv2_atto": {}, "densenet121": {}, "repvgg_a0": {},
    "mobilevit_xxs": {}, "xcit_nano_12_p16_224": {}, "pit_ti_224": {},
}  # fmt: skip
MADE_FOR = {"pit_ti_224": (3, 224, 224), "xcit_nano_12_p16_224": (3, 64, 64)}


@pytest.mark.parametrize("name", ZOO)
def test_plan_train_pack_and_reload(name, tmp_path):
    if name not in timm.list_models() and "cifar" not in name:
        pytest.skip("this timm does not have it")
    torch.manual_seed(0)
    size = MADE_FOR.get(name, (3, 64, 64))
    model = create_float_model(name, num_classes=10, kwargs=ZOO[name])
    # Random weights do not fit the running statistics they come with; pretrained ones do.
    calibrate.reestimate_batchnorm(model, lambda: [(0, torch.randn(8, *size))], 1)
    model, plan = quantized(model, size, policy("4/4"), rule="nmse")
    found = [p for p in plan.layers if p.quantized]
    assert len(found) >= 8 and {"first layer", "last layer"} <= {p.reason for p in found}
    assert all(p.reason.startswith("float: ") for p in plan.layers if not p.quantized)

    images, labels = torch.randn(2, *size), torch.tensor([1, 2])
    output = model.train()(images)
    output = output[0] if isinstance(output, tuple) else output
    torch.nn.functional.cross_entropy(output, labels).backward()
    for key, quantizer in quantizers(model).items():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.steps()), key

    info = float_info(model)
    meta = {"arch": info["architecture"], "arch_kwargs": ZOO[name], "num_classes": 10, "data_cfg": {}, "bits": "4/4",
            "method": "nulsq-wa", "counts": {}}  # fmt: skip
    sizes = artifact.save(tmp_path / "a.safetensors", model.eval(), meta)
    fresh, _ = artifact.load(tmp_path / "a.safetensors")
    assert set(quant_layers(fresh)) == {p.name for p in found} and sizes.file < sizes.float_model
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))


def test_weights_that_are_used_without_their_layer_stay_float():
    """Swin V2 multiplies by qkv.weight itself: a quantizer in that layer would silently do nothing."""
    model = create_float_model("swinv2_tiny_window8_256", num_classes=4, kwargs={"img_size": 64})
    plan = {p.name: p for p in make_plan(model, policy(), (3, 64, 64)).layers}
    assert plan["layers.0.blocks.0.attn.qkv"].method == "float"
    assert plan["layers.0.blocks.0.attn.proj"].quantized
