"""The short form of `tools/chaos.py`: three kills, and the run is as if nothing had happened."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[1] / "tools/chaos.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("threads", ["1", "2"])
def test_three_kills_change_nothing(tmp_path, threads):
    command = [sys.executable, TOOL, "--kills", "3", "--most", "2", "--aimed", "0.7", "--seed", "5", "--folder", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}  # waiting must not keep a core busy
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 kills in") and done.stdout.endswith("0 did not\n")
    assert list(tmp_path.iterdir()) == []
