import mmap
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from nulsq_cli import cli
from nulsq_cli.training import data
from nulsq_cli.training.workers import ending_byte, start_worker


def wait_as_worker(ready, ending):
    start_worker(0, ending)
    ready.set()
    while True:
        signal.pause()


def test_a_worker_outlives_signals_to_the_group_until_its_main_process_ends():
    handled = []
    previous = signal.signal(signal.SIGTERM, lambda *_: handled.append(1))  # what a training loop installs
    try:
        fork = multiprocessing.get_context("fork")
        ready, ending = fork.Event(), mmap.mmap(-1, 1)
        worker = fork.Process(target=wait_as_worker, args=(ready, ending), daemon=True)
        worker.start()
        assert ready.wait(30)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
            worker.join(timeout=0.1)
            assert worker.is_alive()
        ending[0] = 1
        worker.terminate()
        worker.join(timeout=30)
        assert worker.exitcode == 0 and not handled
    finally:
        signal.signal(signal.SIGTERM, previous)


def check_the_byte(before, after):
    assert ending_byte(os.getpid())[0] == before
    multiprocessing.util._exit_function()  # what every process does before it ends its children
    os._exit(0 if ending_byte(os.getpid())[0] == after else 1)


def test_the_byte_is_written_when_the_process_ends():
    process = multiprocessing.get_context("fork").Process(target=check_the_byte, args=(0, 1))
    process.start()
    process.join(timeout=30)
    assert process.exitcode == 0
    assert ending_byte(os.getpid())[0] == 0


def test_torch_says_nothing_about_the_number_of_loaders(recwarn):
    data.eval_loader(Deadly(False), lambda image: image, batch_size=1, workers=1000)
    assert not recwarn.list


class Deadly(Dataset):
    """The loader process that is given the third image dies of it; it may be late to be seen dead."""

    def __init__(self, late):
        self.late = late

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            if self.late:  # as the kernel ends a process that has much to give back: connections are closed first
                time.sleep(0.5)
                os.closerange(3, 1024)
                time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1), 0


@pytest.mark.parametrize("late", [False, True])
def test_a_loader_that_dies_is_a_sentence_and_exit_code_3(late, monkeypatch, capsys):
    if late:  # read the first image when its process can no longer hand it over
        start = DataLoader._get_iterator
        monkeypatch.setattr(DataLoader, "_get_iterator", lambda self: (start(self), time.sleep(1))[0])
    with pytest.raises(RuntimeError) as error:
        list(data.eval_loader(Deadly(late), lambda image: image, batch_size=1, workers=2))
    assert cli._end(error.value) == 3
    said = capsys.readouterr().err
    assert said.startswith("error: the images cannot be read any more: DataLoader worker") and said.count("\n") == 2
