"""Post-hoc quantization-aware fine-tuning with learned non-uniform step sizes.

The front door. Everything is loaded on first use, so that `import nulsq_cli` costs nothing:

    quantize(model, batches, bits="3/3")   a float model into a quantized one, started from statistics
    finetune("quickstart", output="run")   what `nulsq finetune` does
    export("run")                          what `nulsq export` does
    load("run/export/model.safetensors")   a packed file, or a run, as a model
"""

from __future__ import annotations

from typing import Any

from nulsq_cli.version import __version__

__all__ = ["__version__", "export", "finetune", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from nulsq_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
