"""Co-study: student and teacher learn from the labels and from each other. QKD, arXiv:1911.12491."""

from __future__ import annotations

from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel


class Both(nn.Module):
    """Two networks on the same images as one module, so that several processes average both gradients.

    Args:
        student, teacher: (N, C, H, W) to (N, K) each.
        student_norm, teacher_norm: (mean, std) that each was made for.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, student_norm: tuple[Any, Any], teacher_norm: tuple[Any, Any]):
        super().__init__()
        self.student, self.teacher = student, teacher
        (own_mean, own_std), (mean, std) = ([torch.tensor(v).view(1, -1, 1, 1) for v in n] for n in (student_norm, teacher_norm))
        self.register_buffer("gain", own_std / std, persistent=False)
        self.register_buffer("shift", (own_mean - mean) / std, persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both. x is normalised as the student wants it."""
        return self.student(x), self.teacher(x * self.gain + self.shift)


class MutualTask(TrainingTask):
    """Both losses in one sum; each network's divergence sees the other's logits as constants.

    Args:
        both: the networks.
        criterion: on (logits, target).
        weight, task_weight: of the divergence and of the labels, as in timm's distillation.
        temperature: of both softmaxes.
        device: as in timm's tasks.
    """

    def __init__(self, both: Both, criterion: nn.Module, *, weight: float, task_weight: float, temperature: float,
                 device: torch.device) -> None:  # fmt: skip
        super().__init__(device=device, verbose=False)
        self.trainable_module, self.criterion = both, criterion
        self.weight, self.task_weight, self.temperature = weight, task_weight, temperature

    def prepare_distributed(self, device_ids: list[int] | None = None, **options: Any) -> MutualTask:
        """Average the gradients of both over processes."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The sum of both losses, and the student's logits."""
        student, teacher = self.trainable_module(x)
        labels = self.criterion(student, target) + self.criterion(teacher, target)
        apart = divergence(student, teacher, self.temperature) + divergence(teacher, student, self.temperature)
        return {"loss": self.task_weight * labels + self.weight * apart, "output": student}


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of two (N, K) logits, mean over N; no gradient reaches the teacher's."""
    own = F.log_softmax(student.float() / temperature, 1)
    other = F.log_softmax(teacher.detach().float() / temperature, 1)
    return temperature**2 * F.kl_div(own, other, reduction="batchmean", log_target=True)
