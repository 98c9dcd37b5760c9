"""Raw images as (PIL image, int): those that timm or torchvision find, and the digits inside this package."""

from __future__ import annotations

import contextlib
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from nulsq_cli.errors import InputError, UsageError, first_line

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "eval", "evaluation")
"""Names that mean the same split, as in timm."""
DIGITS = "nulsq/digits"


class Pictures(Dataset):
    """(PIL image, int) of a timm or torchvision dataset; what cannot be read is an error, never left out.

    Args:
        source: timm's ImageDataset (only its reader: timm would go on with the next image), or torchvision's.
        mode: PIL mode of the images.
    """

    def __init__(self, source: Any, mode: str) -> None:
        self.source, self.mode = source, mode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and class number.

        Raises:
            InputError: the file is missing, damaged, or has no class.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            if hasattr(self.source, "reader"):
                stream, label = self.source.reader[index][:2]
                with stream:
                    image = Image.open(stream).convert(self.mode)
            else:
                image, label = self.source[index]
                image = image if image.mode == self.mode else image.convert(self.mode)
        except Exception as error:  # decoders raise whatever they like: OSError, SyntaxError, struct.error ...
            raise InputError(
                f"cannot read this image: {first_line(error)}", where=self.filename(index),
                fix="replace or remove the file",
            ) from None  # fmt: skip
        if label is None or int(label) < 0:
            raise InputError("this image has no class", where=self.filename(index), fix="use a split with labels")
        return image, int(label)

    def filename(self, index: int) -> str:
        """The file of a sample, or its number where there are no files."""
        with contextlib.suppress(Exception):
            if hasattr(self.source, "reader"):
                return str(self.source.reader.filename(index, absolute=True) or f"image {index}")
            return str(self.source.samples[index][0])
        return f"image {index}"


class Digits(Dataset):
    """1797 grey 8x8 images of handwritten digits, as (PIL image, int); no download, no folder.

    The file `assets/digits.npz` was made with `numpy.savez_compressed` from scikit-learn's `load_digits`:
    `images` as they are (uint8, 0..16), `labels`, and `source`. Here 16 becomes white (255). The copy is
    ordered by writer; its last 360 are the validation split, so most of those writers were not trained on.

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits (the test part), UCI Machine
    Learning Repository; CC BY 4.0.
    """

    held_out = 360

    def __init__(self, split: str, mode: str = "L") -> None:
        if split not in (*TRAIN_NAMES, *EVAL_NAMES, "test"):
            raise UsageError(f"{DIGITS} has no split {split!r}", fix="use train or validation")
        with np.load(str(files("nulsq_cli").joinpath("assets", "digits.npz")), allow_pickle=False) as data:
            images, labels = data["images"], data["labels"]
        part = slice(None, -self.held_out) if split in TRAIN_NAMES else slice(-self.held_out, None)
        self.images = np.round(images[part] * (255 / 16)).astype(np.uint8)
        self.labels = labels[part].tolist()
        self.classes, self.mode = [str(digit) for digit in range(10)], mode

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and digit."""
        image = Image.fromarray(self.images[index])
        return (image if self.mode == "L" else image.convert(self.mode)), self.labels[index]
