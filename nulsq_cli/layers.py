"""Layers that own two quantizers, and the table of the layer types that have one. Exact types only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import Conv2dSame
from timm.layers import Linear as TimmLinear
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from nulsq_cli.methods.base import Quantizer
from nulsq_cli.ops import codebook
from nulsq_cli.ops.remake import checkpointed, instead_of_keeping
from nulsq_cli.ops.together import fits, quantize_together
from nulsq_cli.values import Codebook


class QuantLayer(nn.Module):
    """What all quantized layers share. A quantizer that is None leaves its side in float.

    The parameters of the float layer are taken over, not copied, under their own names, so that a
    state dict keeps the float model's keys.
    """

    weight: nn.Parameter
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    weight_freezer: nn.Module | None

    _still: Tensor | None = None
    """The quantized weight while nothing changes (`standing_still`)."""

    def _adopt(self, layer: nn.Module, weights: Quantizer | None, inputs: Quantizer | None) -> None:
        self.weight, self.bias = layer.weight, layer.bias
        self.weight_quantizer, self.input_quantizer = weights, inputs
        self.weight_freezer = None  # the stabilizer `freezing` puts one here
        self.train(layer.training)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's arithmetic on what it is given."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """The layer on its quantized input and weight."""
        if isinstance(input, fx.Proxy):
            return in_trace(self, input)
        x, weight = self.quantized_input(input), self.quantized_weight()
        if not torch.is_grad_enabled():
            return self.compute(x, weight)
        with instead_of_keeping(x, weight):
            return self.compute(x, weight)

    def quantized_weight(self) -> Tensor:
        """The weight that the layer computes with."""
        if not torch.compiler.is_compiling():
            if self._still is not None:
                return self._still
            if (ready := self.__dict__.pop("_ready", None)) is not None and not checkpointed():
                return ready
        quantizer = self.weight_quantizer
        if quantizer is None:
            return self.weight
        if self.weight_freezer is None:
            return quantizer(self.weight)
        weight = self.weight_freezer.still(self.weight)
        exact = weight.float()
        # Before the quantizer runs: one that fits its table in training changes it.
        levels = quantizer.trained_levels(exact) if quantizer.training else quantizer.codebook(exact).levels
        return self.weight_freezer(quantizer(weight), levels)

    @torch.no_grad()
    def weight_codes(self) -> tuple[Codebook, Tensor]:
        """The weight as it is packed: its tables, and a uint8 code for every entry."""
        weight = self.weight.float()
        tables = self.weight_quantizer.codebook(weight)
        codes = codebook.encode(weight, tables.thresholds)
        return tables, codes if self.weight_freezer is None else self.weight_freezer.codes(codes)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input that the layer computes with."""
        if self.input_quantizer is None:
            return x
        ready = _taken(x, self)
        return self.input_quantizer(x) if ready is None else ready


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` on quantized weights and inputs. Padding comes after quantization: exact zeros, in any table or not."""

    def __init__(self, layer: nn.Conv2d, weights: Quantizer | None, inputs: Quantizer | None) -> None:
        with torch.device("meta"):
            nn.Conv2d.__init__(
                self, layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                layer.padding, layer.dilation, layer.groups, layer.bias is not None, layer.padding_mode,
            )  # fmt: skip
        self._adopt(layer, weights, inputs)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, H', W')."""
        return self._conv_forward(x, weight, self.bias)


class QuantConv2dSame(QuantConv2d):
    """timm's TensorFlow-padded convolution, on quantized weights and inputs."""

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """(N, C, H, W) to (N, O, ceil(H / stride), ceil(W / stride))."""
        return conv2d_same(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` on quantized weights and inputs."""

    def __init__(self, layer: nn.Linear, weights: Quantizer | None, inputs: Quantizer | None) -> None:
        with torch.device("meta"):
            nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None)
        self._adopt(layer, weights, inputs)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, weight, self.bias)


# Each writes a new tensor for the gradient of its input and of its weight, which the quantizers then mask in place.
LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv2d: QuantConv2d,
    Conv2dSame: QuantConv2dSame,
    nn.Linear: QuantLinear,
    TimmLinear: QuantLinear,  # differs from nn.Linear under TorchScript alone
}


def on_input(module: nn.Module, see: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `see` called with what the module is called with, by position or by name."""
    return module.register_forward_pre_hook(lambda _, args, named: see(*args, *named.values()), with_kwargs=True)


