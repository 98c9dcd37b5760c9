"""What a process sets before it starts to compute."""

from __future__ import annotations

import os

import pytest
import torch

from nulsq_cli.training.world import compute_the_same


@pytest.fixture
def afterwards_any():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(("own", "wanted"), [(None, ":4096:8"), (":16:8", ":16:8")])
def test_the_same_every_time_is_asked_of_torch_and_of_cublas(monkeypatch, afterwards_any, own, wanted):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", own or "")
    if own is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    compute_the_same(False)
    assert not torch.are_deterministic_algorithms_enabled() and os.environ.get("CUBLAS_WORKSPACE_CONFIG") == own
    compute_the_same(True)
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == wanted
