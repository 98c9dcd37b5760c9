"""The table of methods. One paper, one file; one name, one line. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from nulsq_cli.errors import pick
from nulsq_cli.values import QuantSpec

if TYPE_CHECKING:
    from nulsq_cli.methods.base import Quantizer


@dataclass(frozen=True)
class Method:
    """Which quantizer sits on the weights and which on the activations, as `module:Class`."""

    weights: str
    activations: str
    idea: str


METHODS: dict[str, Method] = {
    "lsq": Method("lsq:LSQ", "lsq:LSQ", "one learned step per tensor"),
    "nulsq-a": Method("lsq:LSQ", "nulsq:NuLSQ", "every gap of the activation levels is learned"),
    "nulsq-w": Method("nulsq:NuLSQ", "lsq:LSQ", "every gap of the weight levels is learned"),
    "nulsq-wa": Method("nulsq:NuLSQ", "nulsq:NuLSQ", "every gap of weight and activation levels is learned"),
}


def make_quantizer(method: str, spec: QuantSpec, **options: object) -> Quantizer:
    """Build the quantizer that `method` puts on a weight or an activation.

    Raises:
        UsageError: no such method, or an option that its quantizer does not take.
    """
    line = pick(METHODS, method, "method")
    module, name = (line.weights if spec.role == "weight" else line.activations).split(":")
    quantizer = getattr(import_module(f"nulsq_cli.methods.{module}"), name)
    return quantizer(spec, **options)
