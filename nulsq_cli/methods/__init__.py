"""The table of methods. One paper, one file; one name, one line. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nulsq_cli.errors import UsageError, pick
from nulsq_cli.values import FLOAT_BITS, Bits, Grid, QuantSpec

if TYPE_CHECKING:
    from nulsq_cli.methods.base import Quantizer


@dataclass(frozen=True)
class Method:
    """Which quantizer sits on the weights and which on the activations, and what the two can do.

    Args:
        weights, activations: `module:Class`.
        idea: one line for `nulsq ls methods`.
        options: names that the quantizers' constructors take; `quant.options` in a recipe.
        largest_weights, largest_activations: the widest that is defined, in bits.
        per_channel: whether weights may have a table per output channel.
        signed: whether inputs may be negative.
        only_activations: the paper quantizes no weights; those of another method stand in.
        two_forms: negative inputs are no tail to be cut off but decide the formula; nobody may call all inputs unsigned.
        both_sides: activations need the weights' quantizer beside them, which brings the scale back.
        widest_on_grid: of weights, unsigned and signed inputs, in bits, whose levels fit an int8 grid: 256 levels
            fit only where they are even and one of them is 0.
    """

    weights: str
    activations: str
    idea: str
    options: tuple[str, ...] = ()
    largest_weights: int = 8
    largest_activations: int = 8
    per_channel: bool = True
    signed: bool = True
    only_activations: bool = False
    two_forms: bool = False
    both_sides: bool = False
    widest_on_grid: tuple[int, int, int] = (8, 8, 8)

    def complaint(self, bits: Bits, granularity: str, signed: bool | None, grid: Grid = "float") -> str | None:
        """What this method cannot do of what is asked, or None.

        Args:
            bits: the widths asked for.
            granularity: `tensor` or `channel`.
            signed: whether inputs are declared to be signed; None leaves that to the data.
            grid: where levels may lie.
        """
        for side, width, most in (("weights", bits.weights, self.largest_weights),
                                  ("activations", bits.activations, self.largest_activations)):  # fmt: skip
            if width != FLOAT_BITS and width > most:
                return f"has {side} of at most {most} bits, asked for {width}"
        if grid != "float":
            most_weights, *most_inputs = self.widest_on_grid
            for side, width, most in (("weights", bits.weights, most_weights),
                                      ("activations", bits.activations, most_inputs[bool(signed)])):  # fmt: skip
                if width != FLOAT_BITS and width > most:
                    return f"has {side} of at most {most} bits on an {grid} grid, asked for {width}"
        if granularity == "channel" and not self.per_channel and bits.weights != FLOAT_BITS:
            return "has one weight table per tensor, asked for one per channel"
        if signed and not self.signed and bits.activations != FLOAT_BITS:
            return "has no form for signed inputs"
        if self.only_activations and bits.activations == FLOAT_BITS and bits.weights != FLOAT_BITS:
            return "quantizes activations; nothing of it is left when only weights are quantized"
        if self.both_sides and bits.weights == FLOAT_BITS and bits.activations != FLOAT_BITS:
            return "keeps the scale of its activations in the weights' quantizer, and weights are left in float"
        return None


METHODS: dict[str, Method] = {
    "lsq": Method("lsq:LSQ", "lsq:LSQ", "one learned step per tensor", ("grad_scale",)),
    "nulsq-a": Method(
        "lsq:LSQ", "nulsq:NuLSQ", "every gap of the activation levels is learned", ("grad_scale",),
        widest_on_grid=(8, 7, 7),
    ),
    "nulsq-w": Method(
        "nulsq:NuLSQ", "lsq:LSQ", "every gap of the weight levels is learned", ("grad_scale",),
        widest_on_grid=(7, 8, 8),
    ),
    "nulsq-wa": Method(
        "nulsq:NuLSQ", "nulsq:NuLSQ", "every gap of weight and activation levels is learned", ("grad_scale",),
        widest_on_grid=(7, 7, 7),
    ),
    "uniq": Method(
        "uniq:UniQ", "uniq:UniQ", "one learned step; weight levels are symmetric and have no zero", ("grad_scale",),
        widest_on_grid=(7, 8, 7),
    ),
    "pact": Method(
        "dorefa:DoReFa",
        "pact:PACT",
        "the clipping value of activations is learned; weights as dorefa",
        ("alpha", "penalty"),
        per_channel=False,
        only_activations=True,
        widest_on_grid=(7, 8, 8),
    ),
    "dorefa": Method(
        "dorefa:DoReFa", "dorefa:DoReFa", "fixed ranges, nothing learned; for models with BatchNorm", per_channel=False,
        widest_on_grid=(7, 8, 7),
    ),
    "ewgs": Method(
        "ewgs:EWGS",
        "ewgs:EWGS",
        "learned interval; gradients grow with the rounding error",
        ("delta", "every", "batches"),
        per_channel=False,
        both_sides=True,
        widest_on_grid=(7, 8, 7),
    ),
    "llsq": Method("llsq:LLSQ", "llsq:LLSQ", "one step that goes where the quantization error is least", ("error",)),
    "lcq": Method(
        "lcq:LCQ",
        "lcq:LCQ",
        "a learned curve decides how levels crowd; weights are normalised",
        ("grad_scale", "level_bits"),
        widest_on_grid=(7, 7, 7),
    ),
    "apot": Method(
        "apot:APoT",
        "apot:APoT",
        "sums of powers of two under a learned clip; for models with BatchNorm",
        ("grad_scale", "weight_gradient"),
        largest_weights=7,
        largest_activations=6,
        widest_on_grid=(6, 5, 6),
    ),
    "lq-nets": Method(
        "lq_nets:LQNets", "lq_nets:LQNets", "sums of a basis that is fitted to the data, not trained",
        widest_on_grid=(7, 7, 7),
    ),
    "duq": Method("duq:DuQ", "duq:DuQ", "an even grid with a learned scale before it and another behind it", two_forms=True),
}


def make_quantizer(method: str, spec: QuantSpec, **options: Any) -> Quantizer:
    """Build the quantizer that `method` puts on a weight or an activation.

    Args:
        method: a name in `METHODS`.
        spec: what the quantizer has to be.
        options: of the method; those that only its other side takes are left out.

    Raises:
        UsageError: no such method, or an option or a value that it does not take.
    """
    line = pick(METHODS, method, "method")
    here = (Bits(spec.bits, 2), None) if spec.role == "weight" else (Bits(2, spec.bits), spec.signed)
    if what := line.complaint(here[0], spec.granularity, here[1], spec.grid):
        raise UsageError(f"{method} {what}", fix="`nulsq ls methods` says what each can do")
    quantizer = quantizer_class(line.weights if spec.role == "weight" else line.activations)
    for name in options:
        pick(dict.fromkeys(line.options), name, f"option of {method}")
    code = quantizer.__init__.__code__
    taken = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    try:
        return quantizer(spec, **{name: value for name, value in options.items() if name in taken})
    except (TypeError, ValueError) as reason:
        raise UsageError(f"{method}: {reason}", fix="see `nulsq ls methods` and the recipe's quant.options") from reason


def quantizer_class(place: str) -> type[Quantizer]:
    """The class behind `module:Class`."""
    module, name = place.split(":")
    return getattr(import_module(f"nulsq_cli.methods.{module}"), name)
