"""Batches whose order is a function of (seed, epoch), and whose augmentation is one of (seed, epoch, image)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import timm.data
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms as T

from nulsq_cli.errors import InputError
from nulsq_cli.training.datasets import check_same_classes, class_count, hold_out, name_of, open_dataset

Transform = Callable[[Any], Tensor]


def resolve_data(model: nn.Module, **given: Any) -> dict[str, Any]:
    """Size, mean, std, interpolation and crop: what is given, else what the model was made for.

    Args:
        model: its `pretrained_cfg` is asked.
        given: input_size, mean, std, interpolation, crop_pct, crop_mode; None leaves it to the model.
    """
    arguments = {key: value for key, value in given.items() if value is not None}
    for key in ("mean", "std", "input_size"):
        if key in arguments:
            arguments[key] = tuple(arguments[key])
    config = timm.data.resolve_data_config(arguments, model=model, use_test_size=False)
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (sum(config[key]) / len(config[key]),) * channels
    return config


def build_transforms(config: dict[str, Any], *, crop_pad: int | None = None, no_aug: bool = False,
                     train_interpolation: str = "random", **augment: Any) -> tuple[Transform, Transform]:  # fmt: skip
    """The transforms of training and of evaluation.

    Args:
        config: from `resolve_data`.
        crop_pad: pad by this many pixels and crop at random, as is usual for small images,
            instead of cropping a random part and resizing it.
        no_aug: train on what is evaluated on.
        train_interpolation, augment: timm's names: scale, ratio, hflip, vflip, color_jitter, auto_augment,
            reprob, remode, recount.
    """
    size = config["input_size"]
    shape = {"input_size": size, "mean": config["mean"], "std": config["std"]}
    evaluation: Transform = timm.data.create_transform(
        **shape, is_training=False, interpolation=config["interpolation"], crop_pct=config["crop_pct"],
        crop_mode=config.get("crop_mode"),
    )  # fmt: skip
    if min(size[1:]) <= 64 and config["crop_pct"] == 1.0:
        evaluation = T.Compose([_ResizeIfNeeded(size[1:]), T.ToTensor(), T.Normalize(config["mean"], config["std"])])
    if no_aug:
        return evaluation, evaluation
    if crop_pad is not None:
        steps: list[Any] = [_ResizeIfNeeded(size[1:]), T.RandomCrop(tuple(size[1:]), padding=crop_pad)]
        if augment.get("hflip"):
            steps.append(T.RandomHorizontalFlip(augment["hflip"]))
        return T.Compose([*steps, T.ToTensor(), T.Normalize(config["mean"], config["std"])]), evaluation
    named = {"reprob": "re_prob", "remode": "re_mode", "recount": "re_count"}
    training = timm.data.create_transform(
        **shape, is_training=True, interpolation=train_interpolation,
        **{named.get(key, key): value for key, value in augment.items()},
    )  # fmt: skip
    return training, evaluation


class _ResizeIfNeeded:
    """Leave an image alone that already has the size: resizing to the same size costs time for nothing."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = tuple(size)
        self.resize = T.Resize(self.size)

    def __call__(self, image: Any) -> Any:
        return image if (image.height, image.width) == self.size else self.resize(image)


class Samples(Dataset):
    """Transformed images; key (epoch, index) fixes all randomness, key index is evaluation.

    Args:
        dataset: (PIL image, class) pairs.
        transform: what each image goes through.
        seed: of the augmentation.
    """

    def __init__(self, dataset: Dataset, transform: Transform, seed: int = 0) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        """(C, H, W) float32, normalised, and the class.

        Raises:
            InputError: the image cannot be read; it is named.
        """
        epoch, index = key if isinstance(key, tuple) else (None, key)
        try:
            image, target = self.dataset[index]
        except InputError:
            raise
        except Exception as reason:  # Pillow and dataset readers raise many types
            raise InputError(f"the image cannot be read: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}",
                             where=name_of(self.dataset, index), fix="replace or remove it") from reason  # fmt: skip
        if epoch is None:
            return self.transform(image), int(target)
        # Only the generators that transforms use; the caller's state is put back, for in a
        # loader without workers it is the training's own.
        kept = torch.get_rng_state(), random.getstate(), np.random.get_state()
        mixed = hash((self.seed, epoch, index)) & 0xFFFFFFFF
        torch.manual_seed(mixed)
        random.seed(mixed)
        np.random.seed(mixed)
        try:
            return self.transform(image), int(target)
        finally:
            torch.set_rng_state(kept[0])
            random.setstate(kept[1])
            np.random.set_state(kept[2])


