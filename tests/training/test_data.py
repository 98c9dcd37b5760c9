import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.training.data import (
    Samples,
    eval_loader,
    fixed_chunks_loader,
    hold_out,
    train_loader,
)
from nulsq_cli.training.transforms import build_transforms

CONFIG = {
    "input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
EVERYTHING = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.7, "color_jitter": 0.4, "vflip": 0.3}


class Pixels(Dataset):
    """Sample i is a picture whose first pixel says i, of class i."""

    def __init__(self, size, broken=()):
        self.size, self.broken, self.read = size, broken, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken:
            raise InputError("cannot read this image", where=f"file {index}", fix="remove it")
        values = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        return Image.fromarray(values), index


class Streamed(IterableDataset):
    """The same without an index."""

    def __init__(self, size):
        self.pixels, self.epoch = Pixels(size), 0

    def __len__(self):
        return len(self.pixels)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        yield from (self.pixels[(index + self.epoch) % len(self)] for index in range(len(self)))


class Reader:
    """Fixes its share when first read, as timm's readers of streams do."""

    share = None

    def __len__(self):
        return 10

    def __iter__(self):
        if self.share is None:
            info = get_worker_info()
            self.share = (info.id, info.num_workers) if info else (0, 1)
        pixels = Pixels(10)
        yield from (pixels[index] for index in range(self.share[0], 10, self.share[1]))


def numbers(image):
    """A transform without any: the picture as it is."""
    return torch.from_numpy(np.array(image)).float()


def everything():
    return build_transforms(CONFIG, **EVERYTHING)[0]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def batches(loader, epoch=0, start=0):
    loader.set_epoch(epoch, start)
    return [(images.clone(), targets.tolist()) for images, targets in loader]


def same(left, right):
    assert [targets for _, targets in left] == [targets for _, targets in right]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(left, right, strict=True))


@given(st.integers(0, 2**62), st.integers(0, 90), st.integers(0, 19))
def test_augmentation_is_a_function_of_seed_epoch_and_index(seed, epoch, index):
    samples = Samples(Pixels(20), everything(), seed)
    first, label = samples[(epoch, index)]
    samples[(epoch + 1, index)]
    again, _ = samples[(epoch, index)]
    (many, _), (other, _) = samples.__getitems__([(epoch, index), (epoch, (index + 1) % 20)])
    assert label == index and torch.equal(first, again) and torch.equal(first, many)
    assert not torch.equal(first, other)


def test_epochs_and_seeds_draw_differently():
    seen = [Samples(Pixels(4), everything(), seed)[(epoch, 2)][0] for seed in (0, 1) for epoch in (0, 1, 2)]
    assert all(not torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])


def test_the_callers_generators_are_not_disturbed():
    samples = Samples(Pixels(20), everything(), 3)
    before = states()
    samples[(0, 1)]
    samples.__getitems__([(0, 1), (4, 2)])
    loader = train_loader(Pixels(20), everything(), batch_size=4, seed=3)
    batches(loader)
    list(eval_loader(Pixels(20), numbers, batch_size=4))
    list(fixed_chunks_loader(Pixels(20), 8, 4, 0, numbers))
    hold_out(Pixels(20), 0.2, 0)
    assert states() == before


def test_the_number_of_workers_changes_nothing():
    alone = train_loader(Pixels(20), everything(), batch_size=4, seed=3)
    helped = train_loader(Pixels(20), everything(), batch_size=4, seed=3, workers=2)
    before = states()
    for epoch, start in ((0, 0), (1, 0), (1, 8), (0, 0)):
        same(batches(alone, epoch, start), batches(helped, epoch, start))
    assert states() == before


def test_an_epoch_left_in_the_middle_does_not_leak_into_the_next():
    loader = train_loader(Pixels(40), numbers, batch_size=4, seed=3, workers=2)
    whole = batches(loader, epoch=1)
    loader.set_epoch(0)
    next(iter(loader))
    same(batches(loader, epoch=1), whole)


def test_a_start_in_the_middle_gives_the_rest_of_the_epoch():
    pixels = Pixels(22)
    loader = train_loader(pixels, everything(), batch_size=4, seed=3)
    assert len(loader) == 5
    whole = batches(loader, epoch=2)
    pixels.read.clear()
    same(batches(loader, epoch=2, start=12), whole[3:])
    assert pixels.read == [label for _, labels in whole[3:] for label in labels], "what was seen before is read again"
    assert len(loader) == 2 and batches(loader, epoch=2, start=20) == []


def test_two_processes_see_what_one_sees_with_twice_the_batch():
    alone = batches(train_loader(Pixels(23), everything(), batch_size=6, seed=3), epoch=1)
    pair = [batches(train_loader(Pixels(23), everything(), batch_size=3, seed=3, rank=rank, world=2), epoch=1) for rank in (0, 1)]
    for (images, targets), *parts in zip(alone, *pair, strict=True):
        both = {t: image for part, labels in parts for image, t in zip(part, labels, strict=True)}
        assert sorted(both) == sorted(targets)
        assert all(torch.equal(both[t], image) for image, t in zip(images, targets, strict=True))


