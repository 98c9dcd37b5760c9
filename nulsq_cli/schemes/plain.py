"""Labels alone."""

from __future__ import annotations

from nulsq_cli.values import Bits, Phase


def phases(bits: Bits, epochs: int) -> list[Phase]:
    """One phase."""
    return [Phase("plain", epochs, bits)]
