import io
import json
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.training import datasets
from nulsq_cli.training.data import eval_loader, train_loader
from nulsq_cli.training.datasets import check_outputs, check_same_classes, class_names, open_dataset
from nulsq_cli.training.pictures import Digits


def make(root, layout, suffix=".png"):
    """{split: {class: count}} as small images whose grey value is their number in the class."""
    for split, classes in layout.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(count):
                Image.new("L", (4, 4), k).save(folder / f"{k}{suffix}")
    return root


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "data", {"train": {"cat": 3, "dog": 2}, "val": {"cat": 1, "dog": 1}})


def error_of(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        open_dataset(*args, **kwargs)
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("kind", ["", "folder", "torch/image_folder", "Torch/Image_Folder"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_folders_give_images_and_class_numbers(folder, kind, mode):
    data = open_dataset(kind, folder, "train", input_img_mode=mode)
    found = [(np.array(image).max(), image.mode, label) for image, label in data]
    assert found == [(k, mode, label) for label, count in ((0, 3), (1, 2)) for k in range(count)]
    assert class_names(data) == ["cat", "dog"]
    assert data.filename(3) == str(folder / "train" / "dog" / "0.png")


@pytest.mark.parametrize("split", ["val", "valid", "validation", "eval", "evaluation"])
def test_split_names_have_synonyms(folder, split):
    assert len(open_dataset("", folder, split)) == 2
    assert len(open_dataset("", folder, "training")) == 5


def test_a_folder_may_itself_be_the_split(folder):
    assert len(open_dataset("", folder / "val", ".")) == 2


def test_splits_may_be_tar_files(folder, tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(folder / "train", arcname=".")
    data = open_dataset("", tmp_path, "train", input_img_mode="L")
    assert [(np.array(image).max(), label) for image, label in data] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert class_names(data) == ["cat", "dog"]
    assert len(open_dataset("", tmp_path / "train.tar", ".")) == 5
    assert "this is a file" in error_of(InputError, "", tmp_path / "train.tar", "val")


def test_missing_and_empty_folders_are_named(tmp_path):
    assert "needs --data-dir" in error_of(InputError, "", None, "train")
    assert "needs --data-dir" in error_of(InputError, "", "", "train")
    assert f"{tmp_path / 'absent'}: no such folder" in error_of(InputError, "", tmp_path / "absent", "train")
    assert f"{tmp_path}: the folder is empty" in error_of(InputError, "", tmp_path, "train")
    (tmp_path / "train").mkdir()
    assert "no images" in error_of(InputError, "", tmp_path, "train")


def test_a_missing_split_is_not_replaced_by_the_folder_around_it(folder):
    (folder / "val").rename(folder / "test")
    text = error_of(InputError, "", folder, "validation")
    assert "no split 'validation'" in text and "there is: test, train" in text and "--val-split" in text
    assert len(open_dataset("", folder, "test")) == 2


def test_empty_class_folders_are_named(folder):
    (folder / "train" / "cow").mkdir()
    (folder / "train" / "cow" / "notes.txt").write_text("none yet")
    (folder / "train" / ".cache").mkdir()
    text = error_of(InputError, "", folder, "train")
    assert "no images in the class folder cow" in text and str(folder / "train") in text
    (folder / "train" / "ape").mkdir()
    assert "class folders ape, cow" in error_of(InputError, "", folder, "train")


def test_images_without_a_class_folder_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "train" / "0.png")
    assert "directly in this folder" in error_of(InputError, "", tmp_path, "train")


def test_a_class_map_fixes_the_numbering(folder, tmp_path):
    (tmp_path / "map.txt").write_text("dog\ncow\ncat\n")
    data = open_dataset("", folder, "train", class_map=str(tmp_path / "map.txt"))
    assert [label for _, label in data] == [2, 2, 2, 0, 0] and class_names(data) == ["dog", "cow", "cat"]
    assert "no such class map" in error_of(InputError, "", folder, "train", class_map="absent.txt")
    (tmp_path / "map.txt").write_text("wolf\n")
    assert "no images" in error_of(InputError, "", folder, "train", class_map=str(tmp_path / "map.txt"))


def test_splits_whose_classes_differ_are_refused(folder):
    train = open_dataset("", folder, "train")
    check_same_classes(train, open_dataset("", folder, "val"))
    check_same_classes(Subset(train, [0]), Subset(train, [1]))
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with pytest.raises(InputError) as caught:
        check_same_classes(Subset(train, [0]), open_dataset("", folder, "val"))
    assert "only in training: cat; only in validation: cow" in str(caught.value)


def test_more_classes_than_outputs_are_refused_and_fewer_are_remarked(folder):
    train = open_dataset("", folder, "train")
    assert check_outputs(train, 2) is None
    assert "2 classes, the model 1000 outputs: 'cat' is taken for the first" in check_outputs(train, 1000)
    with pytest.raises(InputError, match="2 classes, the model 1 outputs"):
        check_outputs(train, 1)


@pytest.mark.parametrize("kind", ["", "torch/image_folder"])
@pytest.mark.parametrize("content", [b"", b"this is no image", None])
def test_an_unreadable_image_is_named_not_skipped(folder, kind, content):
    bad = folder / "train" / "cat" / "1.png"
    bad.write_bytes(bad.read_bytes()[:-30] if content is None else content)
    data = open_dataset(kind, folder, "train")
    assert data[0][1] == 0 and data[2][1] == 0
    with pytest.raises(InputError) as caught:
        data[1]
    assert str(caught.value).startswith(f"{bad}: cannot read this image")


def test_a_file_that_vanished_is_named(folder):
    data = open_dataset("", folder, "train")
    os.remove(data.filename(4))
    with pytest.raises(InputError, match="4.png|1.png"):
        data[4]


def test_a_truncated_jpeg_is_refused(tmp_path):
    make(tmp_path, {"train": {"cat": 1}}, suffix=".jpg")
    file = tmp_path / "train" / "cat" / "0.jpg"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InputError, match="0.jpg"):
        open_dataset("", tmp_path, "train")[0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch/cifer10", "did you mean 'cifar10'?"),
        ("torch/emnist", "no torchvision dataset called 'emnist'"),
        ("nulsq/digit", "did you mean 'nulsq/digits'?"),
        ("wombat/x", "no dataset called 'wombat/x'"),
        ("hfds/", "no dataset called 'hfds/'"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(tmp_path, name, words):
    assert words in error_of(UsageError, name, tmp_path, "train")


def test_torchvision_data_that_are_not_there_are_an_input_error(tmp_path):
    assert "torch/cifar10 needs --data-dir" in error_of(InputError, "torch/cifar10", None, "train")
    text = error_of(InputError, "torch/cifar10", tmp_path, "train")
    assert "could not be opened" in text and "--dataset-download" in text and str(tmp_path) in text
    assert "no split 'trian'" in error_of(UsageError, "torch/cifar10", tmp_path, "trian")


def test_torchvision_images_are_brought_to_the_models_mode(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 3), ("t10k", 2)):
        head = (count).to_bytes(4, "big")
        size = (28).to_bytes(4, "big")
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + head + size + size + bytes(784 * count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + head + bytes(range(count)))
    for mode in ("L", "RGB"):
        data = open_dataset("torch/mnist", tmp_path, "validation", input_img_mode=mode)
        assert [(image.mode, label) for image, label in data] == [(mode, 0), (mode, 1)]
    assert len(open_dataset("torch/mnist", tmp_path, "train")) == 3 and len(class_names(data)) == 10


def test_cifar_10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    """Its files are known by their checksums; these are small ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    place = tmp_path / "cifar-10-batches-py"
    place.mkdir()
    for number, name in enumerate((*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")):
        pixels = np.full((2, 3072), number, dtype=np.uint8)
        (place / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number, 9]}))
    (place / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {k}" for k in range(10)]}))
    train, val = (open_dataset("torch/cifar10", tmp_path, split) for split in ("train", "validation"))
    assert [(np.array(image).max(), label) for image, label in train] == [(k, x) for k in range(5) for x in (k, 9)]
    assert [(image.size, image.mode, label) for image, label in val] == [((32, 32), "RGB", 5), ((32, 32), "RGB", 9)]
    assert class_names(val)[3] == "class 3"


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_changed_cifar_file_is_refused_before_it_is_unpickled(tmp_path, monkeypatch):
    place, sprung = tmp_path / "cifar-10-batches-py", tmp_path / "sprung"
    place.mkdir()
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"):
        (place / name).write_bytes(pickle.dumps(Trap(sprung)))
    text = error_of(InputError, "torch/cifar10", tmp_path, "train")
    assert "could not be opened" in text and InputError.exit_code == 3 and not sprung.exists()
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    error_of(InputError, "torch/cifar10", tmp_path, "train")
    assert sprung.exists(), "the trap does not work: the test says nothing"


def test_a_hub_dataset_that_lies_here_is_read(folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for split, count in (("train", 5), ("validation", 2)):
        data = open_dataset(f"hfds/{folder}", tmp_path / "cache", split, input_img_mode="L")
        assert len(data) == count and class_names(data) == ["cat", "dog"]
        found = sorted((label, int(np.array(image).max()), image.mode) for image, label in data)
        assert found == [(label, k, "L") for label, n in ((0, count - count // 2), (1, count // 2)) for k in range(n)]
    assert "the dataset could not be opened" in error_of(InputError, f"hfds/{folder}", tmp_path / "cache", "tast")


def shards(root, count=3, each=4):
    """Tar files of small images whose grey value is their number, and what timm wants to know of them."""
    for k in range(count):
        with tarfile.open(root / f"train-{k:02}.tar", "w") as tar:
            for j in range(k * each, (k + 1) * each):
                png = io.BytesIO()
                Image.new("L", (4, 4), j).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("cls", str(j % 2).encode())):
                    entry = tarfile.TarInfo(f"{j:04}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    names = [f"train-{k:02}.tar" for k in range(count)]
    split = {"name": "train", "num_samples": count * each, "filenames": names, "shard_lengths": [each] * count}
    (root / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    return root


def test_shards_are_trained_and_evaluated_over_every_image(tmp_path):
    pytest.importorskip("webdataset")
    data = open_dataset("wds/small", shards(tmp_path), "train", input_img_mode="L")
    values = lambda image: torch.tensor([float(np.array(image).max())])  # noqa: E731
    loader = train_loader(data, values, batch_size=4, seed=0)
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen = [(int(x), int(y)) for images, labels in loader for x, y in zip(images[:, 0], labels, strict=True)]
        assert sorted(seen) == [(j, j % 2) for j in range(12)]
    still = open_dataset("wds/small", tmp_path, "train-{00..02}.tar|12", input_img_mode="L")  # no shuffling but in training
    read = [int(x) for images, _ in eval_loader(still, values, batch_size=5) for x in images[:, 0]]
    assert sorted(read) == list(range(12))
    assert "the dataset could not be opened" in error_of(InputError, "wds/small", tmp_path, "validation")


@pytest.mark.parametrize(("name", "package"), [("hfds/x/y", "datasets"), ("tfds/x", "tensorflow_datasets")])
def test_a_missing_package_is_named(monkeypatch, capsys, name, package):
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda _: None)
    text = error_of(InputError, name, None, "train")
    assert f"needs the package '{package}'" in text and "pip install" in text
    assert capsys.readouterr().out == ""


def test_a_hub_that_cannot_be_reached_is_an_input_error_and_prints_nothing(monkeypatch, capsys):
    def fail(**arguments):
        print("noise")
        raise ConnectionError("Couldn't reach the hub\nwith many more lines")

    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda _: sys)
    monkeypatch.setattr(datasets, "create_dataset", fail)
    text = error_of(InputError, "hfds/x/y", None, "train")
    assert "hfds/x/y: the dataset could not be opened: Couldn't reach the hub\n  fix" in text
    assert capsys.readouterr().out == ""


def test_the_digits_are_here_and_split_by_position():
    train, val = (open_dataset("nulsq/digits", None, split, input_img_mode="L") for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    assert {label for _, label in val} == set(range(10))
    image, label = train[0]
    assert (image.size, image.mode, label) == ((8, 8), "L", 0)
    assert np.array(image).tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]  # 0, 0, 5, 13, 9, 1, 0, 0 of 16
    assert max(np.array(image).max() for image, _ in val) == 255
    assert class_names(train) == [str(digit) for digit in range(10)]
    assert open_dataset("NULSQ/Digits", None, "train")[0][0].mode == "RGB"
    assert "no split 'trian'" in error_of(UsageError, "nulsq/digits", None, "trian")


def test_the_digits_are_those_of_scikit_learn():
    source = pytest.importorskip("sklearn.datasets").load_digits()
    every = [*Digits("train"), *Digits("validation")]
    assert np.array_equal([label for _, label in every], source.target)
    assert np.array_equal([np.array(image) for image, _ in every], np.round(source.images * 255 / 16))


def test_the_digits_say_where_they_come_from():
    from importlib.resources import files

    path = files("nulsq_cli").joinpath("assets", "digits.npz")
    with np.load(str(path), allow_pickle=False) as data:
        said = " ".join(data["source"].tolist())
    assert all(word in said for word in ("Optical Recognition of Handwritten Digits", "scikit-learn", "CC BY 4.0"))
    assert len(path.read_bytes()) < 200_000 and (path.parent / "digits_resnet8.safetensors").stat().st_size < 500_000
