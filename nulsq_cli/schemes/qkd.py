"""QKD: the student first studies alone, then with its teacher, then under it. Kim et al., 2019, arXiv:1911.12491."""

from __future__ import annotations

from nulsq_cli.values import Bits, Phase


def phases(bits: Bits, epochs: int, *, self_study: float = 0.15, co_study: float = 0.5, teacher_lr: float = 1e-4) -> list[Phase]:
    """Self-study, co-study and tutoring, on one schedule that goes on through all three.

    The shares are those of a third-party version on CIFAR-100 (30, 100 and 70 of 200 epochs); the
    paper's own could not be verified.

    Args:
        bits: the widths.
        epochs: of all phases together.
        self_study, co_study: shares of the epochs, 0..1; the rest is tutoring.
        teacher_lr: of the teacher in co-study, far below the student's; how far is our choice.

    Raises:
        ValueError: the shares are negative or exceed 1 together.
    """
    if min(self_study, co_study) < 0 or self_study + co_study > 1:
        raise ValueError(f"self_study and co_study are shares of the epochs, got {self_study:g} and {co_study:g}")
    if not 0 <= teacher_lr < float("inf"):
        raise ValueError(f"teacher_lr must not be negative, got {teacher_lr:g}")
    alone, together = round(epochs * self_study), round(epochs * co_study)
    together = min(together, epochs - alone)
    return [
        Phase("self-study", alone, bits),
        Phase("co-study", together, bits, lesson="mutual", continues=True, teacher_lr=teacher_lr),
        Phase("tutoring", epochs - alone - together, bits, lesson="tutor", continues=True),
    ]
