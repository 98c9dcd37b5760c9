"""The authors' released quantizers, from a checkout that the user names, behind our calls. Nothing of it is copied here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli.layers import QuantConv2d, quant_layers


class Reference:
    """A checkout of github.com/DensoITLab/nuLSQ."""

    def __init__(self, path: str) -> None:
        if not (Path(path) / "src" / "module_quantization.py").is_file():
            raise SystemExit(f"error: {path}: is no checkout of DensoITLab/nuLSQ")
        sys.path.insert(0, str(Path(path).resolve()))
        self.code = importlib.import_module("src.module_quantization")

    def quantizer(self, op: str, bits: int, parameters: Tensor) -> tuple[Any, Tensor]:
        """A quantizer of activations, or for `signed levels` of weights, and its parameter.

        Args:
            op: `levels`, `signed levels` or `grid`.
            bits: 2 to 4.
            parameters: the gaps, from zero outwards on each side, negative ones first; or the step.
        """
        kind = {"levels": self.code.Positive_nuLSQ_quantizer, "signed levels": self.code.Symmetric_nuLSQ_quantizer,
                "grid": self.code.LSQ_quantizer}[op]  # fmt: skip
        role = "weight" if op == "signed levels" else "activation"
        owner = SimpleNamespace(first_layer=False, x_Qparms={}, w_Qparms={}, register_buffer=lambda *_: None)
        own = kind(owner, bits, role)
        table = owner.w_Qparms if role == "weight" else owner.x_Qparms
        table["scale"].data = parameters.clone()
        ends = (owner.w_Qn, owner.w_Qp) if role == "weight" else (owner.x_Qn, owner.x_Qp)
        return lambda x: own(x, table, *ends, x.numel(), "none"), table["scale"]

    def model(self, ours: nn.Module, method: str) -> nn.Module:
        """Their layers in place of ours, with the same weights and steps; the first and the last layer become float.

        Args:
            ours: a converted model, its steps started; it is changed.
            method: `lsq`, `nulsq-a` or `nulsq-wa`.
        """
        c = self.code
        inputs = c.LSQ_quantizer if method == "lsq" else c.Positive_nuLSQ_quantizer
        weights = c.Symmetric_nuLSQ_quantizer if method == "nulsq-wa" else c.LSQ_quantizer
        for name, layer in quant_layers(ours).items():
            is_conv = isinstance(layer, QuantConv2d)
            bits = layer.weight_quantizer.spec.bits
            if not is_conv or bits == 8:
                layer.weight_quantizer = layer.input_quantizer = None
                continue
            theirs = c.QConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, layer.bias is not None, num_bits=bits, w_grad_scale_mode="none", x_grad_scale_mode="none",
                w_quantizer=weights, x_quantizer=inputs,
            )  # fmt: skip
            theirs.weight, theirs.bias = layer.weight, layer.bias
            theirs.x_scale.data = _scales(layer.input_quantizer)
            theirs.w_scale.data = _scales(layer.weight_quantizer)
            ours.set_submodule(name, theirs)
        return ours


def _scales(quantizer: nn.Module) -> Tensor:
    if hasattr(quantizer, "step"):
        return quantizer.step.detach().clone()
    gaps, negative = quantizer.gaps.detach()[0], quantizer.spec.negative
    return torch.cat((gaps[:negative].flip(0), gaps[negative:]))
