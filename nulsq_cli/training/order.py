"""Orders and random draws as pure functions of integers, so that a run can stop and go on the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import Sampler

Key = tuple[int, int]
"""(epoch, index): what a training sampler yields."""

_MASK = 2**64 - 1


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draw from random, numpy and torch (CPU) as the key says; afterwards all three are as they were."""
    with generators_kept():
        reseed(*key)
        yield


def permutation(size: int, *key: int) -> np.ndarray:
    """(size,) int64: an order of 0..size-1 that is a pure function of the key."""
    # sorting raw bits: numpy promises that these stay the same in later versions, not that shuffles do
    bits = np.random.PCG64(np.random.SeedSequence([part & _MASK for part in key]))
    return np.argsort(bits.random_raw(size), kind="stable") if size else np.zeros(0, np.int64)


def spread(size: int, count: int, seed: int) -> list[int]:
    """`count` different indices below `size`: one from each of as many equal stretches, in mixed order.

    Datasets are sorted by class, so equal stretches mean even classes.
    """
    count = min(count, size)
    edges = [size * k // count for k in range(count + 1)] if count else []
    draws = np.random.PCG64(np.random.SeedSequence([seed & _MASK, count])).random_raw(max(count, 1)).tolist()
    picks = [low + draw % (high - low) for low, high, draw in zip(edges, edges[1:], draws, strict=False)]
    return [picks[k] for k in permutation(count, seed, count).tolist()]


class EpochSampler(Sampler[Key]):
    """A shuffled epoch for one process; the order is a pure function of (seed, epoch).

    At each step all processes together take the next `batch_size * world` samples of that order.

    Args:
        size: samples in the dataset.
        batch_size: per process.
        seed: of the run.
        rank, world: this process, and how many there are.
        drop_last: leave out what does not fill a batch on every process.
    """

    def __init__(self, size: int, *, batch_size: int, seed: int, rank: int = 0, world: int = 1, drop_last: bool = True) -> None:
        self.size, self.seed, self.rank, self.world, self.drop_last = size, seed, rank, world, drop_last
        self.global_batch = batch_size * world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many of its samples all processes together have already consumed."""
        self.epoch, self.start = epoch, start

    def _left(self) -> int:
        left = max(self.size - self.start, 0)
        return left - left % self.global_batch if self.drop_last else left

    def __iter__(self) -> Iterator[Key]:
        order = permutation(self.size, self.seed, self.epoch)[self.start : self.start + self._left()]
        epoch = self.epoch
        return iter([(epoch, index) for index in order[self.rank :: self.world].tolist()])

    def __len__(self) -> int:
        return len(range(self.rank, self._left(), self.world))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave random, numpy and torch (CPU) as they were, whatever is drawn or seeded inside."""
    states = random.getstate(), np.random.get_state(legacy=False), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def reseed(*key: int) -> None:
    """Seed the three CPU generators; torch.manual_seed would also touch the accelerator, and take longer."""
    mixed = 0x9E3779B97F4A7C15
    for part in key:  # two rounds of a 64-bit mixer for each: neighbouring keys have nothing in common
        mixed = ((mixed ^ (part & _MASK)) * 0xBF58476D1CE4E5B9 + 1) & _MASK
        mixed = ((mixed ^ (mixed >> 29)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 32
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(mixed >> 1)
