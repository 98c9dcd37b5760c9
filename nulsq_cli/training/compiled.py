"""A whole model compiled by torch: one graph of layers and quantizers, the fast way on GPUs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)


def compile_whole(model: nn.Module, *, backend: str = "inductor") -> None:
    """From now on calls of the model run compiled; its parameters and their names stay as they are.

    Where it cannot be compiled (no compiler, an operation that is not known) that is said once, and the model computes
    as before. Copies of the model are not compiled.

    Args:
        model: in place; compiled when it is first called, anew for training and for evaluation.
        backend: of `torch.compile`.
    """
    plain = model._call_impl
    compiled = torch.compile(plain, backend=backend)

    def call(*args: Any, **named: Any) -> Any:
        try:
            return compiled(*args, **named)
        except Exception as reason:  # torch raises many types here, of which none is public
            log.warning("the model runs uncompiled: %s", " ".join(str(reason).split("\n")[:2]) or type(reason).__name__)
            model._compiled_call_impl = None
            return plain(*args, **named)

    model._compiled_call_impl = call