def in_trace(module: nn.Module, x: fx.Proxy) -> fx.Proxy:
    """What a symbolic trace writes down for a module of ours: like one of torch's own it is called as a whole."""
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


def prepare(x: Tensor, quantized: Tensor, reader: QuantLayer) -> Tensor:
    """x, with a note for the layer that will read it: that its quantizer has already made this of it."""
    x._nulsq_ready = reader, quantized, _version(x), torch.is_grad_enabled()  # type: ignore[attr-defined]
    return x


def _taken(x: Tensor, reader: QuantLayer) -> Tensor | None:
    """What was prepared from x for this layer; once, for the note would keep it alive as long as x."""
    ready = None if torch.compiler.is_compiling() else getattr(x, "_nulsq_ready", None)
    if ready is None or ready[0] is not reader:
        return None
    del x._nulsq_ready  # type: ignore[attr-defined]
    _, quantized, version, recorded = ready
    # Made without gradients, as in checkpointing with reentrance, it would keep those of what is before it from ever coming.
    usable = version == _version(x) and (recorded or not torch.is_grad_enabled()) and not checkpointed()
    return quantized if usable else None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


@contextmanager
def weights_together(model: nn.Module) -> Iterator[None]:
    """Inside, one forward pass in training takes weights that were quantized as one operation, with the same bits.

    Their gradients then come at the end of the backward pass, all at once. What has its own way (a method of several
    operations, frozen weights, somebody watching a quantizer, a compiled model) keeps it.
    """
    layers, wanted = [], []
    plain = torch.compiler.is_compiling() or getattr(model, "_compiled_call_impl", None) is not None or checkpointed()
    if torch.is_grad_enabled() and not plain:
        for layer in quant_layers(model).values():
            quantizer = layer.weight_quantizer
            if quantizer is None or layer.weight_freezer is not None or not quantizer.training or quantizer.hooked:
                continue
            operation = quantizer.operation(layer.weight)
            learned = operation is not None and (layer.weight.requires_grad or operation[0].requires_grad)
            if learned and fits(layer.weight, *operation):
                layers.append(layer)
                wanted.append((layer.weight, *operation))
    try:
        if layers:
            for layer, ready in zip(layers, quantize_together(wanted), strict=True):
                layer.__dict__["_ready"] = ready
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_ready", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has its own mode back."""
    modes = {m: m.training for m in model.modules()}
    try:
        if any(modes.values()):
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            if module.training is not training:  # setting an attribute of a module is slow
                module.training = training


@contextmanager
def standing_still(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter of the model changes: in evaluation mode its tables and quantized weights are ready.

    They are computed at the start, one after the other: between two layers each would cost several times as much.
    """
    layers = quant_layers(model).values()
    try:
        with torch.no_grad():
            for layer in layers:
                weights, inputs = layer.weight_quantizer, layer.input_quantizer
                if weights is not None and not weights.training:
                    layer.__dict__["_still"] = layer.quantized_weight()
                if inputs is not None and not inputs.training:
                    inputs.kept = inputs.tables(layer.weight.new_zeros(1))
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_still", None)
            if layer.input_quantizer is not None:
                layer.input_quantizer.kept = None


@contextmanager
def without(module: nn.Module, *names: str) -> Iterator[None]:
    """Some parameters or children of a module are None inside, and back afterwards."""
    kept = {name: getattr(module, name) for name in names}
    try:
        for name in names:
            setattr(module, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by module path, in the model's own order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a model by module path."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Quantizer)}
