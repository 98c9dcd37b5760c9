"""The tests that use inference runtimes, each folder in a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import APART

HERE = Path(__file__).parent


@pytest.mark.parametrize("folder", APART)
def test_a_folder_of_tests_passes_in_a_process_of_its_own(folder):
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "0", "-q", str(HERE / folder)], cwd=HERE.parent,
                          env={**os.environ, "NULSQ_TESTS_APART": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
