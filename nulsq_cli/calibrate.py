"""Measure a float model on data, start every quantizer from what was measured, re-estimate BatchNorm.

The images come in chunks whose content does not depend on the batch size of the training, and every
sum is kept per chunk and added in the order of the chunks. So one process and many give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nulsq_cli.convert import Plan, Policy, convert, with_signs
from nulsq_cli.errors import InputError
from nulsq_cli.initializers import measure
from nulsq_cli.layers import QuantLayer, evaluating, on_input, quant_layers, quantizers, without
from nulsq_cli.measuring import Measured, block_sum, in_memory_order, reach
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.values import FLOAT_BITS, TensorStats

Chunks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Starts a pass over the calibration images of this process: (chunk number, normalised images)."""

Passes = tuple[Chunks, int]
"""The start of a pass, and how many chunks it has over all processes."""

Reduce = Callable[[Tensor, str], Tensor]
"""All-reduce over processes, by `sum`, `min` or `max`; in one process it returns its argument."""


def alone(values: Tensor, how: str) -> Tensor:
    """The reduction of a single process."""
    return values


def quantize(model: nn.Module, plan: Plan, policy: Policy, passes: Passes, rules: tuple[str, str], norm_passes: Passes | None,
             reduce: Reduce = alone, before: nn.Module | None = None) -> tuple[Plan, int]:  # fmt: skip
    """Convert a float model in place, start its steps from what was measured, and re-estimate BatchNorm.

    Args:
        model: the float model.
        plan: what becomes of each layer.
        policy: says which inputs are signed by what is measured.
        passes: over the images of the statistics.
        rules: names of the initializers of weights and inputs.
        norm_passes: over the images for BatchNorm; None leaves it.
        reduce: all-reduce over processes.
        before: the same model at other widths: signs are those of the plan, and its quantizers hand on what they may.

    Returns:
        The plan with its signs, and how many BatchNorm layers were re-estimated.

    Raises:
        InputError: an input is not finite; the first such layer is named.
    """
    stats = measure_inputs(model, layers_to_measure(plan), *passes, reduce)
    if before is None:
        plan = with_signs(plan, {name: bool(s.least[0] < 0) for name, s in stats.items()}, policy)
    convert(model, plan)
    initialize(model, stats, *rules)
    match_output_scales(model, *passes, reduce)
    known = {} if before is None else quantizers(before)
    for name, quantizer in quantizers(model).items():
        if name in known:
            quantizer.inherit(known[name])
    return plan, 0 if norm_passes is None else reestimate_batchnorm(model, *norm_passes, reduce)


@torch.no_grad()
def measure_inputs(
    model: nn.Module, names: Iterable[str], chunks: Chunks, count: int, reduce: Reduce = alone
) -> dict[str, TensorStats]:
    """Statistics of the inputs of some layers of a float model, in evaluation mode and in one pass.

    Args:
        model: the float model.
        names: module paths.
        chunks: starts a pass over the images.
        count: how many chunks there are over all processes.
        reduce: all-reduce over processes.

    Raises:
        InputError: an input is not finite; the first such layer is named.
    """
    inputs = {name: Measured(count) for name in names}
    modules = dict(model.named_modules())
    now = 0

    def hook(name: str) -> Callable[..., None]:
        return lambda x: inputs[name].add(now, x)

    hooks = [on_input(modules[name], hook(name)) for name in inputs]
    for now in _drive(model, chunks, hooks):  # noqa: B007 the hooks read it
        pass
    together(inputs, reduce)
    return {name: measured.stats() for name, measured in inputs.items()}


def together(inputs: dict[str, Measured], reduce: Reduce) -> None:
    """Add up over processes what each has measured.

    Raises:
        InputError: an input is not finite; the first such layer is named.
    """
    if not inputs:
        return
    sums = reduce(torch.stack([m.sums for m in inputs.values()]), "sum")
    low = reduce(torch.stack([m.ends[0] for m in inputs.values()]), "min")
    high = reduce(torch.stack([m.ends[1] for m in inputs.values()]), "max")
    for (name, measured), *found in zip(inputs.items(), sums, low, high, strict=True):
        if not all(torch.isfinite(value).all() for value in found):
            raise InputError("its input is not finite on the calibration images", where=name,
                             fix="check the checkpoint and the data's mean and std")  # fmt: skip
        measured.sums, measured.ends = found[0], torch.stack(found[1:])
        measured.widen(reach(*measured.ends.tolist()))
    counts = reduce(torch.stack([m.counts for m in inputs.values()]), "sum")
    for measured, own in zip(inputs.values(), counts, strict=True):
        measured.counts = own


