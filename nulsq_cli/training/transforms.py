"""What happens to an image between the file and the model: timm's transforms, resolved once for all uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.auto_augment import posterize
from torch import Tensor, nn
from torchvision import transforms

from nulsq_cli.errors import InputError, UsageError, pick
from nulsq_cli.models import input_channels

Transform = Callable[[Any], Tensor]

IMAGE_MODES = {1: "L", 3: "RGB"}
"""Input channels of a model, and the kind of image that it needs."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


def image_mode(channels: int) -> str:
    """The PIL mode for a model with so many input channels.

    Raises:
        UsageError: neither 1 nor 3.
    """
    if channels not in IMAGE_MODES:
        raise UsageError(f"images have 1 or 3 channels, the model takes {channels}", fix="use in_chans 1 or 3")
    return IMAGE_MODES[channels]


def resolve_data(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
) -> dict[str, Any]:
    """The data settings of a model: its own, where none are given.

    The model's training size counts, never a larger `test_input_size`: float, quantized and exported models
    are evaluated alike.

    Args:
        model: a float model with timm's `pretrained_cfg`.
        input_size: channels, height, width.
        mean, std: one value per channel, or one for all.

    Returns:
        input_size, mean, std, interpolation, crop_pct, crop_mode: ready for JSON and for `build_transforms`.

    Raises:
        UsageError: a value that no image or this model can have.
    """
    own = dict(getattr(model, "pretrained_cfg", {}))
    channels = input_channels(model) or own.get("input_size", (3,))[0]
    size = _size(model, input_size, tuple(own.get("input_size", (3, 224, 224)))[1:], channels)
    for key in ("mean", "std"):  # a grey model made from a colour one: the average of its channels
        if len(own.get(key) or ()) not in (0, channels):
            own[key] = (sum(own[key]) / len(own[key]),) * channels
    for key, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{key} needs 1 or {channels} values, got {len(values)}", fix="one value per channel")
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UsageError(f"crop_pct must be above 0 and at most 1, got {crop_pct}", fix="0.875 is usual")
    given = {"input_size": (channels, *size), "mean": mean, "std": std, "interpolation": interpolation}
    given |= {"crop_pct": crop_pct, "crop_mode": crop_mode}
    config = resolve_data_config(given, pretrained_cfg=own, use_test_size=False)
    if min(config["std"]) <= 0:
        raise UsageError(f"std must be above 0, got {config['std']}", fix="give the deviation of each channel")
    pick(dict.fromkeys(INTERPOLATIONS), config["interpolation"], "interpolation")
    pick(dict.fromkeys(CROP_MODES), config["crop_mode"], "crop mode")
    return config


LARGEST_IMAGE = 4096
"""Pixels a side, of what a file may ask for."""


