from __future__ import annotations

import pytest
import torch

from nulsq_cli import jobs, recipe
from nulsq_cli.cli.show import Show
from nulsq_cli.models import create_float_model
from nulsq_cli.training.threads import settle_threads, threads_kept


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with threads_kept():
        torch.set_num_threads(2)
        yield


@pytest.mark.parametrize(("side", "batch", "tiny"), [(8, 64, True), (32, 8, True), (8, 1024, False), (32, 128, False)])
def test_the_work_of_a_batch_decides(side, batch, tiny):
    model = create_float_model("resnet8_cifar").train()
    with threads_kept():
        assert settle_threads(model, (3, side, side), batch) is tiny
        assert torch.get_num_threads() == (1 if tiny else 2)
    assert torch.get_num_threads() == 2 and model.training and int(model.bn1.num_batches_tracked) == 0


def test_the_users_number_of_threads_is_obeyed(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not settle_threads(create_float_model("resnet8_cifar"), (3, 8, 8), 1)
    assert torch.get_num_threads() == 2


def test_a_tiny_run_computes_in_one_thread_and_leaves_torch_as_it_was(tmp_path):
    quick = recipe.load("quickstart", overrides=["schedule.epochs=0", "quant.calibration.samples=64", "bn.reestimate_samples=64"])
    jobs.finetune(quick, tmp_path / "run", resume=None, export_after=False, dry_run=False, min_top1=None, show=Show(quiet=True))
    assert '"threads": 1' in (tmp_path / "run" / "env.json").read_text()
    assert torch.get_num_threads() == 2
