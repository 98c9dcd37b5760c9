"""What becomes of each layer in a file for runtimes: one description that the twin computes and the writer spells out."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from nulsq_cli.artifact import Artifact
from nulsq_cli.exporters import grids
from nulsq_cli.exporters.grids import Inputs, Weights
from nulsq_cli.exporters.trace import CONVOLUTIONS, MARK, Site, Traced, aten


@dataclass(frozen=True)
class Options:
    """How a file is to be written.

    Args:
        grid: `int8`, `float` for the faithful but slow reference, or `none`: the float network, to compare with.
        act: `auto`, `where`, `sum8` or `table`.
        reach: 7: exact on every processor, 8: int8 throughout, for processors with VNNI.
        outputs: whether outputs of integer convolutions become bytes, too, without which ONNX Runtime computes in float.
    """

    grid: str = "int8"
    act: str = "auto"
    reach: int = 7
    outputs: bool = True


@dataclass(frozen=True)
class Output:
    """The byte that an output becomes: value = scale * (byte - zero)."""

    scale: float
    zero: int

    def rounded(self, y: Tensor) -> Tensor:
        """The values that are left of y."""
        return ((torch.round(y / self.scale) + self.zero).clamp(0, 255) - self.zero) * self.scale


@dataclass
class Layer:
    """A convolution or linear map.

    Args:
        site: where it stands.
        weights: its integers, or None where the weight is float.
        inputs: those of its input, or None.
        bias: (O,) float32, BatchNorm folded in, or None.
    """

    site: Site
    weights: Weights | None
    inputs: Inputs | None
    bias: Tensor | None

    @property
    def integer(self) -> bool:
        """Whether both sides are integers."""
        return self.weights is not None and self.inputs is not None

    @property
    def convolution(self) -> bool:
        """Else it is a linear map."""
        return self.site.node.target in CONVOLUTIONS

    @property
    def unit(self) -> Tensor:
        """(O,) float32: what an integer of the sum stands for."""
        return self.weights.scale * torch.tensor(self.inputs.scale, dtype=torch.float32)

    @property
    def integer_bias(self) -> Tensor | None:
        """(O,) float64, whole numbers: the bias in units of the sum; `grids.with_room` made it fit 32 bits."""
        return None if self.bias is None else (self.bias.double() / self.unit.double()).round()


@dataclass
class Network:
    """A traced model and what becomes of its layers.

    Args:
        traced: the graph.
        options: how it is to be written.
        layers: by node name.
        outputs: by node name, whose value becomes a byte.
        idle: names of activations that the quantizers behind them make superfluous.
    """

    traced: Traced
    options: Options
    layers: dict[str, Layer]
    outputs: dict[str, Output] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def inputs_of(self, node: fx.Node) -> Inputs | None:
        """The quantizer that a mark stands for; None where the file has none."""
        return self.by_path[node.args[1]].inputs

    @property
    def by_path(self) -> dict[str, Layer]:
        """The quantized layers by module path."""
        return {layer.site.layer: layer for layer in self.layers.values()}


def lower(traced: Traced, artifact: Artifact, options: Options) -> Network:
    """Decide what becomes of each layer. Outputs still have no range; `calibrate` gives them one.

    Raises:
        UsageError: an activation form that a layer's width does not allow.
    """
    layers = {}
    for name, site in traced.sites.items():
        entry = artifact.meta["layers"].get(site.layer) if options.grid != "none" else None
        entry = entry or {"weight_bits": 32, "act_bits": 32}
        whole = options.grid == "int8"
        inputs = weights = None
        if entry["act_bits"] < 32:
            inputs = (grids.inputs(artifact, site, options.act, options.reach) if whole and entry["weight_bits"] < 32
                      else grids.float_inputs(artifact, site))  # fmt: skip
        if entry["weight_bits"] < 32:
            weights = grids.weights(artifact, site, inputs.top if inputs else 1, options.reach)
        bias = None if site.folded_bias is None else site.folded_bias.float()
        if weights is not None and inputs is not None:
            weights = grids.with_room(weights, bias, inputs)
        layers[name] = Layer(site, weights, inputs, bias)
    network = Network(traced, options, layers)
    network.idle = {node.name for node in traced.calls() if _is_idle(network, node)}
    return network


RELU = {aten.relu.default, aten.relu_.default}
RELU6 = {aten.relu6.default, aten.relu6_.default}
CLAMP = {aten.clamp.default, aten.clamp_.default}
HARDTANH = {aten.hardtanh.default, aten.hardtanh_.default}


def bounds(node: fx.Node) -> tuple[float, float] | None:
    """What a rectifier limits its input to, or None for any other operator."""
    infinite = float("inf")
    if node.target in RELU:
        return 0.0, infinite
    if node.target in RELU6:
        return 0.0, 6.0
    if node.target not in CLAMP | HARDTANH:
        return None
    given = node.args[1:3]
    low, high = (*given, *((None, None) if node.target in CLAMP else (-1.0, 1.0))[len(given) :])
    return -infinite if low is None else float(low), infinite if high is None else float(high)


def _is_idle(network: Network, node: fx.Node) -> bool:
    """A rectifier does nothing where all that reads it quantizes, and no threshold lies outside its bounds."""
    limits = bounds(node)
    if limits is None or not node.users:
        return False
    for user in node.users:
        if user.target is not MARK:
            return False
        inputs = network.inputs_of(user)
        if inputs is None:
            return False
        t = inputs.thresholds
        if not (t[0] >= limits[0] and t[-1] < limits[1]):
            return False
    return True


def ranged(network: Network) -> dict[str, tuple[fx.Node, bool]]:
    """The nodes whose values become bytes, by name, and whether these are never negative.

    A convolution whose only reader rounds to bytes anyway needs nothing more.
    """
    found = {}
    for layer in network.layers.values():
        if not (layer.convolution and layer.integer):
            continue
        node = layer.site.node
        users = list(node.users)
        positive = False
        if len(users) == 1 and (limits := bounds(users[0])) is not None and limits[0] == 0:
            node, positive = users[0], True
        if len(node.users) == 1 and (user := next(iter(node.users))).target is MARK and network.inputs_of(user).form != "where":
            continue
        found[node.name] = (node, positive)
    return found


def calibrate(network: Network, ranges: dict[str, tuple[float, float]]) -> None:
    """Give the outputs that become bytes their scales, from the least and the largest value of each."""
    for name, (node, positive) in ranged(network).items():
        low, high = ranges[name]
        limits = bounds(node)
        if positive:
            # A ReLU6 in front of bytes that end at 6 does nothing.
            scale, zero = (limits[1] if limits[1] < float("inf") else max(high, 1e-6)) / 255, 0
            network.idle.add(name)
        else:
            scale, zero = max(abs(low), abs(high), 1e-6) / 127, 128
        network.outputs[name] = Output(float(torch.tensor(scale).float()), zero)


def float_layers(network: Network) -> list[str]:
    """Module paths of layers that cannot compute in integers."""
    return [layer.site.layer for layer in network.layers.values() if not layer.integer]