def test_too_few_images_for_one_step_are_an_error():
    with pytest.raises(InputError, match="5 training images do not fill one batch of 3 on 2 processes"):
        train_loader(Pixels(5), numbers, batch_size=3, seed=0, world=2)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_every_sample_exactly_once_in_order(world, workers):
    shares = [
        [t for _, targets in eval_loader(Pixels(13), numbers, batch_size=4, workers=workers, rank=rank, world=world)
         for t in targets.tolist()]
        for rank in range(world)
    ]  # fmt: skip
    assert sorted(t for share in shares for t in share) == list(range(13))
    assert all(share == sorted(share) for share in shares)


def test_more_processes_than_samples_leave_some_without_work():
    loaders = [eval_loader(Pixels(2), numbers, batch_size=4, workers=2, rank=r, world=3) for r in range(3)]
    assert [sum(len(targets) for _, targets in loader) for loader in loaders] == [2, 0, 0]


def chunks(**how):
    return {number: images for number, images in fixed_chunks_loader(Pixels(50), 30, 8, 5, numbers, **how)}


def test_fixed_chunks_depend_on_nothing_but_their_arguments():
    alone = chunks()
    assert list(alone) == [0, 1, 2, 3] and [len(alone[k]) for k in alone] == [8, 8, 8, 6]
    for how in ({"workers": 2}, {}):
        again = chunks(**how)
        assert all(torch.equal(alone[k], again[k]) for k in alone)
    first, second = (chunks(rank=rank, world=2) for rank in (0, 1))
    assert list(first) == [0, 2] and list(second) == [1, 3]
    assert all(torch.equal(alone[k], images) for k, images in (first | second).items())


def test_fixed_chunks_hold_different_images_and_can_be_read_again():
    loader = fixed_chunks_loader(Pixels(50), 30, 8, 5, numbers)
    flat = [tuple(image.flatten().tolist()) for _, images in loader for image in images]
    assert len(flat) == len(set(flat)) == 30 and len(loader) == 4
    assert flat == [tuple(image.flatten().tolist()) for _, images in loader for image in images]
    assert sum(len(images) for _, images in fixed_chunks_loader(Pixels(5), 30, 8, 5, numbers)) == 5
    with pytest.raises(UsageError):
        fixed_chunks_loader(Pixels(5), 0, 8, 5, numbers)


@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**62))
def test_a_held_out_part_is_disjoint_complete_and_a_pure_function(size, fraction, seed):
    if not 0 < round(size * fraction) < size:
        with pytest.raises(UsageError, match="cannot hold out"):
            hold_out(Pixels(size), fraction, seed)
        return
    rest, part = hold_out(Pixels(size), fraction, seed)
    assert len(part) == round(size * fraction)
    assert sorted([*rest.indices, *part.indices]) == list(range(size))
    assert hold_out(Pixels(size), fraction, seed)[1].indices == part.indices == sorted(part.indices)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_comes_out_of_a_worker_as_the_same_error(workers):
    for loader in (
        train_loader(Pixels(20, broken=[7]), numbers, batch_size=4, seed=0, workers=workers),
        eval_loader(Pixels(20, broken=[7]), numbers, batch_size=4, workers=workers),
    ):
        with pytest.raises(InputError) as caught:
            list(loader)
        error = caught.value
        assert (error.what, error.where, error.fix) == ("cannot read this image", "file 7", "remove it")


def test_samples_can_be_sent_to_another_process():
    samples = pickle.loads(pickle.dumps(Samples(Pixels(5), everything(), 1)))
    assert torch.equal(samples[(0, 1)][0], Samples(Pixels(5), everything(), 1)[(0, 1)][0])


def test_streams_are_read_in_their_own_order_and_resumed_by_position():
    loader = train_loader(Streamed(10), everything(), batch_size=3, seed=0)
    whole = batches(loader, epoch=1)
    assert [targets for _, targets in whole] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]] and len(loader) == 3
    same(batches(loader, epoch=1, start=6), whole[2:])
    same(batches(loader, epoch=1), whole)
    read = [t for _, targets in eval_loader(Streamed(10), numbers, batch_size=4) for t in targets.tolist()]
    assert read == list(range(10))
    assert [len(images) for _, images in fixed_chunks_loader(Streamed(10), 8, 4, 0, numbers)] == [4, 4]
    with pytest.raises(UsageError, match="streamed"):
        hold_out(Streamed(10), 0.1, 0)


def test_a_stream_read_in_the_main_process_is_still_shared_among_workers():
    stream = IterableImageDataset("", reader=Reader())
    for workers in (0, 2, 0, 1):
        loader = eval_loader(stream, numbers, batch_size=3, workers=workers)
        assert sorted(t for _, targets in loader for t in targets.tolist()) == list(range(10))
