"""Small quantized networks of each family, as packed files."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import InvertedResidual
from torch import nn

from nulsq_cli import api, artifact
from nulsq_cli.models import create_float_model, float_info


class Inverted(nn.Module):
    """A stem, two inverted residuals with ReLU6, one of them with a shortcut, and a head."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, **_: object) -> None:
        super().__init__()
        self.num_classes = self.num_features = num_classes
        self.conv_stem, self.bn1, self.act = nn.Conv2d(in_chans, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.blocks = nn.Sequential(*(InvertedResidual(8, 8, act_layer=nn.ReLU6, exp_ratio=2, noskip=k == 0) for k in range(2)))
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.blocks(self.act(self.bn1(self.conv_stem(x))))
        return self.classifier(x.mean((2, 3)))


default_cfgs = generate_default_cfgs({
    "tiny_inverted.untrained": {"input_size": (3, 16, 16), "num_classes": 10, "first_conv": "conv_stem",
                                "classifier": "classifier"},
})  # fmt: skip


@register_model
def tiny_inverted(pretrained: bool = False, **kwargs: object) -> nn.Module:
    return build_model_with_cfg(Inverted, "tiny_inverted", pretrained, **kwargs)


NETS = {
    "resnet8_cifar": ({}, 16),
    "tiny_inverted": ({}, 16),
    "resnet18": ({"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}, 32),
    "vit_tiny_patch16_224": ({"img_size": 32, "patch_size": 16, "depth": 1, "embed_dim": 24, "num_heads": 2}, 32),
    "swin_tiny_patch4_window7_224": ({"img_size": 32, "depths": (2,), "embed_dim": 16, "num_heads": (2,), "window_size": 4,
                                      "patch_size": 4}, 32),
    "convnext_atto": ({"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, 32),
}  # fmt: skip


def quantized(arch: str, bits: str = "3/3", method: str = "nulsq-wa", granularity: str = "tensor"):
    """(model, notes) of a small network with statistics of its own in BatchNorm, some gains negative, one of them 0."""
    kwargs, size = NETS[arch]
    torch.manual_seed(0)
    model = create_float_model(arch, num_classes=10, kwargs=kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.8, 0.5)
            nn.init.normal_(module.bias, 0, 0.3)
            module.weight.data[0] = 0
    api.quantize(model, [images(arch, 32, seed=1)], bits=bits, method=method, granularity=granularity)
    info = float_info(model)
    arguments = {k: v for k, v in info["arguments"].items() if k != "num_classes"}
    meta = {"arch": info["architecture"], "arch_kwargs": arguments, "num_classes": 10, "bits": bits, "method": method,
            "data_cfg": {"input_size": [3, size, size], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic",
                         "crop_pct": 1.0, "crop_mode": "center"}}  # fmt: skip
    return model.eval(), meta


@functools.cache
def packed(arch: str, bits: str = "3/3", method: str = "nulsq-wa", granularity: str = "tensor"):
    """(model, artifact), read back from a packed file."""
    path = Path(tempfile.mkdtemp(prefix="nulsq-test-")) / "a.safetensors"
    artifact.save(path, *quantized(arch, bits, method, granularity))
    found = artifact.load(path)
    path.unlink()
    path.parent.rmdir()
    return found


def images(arch: str, count: int, seed: int = 0) -> torch.Tensor:
    size = NETS[arch][1]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
