"""Small networks for small images that timm lacks, in timm's own registry.

Two families, each with the parameter names that its public checkpoints use:

* `resnet8/20/32/44/56_cifar`: He et al. 2016 (arXiv:1512.03385, section 4.2) with parameter-free shortcuts
  ("option A"); names `conv1, bn1, layer1.0.conv1, ..., linear`.
* `preresnet20/56_cifar`: pre-activation (He et al. 2016, arXiv:1603.05027) with 1x1 convolutions where the
  shape changes; names `features.init_block, features.stage1.unit1.body.conv1.bn, ..., output` (pytorchcv's).

No weights are registered here, so no licence is stated: it belongs to the checkpoint that is loaded.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 64)
"""Channels of the three stages, in both families."""


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size at stride 1; no bias, for a BatchNorm is always near."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class SmallImageNet(nn.Module):
    """What timm expects of a classifier: sizes, features and head apart, a head that can be exchanged."""

    head_name: str  # set by each family: the name its checkpoints use

    def __init__(self, num_classes: int, in_chans: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        if global_pool not in ("avg", ""):
            raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = WIDTHS[-1]
        self.global_pool, self.drop_rate = global_pool, drop_rate

    def get_classifier(self) -> nn.Module:
        """The last layer: `nn.Linear`, or `nn.Identity` when there are no classes."""
        return getattr(self, self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head in place; 0 classes mean none."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        old = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.head_name, head.to(old.device, old.dtype))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 64, ceil(H/4), ceil(W/4))."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify: (N, 64, h, w) to (N, num_classes), or (N, 64) with `pre_logits`."""
        x = x.mean((2, 3)) if self.global_pool else x
        x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def _finish(self, num_classes: int) -> None:
        """Last act of each constructor: the head, and the initial values of every convolution."""
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        setattr(self, self.head_name, head)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class BasicBlock(nn.Module):
    """conv, BN, ReLU, conv, BN, plus a shortcut without parameters, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.stride, self.new_channels = stride, outputs - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: every `stride`-th pixel, and zeros for the new channels, half before and half after."""
        if self.stride == 1 and not self.new_channels:
            return x
        before = self.new_channels // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        out = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(SmallImageNet):
    """Three stages of `blocks` basic blocks: 6 * blocks + 2 layers with weights.

    Source: arXiv:1512.03385, section 4.2.
    """

    head_name = "linear"

    def __init__(
        self,
        blocks: int = 3,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.conv1, self.bn1, self.act1 = conv3x3(in_chans, WIDTHS[0]), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)
        inputs = WIDTHS[0]
        for number, outputs in enumerate(WIDTHS, 1):
            first = BasicBlock(inputs, outputs, stride=1 if number == 1 else 2)
            rest = (BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            inputs = outputs
        self._finish(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 64, ceil(H/4), ceil(W/4))."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))


class NormAct(nn.Module):
    """BatchNorm and ReLU: what comes before every convolution but the first, and after the last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn, self.activ = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape."""
        return self.activ(self.bn(x))


class PreConv(NormAct):
    """BatchNorm, ReLU, convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(inputs)
        self.conv = conv3x3(inputs, outputs, stride)


class PreUnit(nn.Module):
    """Two pre-activated convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv1": PreConv(inputs, outputs, stride), "conv2": PreConv(outputs, outputs)})
        changes = stride != 1 or inputs != outputs
        self.identity_conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        first, second = self.body["conv1"], self.body["conv2"]
        active = first(x)
        # a shortcut that changes the shape starts from the activated input, a plain one from the raw input
        short = x if self.identity_conv is None else self.identity_conv(active)
        return second.conv(second(first.conv(active))) + short


class CifarPreResNet(SmallImageNet):
    """Three stages of `blocks` pre-activation units: 6 * blocks + 2 layers with weights, and shortcuts.

    Source: arXiv:1603.05027; parameter names as in pytorchcv.
    """

    head_name = "output"

    def __init__(
        self,
        blocks: int = 3,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(num_classes, in_chans, global_pool, drop_rate)
        self.features = nn.Sequential()
        self.features.add_module("init_block", conv3x3(in_chans, WIDTHS[0]))
        inputs = WIDTHS[0]
        for number, outputs in enumerate(WIDTHS, 1):
            stage = nn.Sequential()
            for unit in range(1, blocks + 1):
                stage.add_module(f"unit{unit}", PreUnit(inputs, outputs, stride=2 if unit == 1 and number > 1 else 1))
                inputs = outputs
            self.features.add_module(f"stage{number}", stage)
        self.features.add_module("post_activ", NormAct(inputs))
        self._finish(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, 64, ceil(H/4), ceil(W/4))."""
        return self.features(x)


def _cfg(first_conv: str, classifier: str, **changes: object) -> dict[str, object]:
    """Data settings of a CIFAR checkpoint; crop_pct 1: a small image is neither enlarged nor blurred."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),  # what the public ResNet-20 and -56 checkpoints were trained with
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": classifier,
        "paper_name": "Deep Residual Learning for Image Recognition",
        "paper_ids": "arXiv:1512.03385",
        **changes,
    }


_PRE = _cfg(
    "features.init_block",
    "output",
    mean=(0.4914, 0.4822, 0.4465),  # pytorchcv's CIFAR-10 settings
    std=(0.2023, 0.1994, 0.2010),
    paper_name="Identity Mappings in Deep Residual Networks",
    paper_ids="arXiv:1603.05027",
)

default_cfgs = generate_default_cfgs(
    {
        "resnet8_cifar": _cfg("conv1", "linear"),
        # the network that travels with this package, for 8x8 grey digits; statistics of their training split
        "resnet8_cifar.nulsq_digits": _cfg(
            "conv1", "linear", input_size=(1, 8, 8), pool_size=(2, 2), mean=(0.3054,), std=(0.3753,)
        ),
        "resnet20_cifar": _cfg("conv1", "linear"),
        "resnet32_cifar": _cfg("conv1", "linear"),
        "resnet44_cifar": _cfg("conv1", "linear"),
        "resnet56_cifar": _cfg("conv1", "linear"),
        "preresnet20_cifar": _PRE,
        "preresnet56_cifar": _PRE,
    }
)


def _build(family: type[SmallImageNet], name: str, pretrained: bool, **kwargs: Any) -> SmallImageNet:
    return build_model_with_cfg(family, name, pretrained, **kwargs)


@register_model
def resnet8_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """ResNet-8: one block per stage."""
    return _build(CifarResNet, "resnet8_cifar", pretrained, **{"blocks": 1, **kwargs})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """ResNet-20: three blocks per stage."""
    return _build(CifarResNet, "resnet20_cifar", pretrained, **{"blocks": 3, **kwargs})


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """ResNet-32: five blocks per stage."""
    return _build(CifarResNet, "resnet32_cifar", pretrained, **{"blocks": 5, **kwargs})


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """ResNet-44: seven blocks per stage."""
    return _build(CifarResNet, "resnet44_cifar", pretrained, **{"blocks": 7, **kwargs})


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """ResNet-56: nine blocks per stage."""
    return _build(CifarResNet, "resnet56_cifar", pretrained, **{"blocks": 9, **kwargs})


@register_model
def preresnet20_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """Pre-activation ResNet-20: three units per stage."""
    return _build(CifarPreResNet, "preresnet20_cifar", pretrained, **{"blocks": 3, **kwargs})


@register_model
def preresnet56_cifar(pretrained: bool = False, **kwargs: Any) -> SmallImageNet:
    """Pre-activation ResNet-56: nine units per stage."""
    return _build(CifarPreResNet, "preresnet56_cifar", pretrained, **{"blocks": 9, **kwargs})
