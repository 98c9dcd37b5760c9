"""What a bug report needs to say about the machine."""

from __future__ import annotations

import platform
import shlex
import sys
from typing import Any

import timm
import torch
import torchvision

from nulsq_cli.version import __version__


def environment() -> dict[str, Any]:
    """Versions, devices and the command line, as stored in a run."""
    return {
        "nulsq": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "timm": timm.__version__, "platform": platform.platform(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(), "command": shlex.join(sys.argv),
    }  # fmt: skip