class EpochSampler(Sampler):
    """The order of an epoch from some batch on, for one of some processes.

    With `world` processes of batch size b, step k together sees the samples that one process of
    batch size `world * b` would see. Samples that do not fill a last batch are left out.
    """

    def __init__(self, length: int, batch_size: int, seed: int, epoch: int, first_batch: int = 0, rank: int = 0,
                 world: int = 1) -> None:  # fmt: skip
        self.length, self.batch_size, self.seed, self.epoch = length, batch_size, seed, epoch
        self.first_batch, self.rank, self.world = first_batch, rank, world

    def __len__(self) -> int:
        return (batches_per_epoch(self.length, self.batch_size, self.world) - self.first_batch) * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        mixed = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(int(mixed))).tolist()
        together = self.batch_size * self.world
        for batch in range(self.first_batch, batches_per_epoch(self.length, self.batch_size, self.world)):
            mine = order[batch * together : (batch + 1) * together][self.rank :: self.world]
            yield from ((self.epoch, index) for index in mine)


def batches_per_epoch(length: int, batch_size: int, world: int = 1) -> int:
    """How many full batches each process gets."""
    return length // (batch_size * world)


def train_loader(dataset: Dataset, transform: Transform, *, batch_size: int, seed: int, epoch: int, first_batch: int = 0,
                 workers: int = 0, pin_mem: bool = False, rank: int = 0, world: int = 1) -> DataLoader:  # fmt: skip
    """Shuffled, augmented batches of one epoch, from `first_batch` on; skipped ones are not decoded."""
    sampler = EpochSampler(len(dataset), batch_size, seed, epoch, first_batch, rank, world)  # type: ignore[arg-type]
    return _loader(Samples(dataset, transform, seed), sampler, batch_size, workers, pin_mem)


def eval_loader(dataset: Dataset, transform: Transform, *, batch_size: int, workers: int = 0, rank: int = 0,
                world: int = 1) -> DataLoader:  # fmt: skip
    """Every sample of a split exactly once over all processes, in order."""
    own = range(rank, len(dataset), world)  # type: ignore[arg-type]
    return _loader(Samples(dataset, transform), own, batch_size, min(workers, -(-len(own) // batch_size)), False)


def _loader(samples: Samples, sampler: Any, batch_size: int, workers: int, pin_mem: bool) -> DataLoader:
    # Iterating a loader draws a seed for its workers; a generator of its own leaves the global one alone.
    return DataLoader(samples, batch_size, sampler=sampler, num_workers=workers, pin_memory=pin_mem,
                      generator=torch.Generator().manual_seed(0), worker_init_fn=_one_thread)  # fmt: skip


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def fixed_chunks_loader(dataset: Dataset, samples: int, chunk: int, seed: int, transform: Transform, *, rank: int = 0,
                        world: int = 1) -> Iterator[tuple[int, Tensor]]:  # fmt: skip
    """Some images without augmentation, in chunks that depend on nothing but these arguments.

    Yields:
        (number of the chunk, (n, C, H, W)) for every `world`-th chunk from `rank` on.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:samples].tolist()  # type: ignore[arg-type]
    source = Samples(dataset, transform)
    for number in range(rank, -(-len(order) // chunk), world):
        yield number, torch.stack([source[i][0] for i in order[number * chunk : (number + 1) * chunk]])


def build_mixup(*, mixup: float, cutmix: float, prob: float, switch_prob: float, mode: str, smoothing: float,
                num_classes: int) -> timm.data.Mixup | None:  # fmt: skip
    """timm's mixup and cutmix, or None when neither is wanted."""
    if not mixup and not cutmix:
        return None
    return timm.data.Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, prob=prob, switch_prob=switch_prob, mode=mode,
                           label_smoothing=smoothing, num_classes=num_classes)  # fmt: skip


__all__ = [
    "EpochSampler", "Samples", "batches_per_epoch", "build_mixup", "build_transforms", "check_same_classes",
    "class_count", "eval_loader", "fixed_chunks_loader", "hold_out", "open_dataset", "resolve_data", "train_loader",
]  # fmt: skip
