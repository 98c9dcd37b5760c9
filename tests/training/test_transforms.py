import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from nulsq_cli.errors import UsageError
from nulsq_cli.models import create_float_model
from nulsq_cli.training.order import seeded
from nulsq_cli.training.transforms import build_mixup, build_transforms, image_mode, resolve_data

CIFAR = {
    "input_size": (3, 32, 32), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
GREY = {**CIFAR, "input_size": (1, 8, 8), "mean": (0.3,), "std": (0.4,)}


def picture(width=32, height=32, mode="RGB"):
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def plain(image, config):
    values = torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    return (values - mean) / std


def test_an_image_of_the_right_size_is_only_normalised():
    for config, image in ((CIFAR, picture()), (GREY, picture(8, 8, "L"))):
        train, evaluate = build_transforms(config, no_aug=True)
        assert torch.equal(evaluate(image), plain(image, config))
        assert torch.equal(train(image), evaluate(image))


def test_evaluation_is_timms():
    config = resolve_data(create_float_model("resnet18.tv_in1k"))
    assert (config["crop_pct"], config["interpolation"]) == (0.875, "bilinear")
    image = picture(300, 260)
    expected = create_transform(**config)(image)
    assert torch.equal(build_transforms(config)[1](image), expected)
    as_json = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    assert torch.equal(build_transforms(as_json)[1](image), expected)


def test_crop_pad_draws_only_crops_and_flips_of_the_padded_image():
    image = picture()
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (4, 4))
    allowed = set()
    for side in (padded, padded.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        for x in range(9):
            for y in range(9):
                allowed.add(side.crop((x, y, x + 32, y + 32)).tobytes())
    unit = {**CIFAR, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    train, _ = build_transforms(unit, crop_pad=4)
    seen = set()
    for k in range(60):
        with seeded(k):
            values = (train(image) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
        seen.add(values.numpy().tobytes())
    assert seen <= allowed and len(seen) > 40


def test_without_flips_and_padding_nothing_is_left_to_draw():
    train, evaluate = build_transforms(CIFAR, crop_pad=0, hflip=0.0)
    assert torch.equal(train(picture()), evaluate(picture()))


@pytest.mark.parametrize("config", [CIFAR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (50, 41)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_pad": 2},
        {"crop_pad": 2, "aa": "rand-m9-mstd0.5-inc1", "reprob": 1.0, "color_jitter": 0.4},
        {"aa": "original", "train_interpolation": "random"},
        {"aa": "augmix-m3-w3"},
        {"scale": [0.5, 1.0], "ratio": [0.9, 1.1], "vflip": 0.5, "reprob": 1.0, "remode": "const", "recount": 2},
        {"train_crop_mode": "rkrc", "color_jitter": [0.1, 0.1, 0.1, 0.1]},
    ],
)  # fmt: skip
def test_every_augmentation_works_in_colour_and_grey(config, size, options):
    image = picture(*size, mode=image_mode(config["input_size"][0]))
    train, _ = build_transforms(config, **options)
    for k in range(10):
        with seeded(k):
            out = train(image)
        assert out.shape == config["input_size"] and out.dtype == torch.float32
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    "options",
    [{"aa": "wombat"}, {"remode": "wombat", "reprob": 0.5}, {"train_crop_mode": "wombat"}, {"crop_pad": -1},
     {"hflip": 1.5}, {"color_jitter": [0.1, 0.1]}],
)  # fmt: skip
def test_augmentations_that_do_not_exist_are_usage_errors(options):
    with pytest.raises(UsageError) as caught:
        build_transforms(CIFAR, **options)
    assert caught.value.fix and next(iter(options)) in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("aa", ["rand-m10-inc1", "augmix-m10", "original"])
def test_the_strongest_posterize_makes_a_black_image(aa, mode):
    config = GREY if mode == "L" else CIFAR
    train, _ = build_transforms(config, aa=aa)
    steps = [step for step in train.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    found = [
        operation.aug_fn
        for step in steps
        for policy in [*getattr(step, "policy", ()), getattr(step, "ops", ())]
        for operation in policy
        if "posterize" in operation.aug_fn.__name__
    ]
    assert found
    for posterize in found:
        assert not np.array(posterize(picture(8, 8, mode), 0)).any()
        assert np.array_equal(posterize(picture(8, 8, mode), 4), np.array(picture(8, 8, mode)) & 0xF0)


def test_data_settings_come_from_the_model_and_what_is_given_wins():
    model = create_float_model("preresnet20_cifar")
    own = resolve_data(model)
    assert own == {"input_size": (3, 32, 32), "mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010),
                   "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}  # fmt: skip
    changed = resolve_data(model, input_size=[3, 40, 48], mean=[0.5], std=[0.1, 0.2, 0.3], interpolation="bicubic",
                           crop_pct=0.9, crop_mode="border")  # fmt: skip
    assert changed == {"input_size": (3, 40, 48), "mean": (0.5,) * 3, "std": (0.1, 0.2, 0.3),
                       "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "border"}  # fmt: skip


def test_the_training_size_counts_not_the_test_size():
    config = resolve_data(create_float_model("resnet18.a1_in1k"))
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.95


def test_a_grey_model_averages_what_its_colour_settings_say():
    config = resolve_data(create_float_model("resnet20_cifar", in_chans=1))
    assert config["input_size"] == (1, 32, 32)
    assert config["mean"] == pytest.approx((0.449,)) and config["std"] == pytest.approx((0.226,))


def test_a_model_built_for_one_size_says_so():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    assert resolve_data(model)["input_size"] == (3, 64, 64)
    with pytest.raises(UsageError, match="takes only 64x64 images, input_size asks for 32x32"):
        resolve_data(model, input_size=(3, 32, 32))


@pytest.mark.parametrize(
    "given",
    [{"input_size": (1, 32, 32)}, {"input_size": (32, 32)}, {"mean": (0.1, 0.2)}, {"std": (0.0, 0.1, 0.1)},
     {"interpolation": "bicubik"}, {"crop_mode": "centre"}, {"crop_pct": 0.0}, {"crop_pct": 1.5}],
)  # fmt: skip
def test_data_settings_that_cannot_be_are_usage_errors(given):
    with pytest.raises(UsageError) as caught:
        resolve_data(create_float_model("resnet8_cifar"), **given)
    assert caught.value.fix


def test_image_modes():
    assert (image_mode(1), image_mode(3)) == ("L", "RGB")
    with pytest.raises(UsageError, match="the model takes 4"):
        image_mode(4)


def test_mixup_is_none_unless_asked_for_and_reproducible_when_seeded():
    assert build_mixup(10) is None
    mixup = build_mixup(10, mixup=0.2, cutmix=1.0, smoothing=0.0, batch_size=4)
    out = []
    for _ in range(2):
        with seeded(1, 2):
            out.append(mixup(torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone(), torch.arange(4)))
    assert torch.equal(out[0][0], out[1][0]) and torch.equal(out[0][1], out[1][1])
    assert torch.equal(out[0][1].sum(1), torch.ones(4))


@pytest.mark.parametrize(
    "options", [{"mixup": 0.1, "batch_size": 5}, {"cutmix_minmax": [0.8, 0.2]}, {"mixup": 0.1, "mixup_mode": "all"}]
)
def test_mixing_that_cannot_be_is_a_usage_error(options):
    with pytest.raises(UsageError):
        build_mixup(10, **options)