def check_config(config: Any, where: object) -> None:
    """Refuse data settings from a file that `resolve_data` could not have made.

    Raises:
        InputError: a value is missing, or of another kind or size.
    """
    try:
        channels, *size = config["input_size"]
        sound = (
            channels in IMAGE_MODES and len(size) == 2 and all(type(n) is int and 1 <= n <= LARGEST_IMAGE for n in size)
            and all(math.isfinite(v) for v in (*config["mean"], *config["std"])) and min(config["std"]) > 0
            and all(len(config[key]) in (1, channels) for key in ("mean", "std"))
            and config["interpolation"] in INTERPOLATIONS and config["crop_mode"] in CROP_MODES and 0 < config["crop_pct"] <= 1
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise InputError("is damaged: its data settings are not those of any images", where=where)


def build_transforms(
    data_config: Mapping[str, Any],
    *,
    no_aug: bool = False,
    crop_pad: int | None = None,
    scale: Sequence[float] | None = None,
    ratio: Sequence[float] | None = None,
    train_crop_mode: str | None = None,
    hflip: float = 0.5,
    vflip: float = 0.0,
    color_jitter: float | Sequence[float] | None = None,
    aa: str | None = None,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    train_interpolation: str | None = None,
) -> tuple[Transform, Transform]:
    """The transforms for training and for evaluation: PIL image in, normalised (C, H, W) float tensor out.

    Names are timm's. Unlike timm: no colour jitter unless asked for; in training the model's interpolation.

    Args:
        data_config: from `resolve_data`.
        no_aug: train on what evaluation sees.
        crop_pad: CIFAR style: pad by so many pixels and crop anywhere, instead of random resized crops.

    Raises:
        UsageError: an option that timm cannot build a transform from.
    """
    common = {key: data_config[key] for key in ("input_size", "mean", "std")}
    plain = create_transform(**common, **{key: data_config[key] for key in ("interpolation", "crop_pct", "crop_mode")})
    if no_aug:
        return plain, plain
    if crop_pad is not None and crop_pad < 0:
        raise UsageError(f"crop_pad must be 0 or more pixels, got {crop_pad}", fix="4 is usual for CIFAR")
    for name, chance in {"hflip": hflip, "vflip": vflip, "reprob": reprob}.items():
        if not 0 <= chance <= 1:
            raise UsageError(f"{name} is a probability, got {chance}", fix="give a value from 0 to 1")
    try:
        geometry, colours, ending = create_transform(
            **common, is_training=True, separate=True, train_crop_mode=train_crop_mode,
            scale=scale, ratio=ratio, hflip=hflip, vflip=vflip, color_jitter=color_jitter,
            auto_augment=aa or None, re_prob=reprob, re_mode=remode, re_count=recount,
            interpolation=train_interpolation or data_config["interpolation"],
        )  # fmt: skip
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        asked = {"aa": aa, "color_jitter": color_jitter, "remode": remode, "train_crop_mode": train_crop_mode}
        named = ", ".join(f"{key}={value!r}" for key, value in asked.items() if value is not None)
        reason = f": {error}" if str(error) else ""
        raise UsageError(f"no such augmentation, {named}{reason}", fix="see timm's create_transform") from error
    _mend_posterize(colours)
    steps = geometry.transforms
    if crop_pad is not None:
        # first to the size that evaluation sees (nothing happens if the image has it), then pad and crop
        to_size = [step for step in plain.transforms if not isinstance(step, _TO_TENSOR)]
        crop = transforms.RandomCrop(tuple(data_config["input_size"][1:]), padding=crop_pad)
        steps = [*to_size, crop, *(step for step in steps if isinstance(step, _FLIPS))]
    return transforms.Compose([*steps, *colours.transforms, *ending.transforms]), plain


def build_mixup(
    num_classes: int,
    *,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    cutmix_minmax: Sequence[float] | None = None,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
    mixup_mode: str = "batch",
    smoothing: float = 0.1,
    batch_size: int | None = None,
) -> Mixup | None:
    """timm's mixup and cutmix, or None when neither is asked for.

    It draws from numpy's global generator: call it inside `data.seeded(...)` to make it reproducible.

    Args:
        num_classes: of the model; targets become (N, num_classes) float.
        batch_size: images per process and step, to be checked: pairs are mixed, so it must be even.

    Raises:
        UsageError: a value that mixing cannot work with.
    """
    if mixup <= 0 and cutmix <= 0 and not cutmix_minmax:
        return None
    if batch_size is not None and batch_size % 2:
        raise UsageError(f"mixup needs an even batch size, got {batch_size}", fix=f"use -b {batch_size + 1}")
    if cutmix_minmax and not (len(cutmix_minmax) == 2 and 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1):
        raise UsageError(f"cutmix_minmax needs two rising values from 0 to 1, got {list(cutmix_minmax)}")
    pick(dict.fromkeys(("batch", "pair", "elem")), mixup_mode, "mixup mode")
    return Mixup(
        mixup_alpha=mixup, cutmix_alpha=cutmix, cutmix_minmax=cutmix_minmax or None, prob=mixup_prob,
        switch_prob=mixup_switch_prob, mode=mixup_mode, label_smoothing=smoothing, num_classes=num_classes,
    )  # fmt: skip


def _mend_posterize(colours: transforms.Compose) -> None:
    """Let timm's policies posterize to 0 bits: a strong one asks for that, and Pillow from 12 on refuses it."""
    for step in colours.transforms:
        policies = [*getattr(step, "policy", ()), getattr(step, "ops", ())]
        for operation in (operation for policy in policies for operation in policy):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **unused: Any) -> Image.Image:
    return posterize(image, bits) if bits else image.point(lambda _: 0)


_TO_TENSOR = (transforms.ToTensor, transforms.Normalize)
_FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)


def _size(model: nn.Module, asked: Sequence[int] | None, own: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Height and width: as asked, else as the model was built, else as its settings say."""
    embedding = getattr(model, "patch_embed", None)
    fixed = getattr(embedding, "img_size", None) if getattr(embedding, "strict_img_size", False) else None
    if asked is None:
        return tuple(fixed or own)
    if len(asked) != 3 or min(asked) < 1:
        raise UsageError(f"input_size needs channels, height and width, got {list(asked)}", fix="e.g. 3 224 224")
    if asked[0] != channels:
        raise UsageError(
            f"input_size asks for {asked[0]} channels, the model takes {channels}",
            fix="give the same as in_chans",
        )
    if fixed and tuple(asked[1:]) != tuple(fixed):
        raise UsageError(
            f"this model takes only {fixed[0]}x{fixed[1]} images, input_size asks for {asked[1]}x{asked[2]}",
            fix="build it with the argument img_size, or choose a model that takes any size",
        )
    return tuple(asked[1:])
