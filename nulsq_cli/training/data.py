"""Loaders: shuffled and augmented for training, exact for evaluation, fixed for calibration.

What a run draws depends on (seed, epoch, index) only, never on the number of workers or on what was drawn
before: a run that was killed can go on in the middle of an epoch with the same images, crops and flips.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    default_collate,
    get_worker_info,
)

from nulsq_cli.errors import InputError, NulsqError, UsageError
from nulsq_cli.training.order import (
    EpochSampler,
    Key,
    generators_kept,
    permutation,
    reseed,
    seeded,
    spread,
)
from nulsq_cli.training.transforms import Transform
from nulsq_cli.training.workers import ending_byte, start_worker


class Samples(Dataset):
    """Images of a dataset as the model wants them.

    Args:
        dataset: gives (PIL image, int) by index.
        transform: from `build_transforms`.
        seed: makes what the transform draws a pure function of (seed, epoch, index); None: it draws nothing.
    """

    def __init__(self, dataset: Dataset, transform: Transform, seed: int | None = None) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        """Sample `index` as `epoch` draws it: a (C, H, W) float tensor and its class.

        Raises:
            InputError: the image cannot be read; its file is named.
        """
        with generators_kept():
            return self._draw(key)

    def __getitems__(self, keys: Sequence[Key | int]) -> list[tuple[Tensor, int]] | Failure:
        """Many at once, for a loader: the caller's generators are put aside once, not once per image."""
        try:
            with generators_kept():
                return [self._draw(key) for key in keys]
        except NulsqError as error:
            return Failure(error)

    def _draw(self, key: Key | int) -> tuple[Tensor, int]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, label = self.dataset[index]
        if self.seed is not None:
            reseed(self.seed, epoch, index)
        return self.transform(image), label


class Stream(IterableDataset):
    """Images of a dataset without an index (webdataset, TFDS, a streamed hub one), as the model wants them.

    Such a dataset shuffles and shards by itself: its order depends on the number of workers and processes, and
    its length, that of one process's share, is the reader's own estimate.
    """

    def __init__(self, dataset: IterableDataset, transform: Transform, seed: int | None = None, rank: int = 0) -> None:
        self.dataset, self.transform, self.seed, self.rank = dataset, transform, seed, rank
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = getattr(get_worker_info(), "id", 0)
        # timm's readers fix their share at first use: used here in the main process and later in workers, one and the
        # same reader would give every worker all samples; so each pass has a fresh one
        dataset = copy.copy(self.dataset)
        if hasattr(dataset, "reader"):
            dataset.reader = copy.copy(dataset.reader)
            for name in ("common_seed", "worker_seed"):  # it would shuffle alike at each first use
                if isinstance(getattr(dataset.reader, name, None), int):
                    setattr(dataset.reader, name, getattr(dataset.reader, name) + (self.seed or 0) % 2**31 + self.epoch)
        for position, (image, label) in enumerate(dataset):
            if self.seed is None:
                yield self.transform(image), int(label)
            else:
                with seeded(self.seed, self.epoch, self.rank, worker, position):
                    sample = self.transform(image)
                yield sample, int(label)


class Loader(DataLoader):
    """A DataLoader that can be set to an epoch and a position, and whose errors are the project's own."""

    world = 1
    skip = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration draws this epoch, less its first `start` samples (of all processes)."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(epoch, start)
        elif isinstance(self.dataset, Stream):
            self.dataset.epoch = epoch
            self.generator.manual_seed(((self.dataset.seed or 0) + epoch) % 2**63)  # workers shuffle by it
            if hasattr(self.dataset.dataset, "set_epoch"):
                self.dataset.dataset.set_epoch(epoch)
            # a stream cannot start in the middle: what was consumed is read again and dropped
            self.skip = start // (self.batch_size * self.world)

    def check_worker_number_rationality(self) -> None:
        """Torch would warn, several times in a run, of more loaders than cores; they mostly wait for files."""

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in islice(super().__iter__(), self.skip, None):
                if isinstance(batch, Failure):
                    raise batch.error
                yield batch
        except (EOFError, OSError):
            if self.num_workers:  # one that dies closes its connections first; torch says a moment later that it died
                time.sleep(1)
            raise


