"""A full disk, a read-only one and a folder that vanishes, under a run that really is a process."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nulsq_cli import files
from nulsq_cli.errors import InputError
from nulsq_cli.training import checkpoint
from tests.processes import Process

SHORT = ["quickstart", "schedule.epochs=2", "data.hold_out=0.5", "data.batch_size=128", "quant.calibration.samples=64",
         "bn.reestimate_samples=64", "checkpoint.recovery_steps=2", "engine.device=cpu"]  # fmt: skip


def start(folder: Path) -> Process:
    return Process("finetune", *SHORT, "-o", folder, "--resume", "auto", "-q")


def one_sentence(process: Process, words: str) -> None:
    done = process.end()
    said = done.stderr
    assert done.returncode == 3, said
    assert said.startswith("error: ") and words in said and "fix: " in said
    assert said.count("\n") == 2 and "Traceback" not in said


def whole_checkpoints(folder: Path) -> list[str]:
    """Names of the checkpoints that are there; all of them can be read, and no half file lies beside them."""
    place = folder / "checkpoints"
    paths = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    for path in paths:
        checkpoint.load(path)
    return [path.stem for path in paths]


def go_on(folder: Path, whole: Path) -> None:
    done = start(folder).end()
    assert done.returncode == 0, done.stderr
    assert (folder / "export/model.safetensors").read_bytes() == (whole / "export/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk") / "whole"
    done = start(folder).end()
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, 64 kB to begin with."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not shutil.which("mount") or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a file system can be mounted here only by root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> bool:
    return not subprocess.run(["mount", "-o", f"remount,{options}", str(place)], capture_output=True).returncode


@pytest.mark.parametrize(
    ("room", "kept"),
    [("200k", []), ("1000k", ["last"]), ("1700k", ["best", "last", "recovery"]), ("2400k", ["best", "last", "previous"])],
)
def test_a_full_disk_is_one_sentence_and_more_room_is_all_it_needs(small_disk, whole, room, kept):
    assert remount(small_disk, f"size={room}")
    folder = small_disk / "run"
    process = start(folder)
    one_sentence(process, "cannot be written: No space left on device")
    assert set(kept) <= set(whole_checkpoints(folder))
    assert not list(small_disk.rglob("*.tmp"))
    assert remount(small_disk, "size=64m")
    go_on(folder, whole)


def test_a_disk_that_becomes_read_only_is_one_sentence(small_disk, whole):
    assert remount(small_disk, "size=64m")
    folder = small_disk / "run"
    process = start(folder)
    process.until(folder / "checkpoints/recovery.safetensors")
    while not remount(small_disk, "ro"):  # busy while a file is open for writing
        assert process.alive()
    one_sentence(process, "cannot be written: Read-only file system")
    assert "last" in whole_checkpoints(folder)
    assert remount(small_disk, "rw")
    go_on(folder, whole)


def test_a_folder_that_vanishes_is_one_sentence_and_is_not_made_again(tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    process.until(folder / "checkpoints/recovery.safetensors")
    folder.rename(tmp_path / "away")
    one_sentence(process, "cannot be written: its folder is gone")
    assert not folder.exists() and "last" in whole_checkpoints(tmp_path / "away")


def test_a_place_that_cannot_be_written_is_refused_at_the_door(tmp_path):
    (tmp_path / "file").write_text("in the way")
    one_sentence(start(tmp_path / "file" / "run"), "cannot be written: Not a directory")


def test_the_writers_name_the_file_and_leave_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"a.txt: cannot be written: No space left") as caught:
        files.write_atomically(path, fail)
    assert caught.value.exit_code == 3 and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="its folder is gone"):
        files.write_text(tmp_path / "x/y/z.txt", "new", parents=False)
    with pytest.raises(InputError, match="its folder is gone"):
        files.append_line(tmp_path / "x/log", "line")
    files.write_text(tmp_path / "x/y/z.txt", "new")
    files.write_atomically(path, lambda temporary: temporary.write_text("new"), keep=tmp_path / "b.txt")
    assert (path.read_text(), (tmp_path / "b.txt").read_text()) == ("new", "old")
