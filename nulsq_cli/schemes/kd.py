"""Labels and a frozen teacher. Hinton, Vinyals, Dean, 2015, arXiv:1503.02531."""

from __future__ import annotations

from nulsq_cli.values import Bits, Phase


def phases(bits: Bits, epochs: int) -> list[Phase]:
    """One phase."""
    return [Phase("kd", epochs, bits, lesson="tutor")]
