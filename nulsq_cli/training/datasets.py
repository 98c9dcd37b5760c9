"""Datasets by timm's names, checked before anything starts; all give (PIL image, int), nothing is skipped."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.data import create_dataset
from timm.data.readers import get_img_extensions
from torch.utils.data import Dataset, Subset

from nulsq_cli.errors import InputError, NulsqError, UsageError, first_line, suggest
from nulsq_cli.training.pictures import DIGITS, EVAL_NAMES, TRAIN_NAMES, Digits, Pictures

TORCHVISION = (
    "cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "places365",
    "inaturalist", "image_folder",
)  # fmt: skip
"""What may follow `torch/`, as in timm."""
PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow_datasets"}
"""The prefixes that need a package which this project does not bring."""


def open_dataset(
    name: str,
    data_dir: str | Path | None,
    split: str,
    *,
    download: bool = False,
    class_map: str = "",
    input_img_mode: str = "RGB",
) -> Dataset:
    """Open a split of a dataset.

    Args:
        name: "" for a folder with a sub-folder (or .tar) per split, and in it one per class;
            `torch/cifar10` and the like; `hfds/org/name`; the streams `hfids/`, `wds/`, `tfds/`;
            `nulsq/digits`, which is part of this package.
        data_dir: the folder, or where downloads are kept.
        split: for folders also a synonym (train, training; val, validation ...); "." for `data_dir` itself.
        download: fetch a torchvision or TFDS dataset that is not there.
        class_map: a text file with one class name per line, in the order of the model's outputs.
        input_img_mode: PIL mode of the images: "RGB" or "L".

    Returns:
        A dataset of (PIL image, int); the streams are iterable datasets.

    Raises:
        UsageError: no such dataset or split name.
        InputError: data, package or network that is missing, or a folder that is not laid out as it must be.
    """
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower() if slash else ""
    if name.lower() == DIGITS:
        return Digits(split, input_img_mode)
    if not name or name.lower() == "folder":
        return _open_folder(data_dir, split, class_map, input_img_mode)
    if prefix == "torch":
        return _open_torchvision(rest.lower(), data_dir, split, download, input_img_mode)
    if prefix in PACKAGES and rest:
        return _open_hub(name, prefix, data_dir, split, download, class_map, input_img_mode)
    known = [DIGITS, *(f"torch/{known}" for known in TORCHVISION)]
    raise UsageError(f"no dataset called {name!r}", fix=f"{suggest(name, known)}, hfds/..., or a folder")


def class_names(dataset: Dataset) -> list[str] | None:
    """The classes in the order of their numbers, or None if the dataset does not name them."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    source = getattr(dataset, "source", dataset)
    for holder in (getattr(source, "reader", None), source):
        for attribute in (
            "class_to_idx",
            "class_name_to_idx",
        ):  # the second is timm's name for it in .tar files
            table = getattr(holder, attribute, None)
            if isinstance(table, dict) and table:
                return [str(name) for name in sorted(table, key=table.__getitem__)]
    return list(getattr(source, "classes", ())) or None


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Refuse two splits that number their classes differently.

    Raises:
        InputError: a class exists in one split only; every later one would get another number there.
    """
    left, right = class_names(train), class_names(val)
    if left is None or right is None or left == right:
        return
    lacking = {"training": set(left) - set(right), "validation": set(right) - set(left)}
    parts = [f"only in {split}: {_some(sorted(names))}" for split, names in lacking.items() if names]
    raise InputError(
        f"the classes of training and validation differ ({'; '.join(parts) or 'in their order'})",
        fix="complete the folders, or fix the numbering with a class map (--class-map)",
    )


def check_outputs(dataset: Dataset, num_classes: int) -> str | None:
    """Refuse a dataset that has classes for which the model has no output.

    Returns:
        What to say where the model has outputs for which the dataset has no class: it may have learned other classes.

    Raises:
        InputError: with both numbers.
    """
    names = class_names(dataset)
    if names is None or len(names) == num_classes:
        return None
    numbers = f"the dataset has {len(names)} classes, the model {num_classes} outputs"
    if len(names) > num_classes:
        raise InputError(numbers, fix=f"give --num-classes {len(names)}, or another dataset")
    return (f"{numbers}: {names[0]!r} is taken for the first of them, and so on. If the model has learned other classes, give"
            f" --num-classes {len(names)} for a new last layer, or say which is which (--class-map)")  # fmt: skip


def _open_folder(data_dir: str | Path | None, split: str, class_map: str, mode: str) -> Pictures:
    root = _split_folder(_data_dir(data_dir, "a folder of images"), split)
    if class_map and not any(Path(place).is_file() for place in (class_map, root / class_map)):
        raise InputError("no such class map", where=class_map, fix="give a text file with one class per line")
    source = _create(root, "no images could be found", name="", root=str(root), search_split=False,
                     class_map=class_map or None, split=split)  # fmt: skip
    pictures = Pictures(source, mode)
    if not class_map and root.is_dir():
        _check_class_folders(root, class_names(pictures) or [])
    return pictures


def _data_dir(data_dir: str | Path | None, what: str) -> Path:
    if data_dir is None or not str(data_dir):
        raise InputError(f"{what} needs --data-dir", fix="--data-dir FOLDER")
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise InputError("no such folder", where=root, fix="check --data-dir")
    if root.is_dir() and not any(root.iterdir()):
        raise InputError("the folder is empty", where=root, fix="check --data-dir")
    return root


def _split_folder(root: Path, split: str) -> Path:
    """The folder or .tar of a split; timm would fall back to `root`, and so mix the splits."""
    if split in ("", "."):
        return root
    if root.is_file():
        raise InputError(
            "this is a file", where=root,
            fix="give the folder with the splits; for a single .tar name '.' as the split",
        )  # fmt: skip
    synonyms = next((names for names in (TRAIN_NAMES, EVAL_NAMES) if split in names), ())
    for name in (split, *synonyms):
        for place in (root / name, root / f"{name}.tar"):
            if place.exists():
                return place
    there = sorted(each.name for each in root.iterdir() if not each.name.startswith("."))
    raise InputError(
        f"no split {split!r} in this folder; there is: {_some(there)}", where=root,
        fix="name a split that is there (--train-split, --val-split), or '.' for the folder itself",
    )  # fmt: skip


def _check_class_folders(root: Path, found: list[str]) -> None:
    if "" in found:
        raise InputError(
            "images lie directly in this folder; their class is not known", where=root,
            fix="put the images of each class into a folder of its own",
        )  # fmt: skip
    kinds = get_img_extensions(as_set=True)
    empty = [
        each.name
        for each in sorted(root.iterdir())
        if each.is_dir() and not each.name.startswith((".", "__")) and each.name not in found
        and not any(Path(file).suffix.lower() in kinds for _, _, names in os.walk(each) for file in names)
    ]  # fmt: skip
    if empty:
        raise InputError(
            f"no images in the class folder{'s' * (len(empty) > 1)} {_some(empty)}", where=root,
            fix=f"fill or remove them; images are {', '.join(sorted(kinds))}",
        )  # fmt: skip


def _open_torchvision(name: str, data_dir: str | Path | None, split: str, download: bool, mode: str) -> Pictures:
    name = {"inat": "inaturalist", "folder": "image_folder"}.get(name, name)
    if name not in TORCHVISION:
        raise UsageError(f"no torchvision dataset called {name!r}", fix=suggest(name, TORCHVISION))
    if name == "image_folder":
        root = _split_folder(_data_dir(data_dir, f"torch/{name}"), split)
        arguments = {"name": "torch/image_folder", "root": str(root), "search_split": False}
        return Pictures(_create(root, "no images could be found", **arguments), mode)
    if data_dir is None or not str(data_dir):
        raise InputError(f"torch/{name} needs --data-dir", fix="--data-dir FOLDER, to find or to keep it")
    two = name.startswith("cifar") or "mnist" in name
    if two and split not in (*TRAIN_NAMES, *EVAL_NAMES, "test"):
        raise UsageError(f"torch/{name} has no split {split!r}", fix="use train or validation")
    source = _create(
        data_dir, f"torch/{name} could not be opened", fix="is it there? --dataset-download fetches it",
        name=f"torch/{name}", root=str(data_dir), split=split, download=download,
    )  # fmt: skip
    return Pictures(source, mode)


def _open_hub(
    name: str, prefix: str, data_dir: str | Path | None, split: str, download: bool, class_map: str, mode: str
) -> Dataset:
    package = PACKAGES[prefix]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{name} needs the package {package!r}", fix=f"pip install {package}")
    if prefix == "wds":
        _data_dir(data_dir, name)
    source = _create(
        name, "the dataset could not be opened", fix="check its name, the split, and the network",
        name=name, root=None if data_dir is None else str(data_dir), split=split, download=download,
        class_map=class_map or None, input_img_mode=mode, is_training=split in TRAIN_NAMES,
    )  # fmt: skip
    return Pictures(source, mode) if prefix == "hfds" else source


def _create(where: object, what: str, *, fix: str = "check --data-dir", **arguments: Any) -> Any:
    """timm's factory; the libraries below it raise all sorts, and print where only results belong."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return create_dataset(**arguments)
    except NulsqError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {first_line(error)}", where=where, fix=fix) from error


def _some(names: Iterable[str], shown: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