def train_loader(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Shuffled, augmented full batches of (images, targets); call `set_epoch` before each iteration.

    Args:
        batch_size: per process; every step has `batch_size * world` samples, a rest is dropped.

    Returns:
        A loader whose length is the number of steps of the epoch that are left.

    Raises:
        InputError: the dataset does not fill one step.
    """
    if isinstance(dataset, IterableDataset):
        stream = Stream(dataset, transform, seed, rank)
        return _stream_loader(stream, batch_size, workers, world, drop_last=True)
    size = len(dataset)  # type: ignore[arg-type]
    if size < batch_size * world:
        many = f" on {world} processes" if world > 1 else ""
        what = f"{size} training images do not fill one batch of {batch_size}{many}"
        raise InputError(what, fix="use a smaller batch (-b)")
    sampler = EpochSampler(size, batch_size=batch_size, seed=seed, rank=rank, world=world)
    samples = Samples(dataset, transform, seed)
    return _loader(samples, workers, pin_memory, batch_size=batch_size, sampler=sampler, keep_workers=True)


def eval_loader(
    dataset: Dataset,
    transform: Transform,
    *,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
) -> Loader:
    """Every sample exactly once over all processes, in the dataset's order, nothing padded or dropped.

    Whole batches are dealt out, so that they, and with them the last bits of what is computed from them, are those of
    one process.
    """
    if isinstance(dataset, IterableDataset):
        return _stream_loader(Stream(dataset, transform), batch_size, workers, world, drop_last=False)
    size = len(dataset)  # type: ignore[arg-type]
    mine = [range(start, min(start + batch_size, size)) for start in range(rank * batch_size, size, world * batch_size)]
    return _loader(Samples(dataset, transform), min(workers, len(mine)), pin_memory, batch_sampler=mine)


def fixed_chunks_loader(
    dataset: Dataset,
    samples: int,
    chunk: int,
    seed: int,
    transform: Transform,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> FixedChunks:
    """A fixed part of a dataset in fixed chunks: statistics must not depend on batch size or processes.

    Args:
        samples: how many images; all of them if there are fewer.
        chunk: images per chunk; the last may be smaller.
        seed: chooses the images, spread evenly over the dataset, and mixes them.
        transform: the evaluation transform.

    Returns:
        An iterable of (chunk number, (n, C, H, W) images): each chunk belongs to one process.
    """
    if samples < 1 or chunk < 1:
        raise UsageError(f"samples and chunk must be at least 1, got {samples} and {chunk}")
    if isinstance(dataset, IterableDataset):
        count = -(-samples // chunk)
        loader = _stream_loader(Stream(dataset, transform), chunk, workers, world, drop_last=False)
        return FixedChunks(loader, range(rank, count, world))
    chosen = spread(len(dataset), samples, seed)  # type: ignore[arg-type]
    chunks = [chosen[start : start + chunk] for start in range(0, len(chosen), chunk)]
    numbers = range(rank, len(chunks), world)
    mine = [chunks[number] for number in numbers]
    return FixedChunks(_loader(Samples(dataset, transform), workers, False, batch_sampler=mine), numbers)


@dataclass(frozen=True)
class FixedChunks:
    """Chunks of images with their numbers; can be gone through again and again."""

    loader: Loader
    numbers: range

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        for number, (images, _) in zip(self.numbers, self.loader, strict=False):
            yield number, images

    def __len__(self) -> int:
        return len(self.numbers)


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Split off a part that is not trained on: (rest, part), a pure function of the seed and the size.

    Raises:
        UsageError: the fraction leaves one of the two empty, or the dataset is a stream.
    """
    if isinstance(dataset, IterableDataset):
        raise UsageError("a streamed dataset cannot be split", fix="name another split for validation")
    size = len(dataset)  # type: ignore[arg-type]
    part = round(size * fraction)
    if not 0 < part < size:
        raise UsageError(f"cannot hold out {fraction} of {size} images", fix="give a fraction below 1")
    order = permutation(size, seed, size).tolist()
    return Subset(dataset, sorted(order[part:])), Subset(dataset, sorted(order[:part]))


@dataclass(frozen=True)
class Failure:
    """An expected error on its way out of a worker; torch would wrap it into a traceback."""

    error: NulsqError


def _loader(dataset: Dataset, workers: int, pin_memory: bool, *, keep_workers: bool = False, **how: Any) -> Loader:
    fork = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    return Loader(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_collate,
        worker_init_fn=functools.partial(start_worker, ending=ending_byte(os.getpid()) if fork else None),
        generator=torch.Generator(),  # otherwise every iteration would draw from the caller's generator
        persistent_workers=keep_workers and workers > 0,
        multiprocessing_context="fork" if fork else None,
        **how,
    )


def _stream_loader(stream: Stream, batch_size: int, workers: int, world: int, *, drop_last: bool) -> Loader:
    if hasattr(stream.dataset, "set_loader_cfg"):
        stream.dataset.set_loader_cfg(num_workers=workers)
    loader = _loader(stream, workers, False, batch_size=batch_size, drop_last=drop_last)
    loader.world = world
    return loader


def _collate(items: Any) -> Any:
    return items if isinstance(items, Failure) else default_collate(items)
