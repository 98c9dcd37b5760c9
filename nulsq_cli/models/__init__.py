"""Float models in: timm's by name, the small networks that timm lacks, and checkpoints from files."""

from __future__ import annotations

from nulsq_cli.models.create import create_float_model, float_info, input_channels, list_models, resolved_name
from nulsq_cli.models.rebuild import rebuild
from nulsq_cli.models.weights import Weights, read_weights

__all__ = [
    "Weights",
    "create_float_model",
    "float_info",
    "input_channels",
    "list_models",
    "read_weights",
    "rebuild",
    "resolved_name",
]
