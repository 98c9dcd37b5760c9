"""PROFIT: widths step by step, then the most unstable layers stand still. Park, Yoo, ECCV 2020, arXiv:2008.04693."""

from __future__ import annotations

from nulsq_cli.values import FLOAT_BITS, Bits, Phase


def phases(
    bits: Bits, epochs: int, *, ladder: tuple[int, ...] | list[int] = (8, 5, 4), float_epochs: int | None = None,
    norm_epochs: int = 0, sampling_epochs: int | None = None, parts: int = 3,
) -> list[Phase]:  # fmt: skip
    """Float, activations down the ladder, weights down the ladder, then `parts` runs with more and more layers frozen.

    The authors' figures: 15 epochs per phase, 5 to sample, ladder 8, 5, 4, thirds.

    Args:
        bits: the widths to end with.
        epochs: of every single phase.
        ladder: widths on the way down; those not above the last one are left out.
        float_epochs: before anything is quantized; None is `epochs`.
        norm_epochs: before and after each phase with only norms, biases and steps training.
        sampling_epochs: to measure which layers are unstable; None is a third of `epochs`.
        parts: into how many parts the layers are divided for freezing.

    Raises:
        ValueError: a ladder that does not descend or holds no widths.
    """
    ladder = list(ladder)
    if ladder != sorted(set(ladder), reverse=True) or not all(2 <= width <= 8 for width in ladder):
        raise ValueError(f"ladder must hold widths from 8 to 2, descending, got {ladder}")
    counts = (norm_epochs, float_epochs or 0, sampling_epochs or 0)
    if not all(type(n) is int and 0 <= n <= 10**9 for n in counts) or type(parts) is not int or not 1 <= parts <= 100:
        raise ValueError("epochs must be whole numbers from 0, and parts 1 to 100")
    found = [Phase("float", epochs if float_epochs is None else float_epochs, Bits(FLOAT_BITS, FLOAT_BITS), lesson="tutor")]

    def stretch(name: str, now: Bits, **more: float | bool) -> None:
        norms = Phase(f"{name}, norms", norm_epochs, now, lesson="tutor", only_norms=True)
        found.extend([norms, Phase(name, epochs, now, lesson="tutor", **more), norms])  # type: ignore[arg-type]

    for width in _way(ladder, bits.activations):
        stretch(f"activations {width}", Bits(FLOAT_BITS, width))
    for width in _way(ladder, bits.weights)[:-1]:
        stretch(f"weights {width}", Bits(width, bits.activations))
    if bits.weights != FLOAT_BITS:
        sampling = max(1, epochs // 3) if sampling_epochs is None and epochs else sampling_epochs or 0
        found.append(Phase("sampling", sampling, bits, lesson="tutor", samples_instability=True))
        for part in range(parts):
            stretch(f"frozen {part}/{parts}", bits, frozen_share=part / parts)
    return found


def _way(ladder: list[int], last: int) -> list[int]:
    """The widths of the ladder above the last one, and the last one."""
    return [] if last == FLOAT_BITS else [*(width for width in ladder if width > last), last]
