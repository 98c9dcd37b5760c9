"""Measure a float model on data, start every quantizer from what was measured, re-estimate BatchNorm.

The images come in chunks whose content does not depend on the batch size of the training, and every
sum is kept per chunk and added in the order of the chunks. So one process and many give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nulsq_cli.convert import Plan
from nulsq_cli.errors import InputError
from nulsq_cli.initializers import measure
from nulsq_cli.layers import QuantLayer, evaluating, quant_layers, without
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.values import TensorStats

BINS = 4096

Chunks = Callable[[], Iterable[tuple[int, Tensor]]]
"""Starts a pass over the calibration images of this process: (chunk number, normalised images)."""

Reduce = Callable[[Tensor, str], Tensor]
"""All-reduce over processes, by `sum`, `min` or `max`; in one process it returns its argument."""


def alone(values: Tensor, how: str) -> Tensor:
    """The reduction of a single process."""
    return values


class _Moments:
    """Sums of one layer input, a row per chunk."""

    def __init__(self, chunks: int) -> None:
        self.sums = torch.zeros(chunks, 4, dtype=torch.float64)  # count, sum, sum of |x|, sum of squares
        self.ends = torch.tensor([float("inf"), float("-inf")], dtype=torch.float64)

    def add(self, chunk: int, x: Tensor) -> None:
        x = x.double()
        parts = [torch.tensor(float(x.numel()), dtype=torch.float64), x.sum(), x.abs().sum(), x.square().sum()]
        self.sums[chunk] += torch.stack([p.cpu() for p in parts])
        low, high = torch.aminmax(x)
        self.ends = torch.stack((torch.minimum(self.ends[0], low.cpu()), torch.maximum(self.ends[1], high.cpu())))


@torch.no_grad()
def measure_inputs(
    model: nn.Module, names: Iterable[str], chunks: Chunks, count: int, reduce: Reduce = alone
) -> dict[str, TensorStats]:
    """Statistics of the inputs of some layers of a float model, in evaluation mode.

    Two passes: the first finds the range and the exact moments, the second counts into bins.

    Args:
        model: the float model.
        names: module paths.
        chunks: starts a pass over the images.
        count: how many chunks there are over all processes.
        reduce: all-reduce over processes.

    Raises:
        InputError: an input is not finite; the first such layer is named.
    """
    names = list(names)
    moments = {name: _Moments(count) for name in names}
    _pass(model, names, chunks, lambda name, chunk, x: moments[name].add(chunk, x))
    for name, m in moments.items():
        m.sums = reduce(m.sums, "sum")
        m.ends = torch.stack((reduce(m.ends[:1], "min")[0], reduce(m.ends[1:], "max")[0]))
        if not torch.isfinite(m.sums).all() or not torch.isfinite(m.ends).all():
            raise InputError("its input is not finite on the calibration images", where=name,
                             fix="check the checkpoint and the data's mean and std")  # fmt: skip

    counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in names}

    def count_bins(name: str, chunk: int, x: Tensor) -> None:
        low, high = moments[name].ends.tolist()
        place = ((x.double() - low) * (BINS / max(high - low, 1e-30))).long().clamp_(0, BINS - 1)
        counts[name] += torch.bincount(place.flatten(), minlength=BINS).cpu()

    _pass(model, names, chunks, count_bins)
    return {name: _stats(moments[name], reduce(counts[name], "sum")) for name in names}


def _pass(model: nn.Module, names: list[str], chunks: Chunks, see: Callable[[str, int, Tensor], None]) -> None:
    modules = dict(model.named_modules())
    now = 0

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: see(name, now, args[0])

    hooks = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    for now in _drive(model, chunks, hooks):  # noqa: B007 the hooks read it
        pass


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


def _stats(moments: _Moments, mass: Tensor) -> TensorStats:
    count, total, total_abs, squares = moments.sums.sum(0)
    low, high = moments.ends
    mean = total / count
    variance = (squares - count * mean**2).clamp_min(0) / (count - 1).clamp_min(1)
    middles = low + (high - low) * (torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS
    if low == 0:
        # After ReLU most entries are exactly 0; the middle of their bin would pull levels upwards.
        middles[0] = 0
    return TensorStats(
        count=int(count), mean=mean[None], mean_abs=(total_abs / count)[None], mean_square=(squares / count)[None],
        std=variance.sqrt()[None], least=low[None], largest=high[None], points=middles[None], mass=mass[None],
    )  # fmt: skip


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
            _start(layer.weight_quantizer, stats, weight_rule)
        if layer.input_quantizer is not None:
            _start(layer.input_quantizer, inputs[name], input_rule)


def _start(quantizer: Quantizer, stats: TensorStats, rule: str) -> None:
    quantizer.initialize(stats, rule)
    quantizer.after_step()


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
        def see(layer: QuantLayer, args: tuple[Tensor], _: Tensor) -> Tensor:
            with without(layer, "bias"):
                quantized = layer.forward(*args)
            with without(layer, "weight_quantizer", "input_quantizer"):
                exact = layer.forward(*args)
                with without(layer, "bias"):
                    unbiased = layer.forward(*args)
            sums[name][now] += torch.stack([y.double().abs().sum().cpu() for y in (unbiased, quantized)])
            return exact

        return see

    hooks = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
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
    return [p.name for p in plan.layers if p.quantized]


def first_bad_layer(model: nn.Module) -> str | None:
    """The first parameter or buffer that is not finite, by name; None when all are."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None
