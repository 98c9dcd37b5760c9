"""A float model into a quantized one, by a plan that says for every layer what was done and why."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nulsq_cli.errors import InputError, UsageError, first_line, suggest
from nulsq_cli.layers import LAYERS, evaluating, on_input
from nulsq_cli.methods import make_quantizer
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.values import FLOAT_BITS, Bits, Granularity, Grid, QuantSpec, Role


@dataclass(frozen=True)
class Rule:
    """Changes what the default policy would do to the layers whose name matches.

    Args:
        match: a glob on the module path, or `re:` and a regular expression that matches all of it.
        bits, method, granularity, signed: what to change; None leaves it.
        skip: leave the layer in float.
    """

    match: str
    bits: Bits | None = None
    method: str | None = None
    granularity: Granularity | None = None
    signed: bool | None = None
    skip: bool = False

    def fits(self, name: str) -> bool:
        """Whether this rule is about the layer of that name."""
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Policy:
    """What to do to a model: the default for all layers, the first and last one, and exceptions."""

    bits: Bits
    method: str
    granularity: Granularity = "tensor"
    signed: Literal["auto"] | bool = "auto"
    first_last_bits: Bits = Bits(8, 8)
    first_last_method: str = "lsq"
    rules: tuple[Rule, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    grid: Grid = "float"


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    `signed` is that of its input; None while nothing was measured. `input_learned` is False where an 8-bit input is
    the image itself: nothing before it is trained, so a gradient to its step would cost a convolution's backward pass
    over the images (a seventh of a ResNet-18's training step) for a step that the images' range says as well.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    weight_bits: int
    input_bits: int
    signed: bool | None
    granularity: Granularity
    method: str
    reason: str
    grid: Grid = "float"
    input_learned: bool = True

    @property
    def weights(self) -> int:
        """How many weights the layer has."""
        return torch.Size(self.shape).numel()

    @property
    def quantized(self) -> bool:
        """Whether anything of the layer is quantized."""
        return min(self.weight_bits, self.input_bits) < FLOAT_BITS


@dataclass(frozen=True)
class Plan:
    """What becomes of every layer that has weights, and of the model as a whole."""

    layers: tuple[LayerPlan, ...]
    bits: str
    method: str
    options: dict[str, Any]
    float_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Bytes of all weights, packed, of their level tables, and of everything else in float32; names not counted."""
        total = self.float_bytes
        for p in self.layers:
            integers = p.grid != "float"  # a byte per level, and a scale
            if p.weight_bits < FLOAT_BITS:
                tables = p.shape[0] if p.granularity == "channel" else 1
                total += (p.weights * p.weight_bits + 7) // 8 - 4 * p.weights + 4 * tables * 2**p.weight_bits
                total += integers * tables * (2**p.weight_bits + 4)
            if p.input_bits < FLOAT_BITS:
                total += 4 * (2 * 2**p.input_bits - 1) + integers * (2**p.input_bits + 5)
        return total

    @property
    def average_weight_bits(self) -> float:
        """Mean width over all weights, those left in float included."""
        total = sum(p.weights for p in self.layers)
        return sum(p.weights * p.weight_bits for p in self.layers) / total if total else float(FLOAT_BITS)

    def to_json(self) -> dict[str, Any]:
        """As stored in a run."""
        return {
            "bits": self.bits, "method": self.method, "options": self.options, "float_bytes": self.float_bytes,
            "packed_bytes": self.packed_bytes, "average_weight_bits": round(self.average_weight_bits, 4),
            "layers": [asdict(p) for p in self.layers],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`.

        Raises:
            InputError: a key is missing or unknown.
        """
        try:
            layers = tuple(LayerPlan(**{**p, "shape": tuple(p["shape"])}) for p in data["layers"])
            for p in layers:
                _check_stored(p)
            Bits.parse(data["bits"])
            if not isinstance(data["options"], dict) or type(data["float_bytes"]) is not int:
                raise ValueError("its options or sizes are none")
            return cls(layers, data["bits"], data["method"], data["options"], data["float_bytes"])
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as reason:
            raise InputError(f"the stored plan is damaged: {str(reason)[:200]}") from reason


def _check_stored(p: LayerPlan) -> None:
    widths = (*range(2, 9), FLOAT_BITS)
    texts = (p.name, p.type, p.method, p.reason)
    sound = all(isinstance(t, str) for t in texts) and all(type(n) is int and n > 0 for n in p.shape)
    if not sound or p.weight_bits not in widths or p.input_bits not in widths:
        raise ValueError(f"{p.name!r}: impossible shape or widths")
    if p.signed not in (True, False, None) or p.input_learned not in (True, False) or p.granularity not in ("tensor", "channel"):
        raise ValueError(f"{p.name!r}: impossible sign, granularity or learning")


@dataclass(frozen=True)
class Seen:
    """What one pass of noise showed of a layer: when it first ran, whether its input had negatives and was the image itself."""

    order: int
    signed: bool
    image: bool


def probe(model: nn.Module, input_size: Sequence[int]) -> dict[str, Seen]:
    """Run two images of noise in evaluation mode and note which layers are called, in which order.

    A layer whose weight is used by others without calling it (fused attention projections, say)
    does not show up: a quantizer inside it would silently do nothing.

    Args:
        model: a float model; its mode is restored.
        input_size: (C, H, W).
    """
    seen: dict[str, Seen] = {}
    hooks = []

    def note(name: str) -> Any:
        def see(x: Tensor) -> None:
            signed, image = bool((x < 0).any()), x.data_ptr() == noise.data_ptr()
            known = seen.get(name)
            seen[name] = (Seen(known.order, known.signed or signed, known.image and image) if known
                          else Seen(len(seen), signed, image))  # fmt: skip

        return see

    try:
        for name, module in model.named_modules():
            if type(module) in LAYERS:
                hooks.append(on_input(module, note(name)))
        where = next(model.parameters()).device
        noise = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0)).to(where)
        with torch.no_grad(), evaluating(model):
            model(noise)
    except (RuntimeError, AssertionError, TypeError, ValueError) as reason:
        raise UsageError(
            f"the model does not run on images of {tuple(input_size)}: {first_line(reason)}",
            fix="give the size that it was made for with --input-size C H W",
        ) from reason
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def make_plan(model: nn.Module, policy: Policy, input_size: Sequence[int]) -> Plan:
    """Decide for every layer with weights what becomes of it. Changes nothing.

    Raises:
        UsageError: a rule matches no layer, names a width that does not exist, or a bad expression.
    """
    seen = probe(model, input_size)
    weighted = {
        name: m for name, m in model.named_modules()
        if isinstance(getattr(m, "weight", None), Tensor) and m.weight.ndim >= 2
    }  # fmt: skip
    stay = {name: why for name, module in weighted.items() if (why := _stays_float(module, seen.get(name)))}
    _check_rules(policy.rules, weighted, stay)
    ends = _first_and_last(model, seen)
    layers = [_plan_layer(name, module, policy, seen.get(name), ends, stay.get(name)) for name, module in weighted.items()]
    float_bytes = sum(t.numel() * 4 for t in model.state_dict().values() if t.is_floating_point())
    return Plan(tuple(layers), str(policy.bits), policy.method, dict(policy.options), float_bytes)


def _stays_float(module: nn.Module, seen: Seen | None) -> str | None:
    """Why a layer cannot be quantized, or None."""
    if type(module) not in LAYERS:
        return "no quantized form of this type"
    return "its weight is used without calling the layer" if seen is None else None


def _check_rules(rules: Iterable[Rule], weighted: dict[str, nn.Module], stay: dict[str, str]) -> None:
    names = list(weighted)
    for rule in rules:
        try:
            found = [name for name in names if rule.fits(name)]
        except re.error as reason:
            raise UsageError(f"the rule {rule.match!r} is no regular expression: {reason}",
                             fix="write a glob, layer1.*, or mend the expression after re:") from reason  # fmt: skip
        if not found:
            raise UsageError(f"the rule {rule.match!r} matches no layer", fix=suggest(rule.match, names[:40]))
        if not rule.skip and all(name in stay for name in found):
            kind = type(weighted[found[0]]).__name__
            raise UsageError(f"the rule {rule.match!r} changes nothing: {found[0]} ({kind}) stays in float, {stay[found[0]]}",
                             fix="leave the rule out, or give it skip: true")  # fmt: skip


def _first_and_last(model: nn.Module, seen: dict[str, Seen]) -> dict[str, str]:
    """Name to reason for the layers at both ends; by timm's own notes where it has them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    in_order = sorted(seen, key=lambda name: seen[name].order)
    modules = dict(model.named_modules())
    ends: dict[str, str] = {}
    for key, fallback, reason in (("first_conv", 0, "first layer"), ("classifier", -1, "last layer")):
        noted = config.get(key) or ()
        names = [n for n in ([noted] if isinstance(noted, str) else noted) if n in modules]
        if not names and in_order:
            names, reason = [in_order[fallback]], f"{reason} in forward order"
        ends.update(dict.fromkeys(names, reason))
    return ends


def _plan_layer(name: str, module: nn.Module, policy: Policy, seen: Seen | None, ends: dict[str, str],
                stays: str | None) -> LayerPlan:  # fmt: skip
    plan = LayerPlan(
        name=name, type=type(module).__name__, shape=tuple(module.weight.shape), weight_bits=policy.bits.weights,
        input_bits=policy.bits.activations, signed=policy.signed if isinstance(policy.signed, bool) else None,
        granularity=policy.granularity, method=policy.method, reason="default", grid=policy.grid,
    )  # fmt: skip
    in_float = {"weight_bits": FLOAT_BITS, "input_bits": FLOAT_BITS, "method": "float"}
    if stays is not None:
        return replace(plan, **in_float, reason=f"float: {stays}")
    if plan.signed is None:
        plan = replace(plan, signed=seen.signed)
    if name in ends and str(policy.bits) != "32/32":
        bits = policy.first_last_bits
        plan = replace(plan, weight_bits=bits.weights, input_bits=bits.activations,
                       method=policy.first_last_method, reason=ends[name])  # fmt: skip
    for rule in policy.rules:
        if rule.fits(name):
            plan = _apply(plan, rule)
    if plan.weight_bits == plan.input_bits == FLOAT_BITS:
        plan = replace(plan, method="float")
    if seen.image and plan.input_bits == 8:
        plan = replace(plan, input_learned=False)
    return plan


def _apply(plan: LayerPlan, rule: Rule) -> LayerPlan:
    reason = f"rule {rule.match}"
    if rule.skip:
        return replace(plan, weight_bits=FLOAT_BITS, input_bits=FLOAT_BITS, method="float", reason=reason)
    changes: dict[str, Any] = {
        key: getattr(rule, key) for key in ("method", "granularity", "signed") if getattr(rule, key) is not None
    }
    if rule.bits is not None:
        changes |= {"weight_bits": rule.bits.weights, "input_bits": rule.bits.activations}
    return replace(plan, **changes, reason=reason)


def with_signs(plan: Plan, signed: dict[str, bool], policy: Policy) -> Plan:
    """The plan after calibration: what was measured decides the sign, unless the user did."""
    fixed = {p.name for p in plan.layers for r in policy.rules if r.signed is not None and r.fits(p.name)}
    if isinstance(policy.signed, bool):
        return plan
    layers = [replace(p, signed=signed[p.name]) if p.name in signed and p.name not in fixed else p for p in plan.layers]
    return replace(plan, layers=tuple(layers))


def convert(model: nn.Module, plan: Plan) -> nn.Module:
    """Put quantized layers in place of those the plan names. Changes and returns `model`.

    Raises:
        InputError: the plan names a layer that the model does not have, or of another shape.
    """
    modules = dict(model.named_modules())
    for entry in plan.layers:
        layer = modules.get(entry.name)
        if tuple(getattr(getattr(layer, "weight", None), "shape", ())) != entry.shape or (
            entry.quantized and type(layer) not in LAYERS
        ):
            raise InputError("the stored plan does not fit the model", where=entry.name)
        if not entry.quantized:
            continue
        # The options are the model's method's; first, last and ruled layers may have another one.
        options = plan.options if entry.method == plan.method else {}
        weights = _quantizer(entry, "weight", options)
        inputs = _quantizer(entry, "activation", options)
        if inputs is not None:
            inputs.requires_grad_(entry.input_learned)
        model.set_submodule(entry.name, LAYERS[type(layer)](layer, weights, inputs))
    return model


def _quantizer(entry: LayerPlan, role: Role, options: dict[str, Any]) -> Quantizer | None:
    bits = entry.weight_bits if role == "weight" else entry.input_bits
    if bits == FLOAT_BITS:
        return None
    per_channel = role == "weight" and entry.granularity == "channel"
    spec = QuantSpec(
        bits=bits, signed=role == "weight" or bool(entry.signed), role=role,
        granularity="channel" if per_channel else "tensor", channels=entry.shape[0] if per_channel else 1, grid=entry.grid,
    )  # fmt: skip
    return make_quantizer(entry.method, spec, **options)
