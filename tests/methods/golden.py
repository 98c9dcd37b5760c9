"""Vectors that the methods' own public code computed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from nulsq_cli.methods.base import Quantizer


def load(shared: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one case."""
    return load_file(shared / "golden" / f"{name}.safetensors")


def check(quantizer: Quantizer, case: dict[str, Tensor], parameters: dict[str, str], rectify: bool = False) -> None:
    """Output and all gradients, entry by entry.

    Args:
        quantizer: ours, in training mode.
        case: as from `load`.
        parameters: our name of each learned parameter -> the file's.
        rectify: put a ReLU before the quantizer, as the authors' code does.
    """
    own = dict(quantizer.named_parameters())
    assert set(own) == set(parameters)
    for name, theirs in parameters.items():
        own[name].data.copy_(case[theirs].view_as(own[name]))
    x = case["x"].clone().requires_grad_()
    y = quantizer(x.relu() if rectify else x)
    torch.testing.assert_close(y.detach(), case["y"], rtol=0, atol=2e-7 * float(case["y"].abs().max()))
    y.backward(case["grad_output"])
    torch.testing.assert_close(x.grad, case["grad_x"], rtol=5e-7, atol=1e-7)
    for name, theirs in parameters.items():
        wanted = case[f"grad_{theirs}"].view_as(own[name])
        torch.testing.assert_close(own[name].grad, wanted, rtol=2e-5, atol=2e-5)
