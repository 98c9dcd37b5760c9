"""Image datasets by timm's strings, and the digits inside this package; every mistake named before training starts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from nulsq_cli.errors import InputError, UsageError

DIGITS = "nulsq/digits"
DIGITS_TRAIN = 1437
"""The copy is ordered by writer, so the last fifth shows mostly hands that the rest does not."""

IMAGES = {".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".webp"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
}  # fmt: skip


class Digits(Dataset):
    """The 1797 handwritten digits that scikit-learn distributes, 8x8 grey, ten classes.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
    Repository, 1998 (CC BY 4.0); `assets/digits.npz` keeps the same note.

    Args:
        split: train (the first 1437) or validation (the last 360).
    """

    def __init__(self, split: str) -> None:
        with np.load(str(files("nulsq_cli").joinpath("assets/digits.npz"))) as content:
            images, labels = content["images"], content["labels"]
        if split in SPLITS["train"]:
            part = slice(0, DIGITS_TRAIN)
        elif split in (*SPLITS["validation"], "test"):
            part = slice(DIGITS_TRAIN, None)
        else:
            raise InputError(f"the digits have no split {split!r}", fix="use train or validation")
        scale = 255 // int(images.max()) if int(images.max()) <= 16 else 1
        self.images, self.labels = images[part] * np.uint8(scale), labels[part]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def open_dataset(name: str, data_dir: str | None, split: str, *, download: bool = False, class_map: str = "",
                 input_img_mode: str = "RGB") -> Dataset:  # fmt: skip
    """A split as (PIL image, class number) pairs, not transformed.

    Args:
        name: empty for a folder of class folders; else timm's string (`torch/cifar10`, `hfds/...`,
            `wds/...`) or `nulsq/digits`.
        data_dir: where the data are, or shall be downloaded to.
        split: name of the split; for a folder, the folder of that name inside `data_dir`.
        download: let the dataset download itself.
        class_map: file that maps class names to numbers.
        input_img_mode: what images are converted to, `RGB` or `L`.

    Raises:
        InputError: no data where data are needed, an empty or half-missing folder, a failed download.
        UsageError: no such dataset.
    """
    if name.lower() == DIGITS:
        return Digits(split)
    if not data_dir and not name.startswith(("hfds/", "hfids/", "tfds/", "wds/")):
        raise InputError("no data: this recipe needs images", fix="name their folder with --data-dir, or a set with --dataset")
    if not name:
        _check_folder(Path(str(data_dir)), split)
    if name.startswith("torch/") and not download and not Path(str(data_dir)).is_dir():
        raise InputError("no such data folder", where=data_dir, fix="add --dataset-download, or name another --data-dir")
    try:
        return timm.data.create_dataset(
            name, root=data_dir, split=split, is_training=False, class_map=class_map, download=download,
            input_img_mode=input_img_mode,
        )  # fmt: skip
    except AssertionError as reason:
        raise UsageError(f"timm knows no dataset {name!r}: {str(reason) or 'unknown name'}",
                         fix="use torch/cifar10, hfds/ORG/NAME, wds/NAME, or leave it empty for a folder") from reason  # fmt: skip
    except (OSError, RuntimeError, ValueError, ImportError, ConnectionError) as reason:
        raise InputError(f"the dataset {name or 'folder'!r} cannot be opened: {str(reason).strip().splitlines()[0]}",
                         where=data_dir, fix="check --dataset, --data-dir and the split names") from reason  # fmt: skip


def _check_folder(root: Path, split: str) -> None:
    if not root.is_dir():
        raise InputError("no such data folder", where=root, fix="name an existing one with --data-dir")
    names = next((group for group in SPLITS.values() if split in group), (split,))
    folder = next((root / n for n in (split, *names) if (root / n).is_dir()), None)
    if folder is None:
        there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:8]) or "no folders"
        raise InputError(f"has no split {split!r}, but {there}", where=root,
                         fix="name the splits with --train-split and --val-split")  # fmt: skip
    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    if not classes:
        raise InputError("holds no class folders", where=folder, fix="put the images of each class in a folder of its own")
    for folder in classes:
        if not any(p.suffix.lower() in IMAGES for p in folder.rglob("*")):
            raise InputError("holds no images", where=folder, fix="remove the folder, or put images in it")


def classes_of(dataset: Dataset) -> dict[str, int] | None:
    """Class name to number, where the dataset knows."""
    if isinstance(dataset, Subset):
        return classes_of(dataset.dataset)
    if isinstance(dataset, Digits):
        return {str(digit): digit for digit in range(10)}
    for owner in (getattr(dataset, "reader", None), dataset):
        found = getattr(owner, "class_to_idx", None)
        if isinstance(found, dict) and found:
            return found
    return None


def class_count(dataset: Dataset) -> int | None:
    """How many classes a dataset has, where it knows."""
    found = classes_of(dataset)
    return None if found is None else len(set(found.values()))


def check_same_classes(train: Dataset, validation: Dataset) -> None:
    """Refuse splits whose classes differ: their numbers would mean different things.

    Raises:
        InputError: the classes that one of them lacks.
    """
    one, two = classes_of(train), classes_of(validation)
    if one is not None and two is not None and one != two:
        lacking = sorted(set(one) ^ set(two))
        raise InputError(f"training and validation split have different classes: {', '.join(map(str, lacking[:6]))}",
                         fix="complete the folders, or give a --class-map")  # fmt: skip


def name_of(dataset: Dataset, index: int) -> str:
    """Where sample `index` comes from, for an error message."""
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    reader: Any = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "filename"):
        return str(reader.filename(index, absolute=True))
    return f"image {index}"


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """Split a dataset into (the rest, a share of it); a pure function of the seed and the length.

    Raises:
        UsageError: the share holds no image.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()  # type: ignore[arg-type]
    count = round(share * len(order))
    if not count:
        raise UsageError(f"a share of {share:g} of {len(order)} images holds none", fix="raise data.hold_out")
    return Subset(dataset, sorted(order[count:])), Subset(dataset, sorted(order[:count]))
