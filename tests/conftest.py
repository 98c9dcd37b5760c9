"""What several tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is loaded, here and in every process that a test starts: pytest-xdist runs two tests at a time, and two
# processes with two threads each on two cores take several times as long as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

settings.register_profile("nulsq", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("nulsq")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden vectors and real checkpoints; not on a user's machine."""
    folder = Path(os.environ.get("NULSQ_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip("the folder of golden vectors is not here (NULSQ_SHARED)")
    return folder


@pytest.fixture(scope="session")
def loops() -> None:
    """The C++ loops, which need a compiler."""
    from nulsq_cli.ops import native

    if native.library() is None:
        pytest.skip("no C++ compiler on this machine")


# Two inference runtimes and torch keep threads of their own; together they have ended a test worker minutes later. What
# uses them runs in processes of its own, which tests/test_apart.py starts.
APART = ("exporters", "jobs")
collect_ignore = [] if os.environ.get("NULSQ_TESTS_APART") else list(APART)