def _drive(model: nn.Module, chunks: Chunks, hooks: Iterable[RemovableHandle]) -> Iterator[int]:
    """Run a model over all chunks in evaluation mode, each number yielded before its chunk; the hooks are removed at the end."""
    device = next(model.parameters()).device
    try:
        with evaluating(model):
            for chunk, images in chunks():
                yield chunk
                model(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def initialize(model: nn.Module, inputs: dict[str, TensorStats], weight_rule: str, input_rule: str) -> None:
    """Start every quantizer of a converted model from statistics.

    Args:
        model: the converted model.
        inputs: statistics of the inputs, by layer.
        weight_rule, input_rule: names of initializers.
    """
    for name, layer in quant_layers(model).items():
        if layer.weight_quantizer is not None:
            stats = measure(layer.weight, layer.weight_quantizer.spec.channels)
            _start(layer.weight_quantizer, stats, weight_rule, layer.weight.float())
        if (quantizer := layer.input_quantizer) is not None:
            still = any(not p.requires_grad for p in quantizer.parameters())  # then nothing mends a start that is not the best
            _start(quantizer, inputs[name], "mse" if still else input_rule)


def _start(quantizer: Quantizer, stats: TensorStats, rule: str, weight: Tensor | None = None) -> None:
    quantizer.initialize(stats, rule)
    quantizer.after_step()
    quantizer.place_on_grid(stats, weight)


@torch.no_grad()
def match_output_scales(model: nn.Module, chunks: Chunks, count: int, reduce: Reduce = alone) -> int:
    """Give the output of every layer whose weight quantizer has an `output_scale` the size it has in float.

    The scale is multiplied by mean|float output| / mean|quantized output|, without the bias, which
    it does not scale. Each such layer sees its input as in float: what it hands on is its float output.

    Args:
        model: the converted model, its quantizers started.
        chunks, count, reduce: as in `measure_inputs`.

    Returns:
        How many layers there were; without any, no image is read.

    Source: the first batch of EWGS, arXiv:2104.00903, as its authors' code starts it.
    """
    layers = {n: m for n, m in quant_layers(model).items() if hasattr(m.weight_quantizer, "output_scale")}
    if not layers:
        return 0
    sums = {name: torch.zeros(count, 2, dtype=torch.float64) for name in layers}  # float, quantized
    now = 0

    def hook(name: str) -> Callable[..., Tensor]:
        def see(layer: QuantLayer, args: tuple[Tensor, ...], named: dict[str, Tensor], _: Tensor) -> Tensor:
            with without(layer, "bias"):
                quantized = layer.forward(*args, **named)
            with without(layer, "weight_quantizer", "input_quantizer"):
                exact = unbiased = layer.forward(*args, **named)
                if layer.bias is not None:
                    with without(layer, "bias"):
                        unbiased = layer.forward(*args, **named)
            sums[name][now] += torch.stack([block_sum(in_memory_order(y.float().abs())) for y in (unbiased, quantized)])
            return exact

        return see

    hooks = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    for now in _drive(model, chunks, hooks):  # noqa: B007 the hooks read it
        pass
    for name, layer in layers.items():
        exact, quantized = reduce(sums[name], "sum").sum(0)
        if exact > 0 and quantized > 0:
            layer.weight_quantizer.output_scale.mul_((exact / quantized).to(layer.weight.device))
    return len(layers)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, chunks: Chunks, count: int, reduce: Reduce = alone) -> int:
    """Replace the running statistics of every BatchNorm by those of the model as it is now.

    Quantizing shifts and narrows what BatchNorm sees. Each chunk is one batch; means and variances
    are averaged over chunks, in the order of the chunks.

    Returns:
        How many BatchNorm layers were re-estimated.
    """
    norms = {
        name: m for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    }  # fmt: skip
    if not norms:
        return 0
    momenta = {name: m.momentum for name, m in norms.items()}
    batches = {name: m.num_batches_tracked.clone() for name, m in norms.items()}
    device = next(model.parameters()).device
    kept = {
        name: torch.zeros(count, 2, m.num_features, dtype=torch.float64) for name, m in norms.items()
    }  # fmt: skip
    try:
        with evaluating(model):
            for norm in norms.values():
                norm.train()
                norm.momentum = 1.0
            for chunk, images in chunks():
                model(images.to(device))
                for name, norm in norms.items():
                    kept[name][chunk, 0] = norm.running_mean.double().cpu()
                    kept[name][chunk, 1] = norm.running_var.double().cpu()
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            norm.num_batches_tracked.copy_(batches[name])
    for name, norm in norms.items():
        mean, var = reduce(kept[name], "sum").mean(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return len(norms)


def layers_to_measure(plan: Plan) -> list[str]:
    """The layers whose input will be quantized."""
    return [p.name for p in plan.layers if p.input_bits < FLOAT_BITS]


def first_bad_layer(model: nn.Module) -> str | None:
    """The first parameter or buffer that is not finite, by name; None when all are."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
