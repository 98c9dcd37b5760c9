"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("nulsq", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("nulsq")
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real checkpoints; not on a user's machine."""
    folder = Path(os.environ.get("NULSQ_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("the folder of golden vectors is not here (NULSQ_SHARED)")
    return folder
