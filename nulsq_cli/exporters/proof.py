"""That a file computes what it should: codes, single layers, and the whole network against its integer twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nulsq_cli.exporters.runtimes import Run

LEAST_AGREEMENT = 0.999
LARGEST_ERROR = 5e-3
MEDIAN_ERROR = 1e-4
"""Of the logits of a single image. A mistake in the arithmetic shows in every image; a value that rounds to the
other side of a threshold in one runtime shows in a few, and there it may grow, most of all in untrained networks."""

LEAST_SHARE = 0.8
"""Of the layers that compute in integers; below, the export says so."""

NOTABLE_LOSS = 1.0
"""Points of top-1 between the run and the file; above, the export says so."""


@dataclass
class Comparison:
    """How two ways to compute the same network differ, over some images."""

    samples: int = 0
    same: int = 0
    error: float = 0.0
    size: float = 0.0
    worst: float = 0.0
    errors: list[float] = field(default_factory=list)
    right: int | None = None

    def add(self, found: Tensor, wanted: Tensor, targets: Tensor | None = None) -> None:
        """One batch of logits."""
        self.samples += len(found)
        self.same += int((found.argmax(1) == wanted.argmax(1)).sum())
        difference = found.double() - wanted.double()
        self.error += float(difference.square().sum())
        self.size += float(wanted.double().square().sum())
        self.errors += (difference.norm(dim=1) / wanted.double().norm(dim=1).clamp_min(1e-30)).tolist()
        worst = float(difference.abs().max())
        self.worst = max(self.worst, worst) if worst == worst else float("inf")
        if targets is not None:
            self.right = (self.right or 0) + int((found.argmax(1) == targets).sum())

    @property
    def agreement(self) -> float:
        """0..1: how often both choose the same class."""
        return self.same / max(self.samples, 1)

    @property
    def relative_error(self) -> float:
        """Root mean square of the difference, relative to that of the logits."""
        return (self.error / max(self.size, 1e-30)) ** 0.5

    @property
    def median_error(self) -> float:
        """The median over images of the difference, relative to the image's own logits."""
        return sorted(self.errors)[len(self.errors) // 2] if self.errors else 0.0

    @property
    def holds(self) -> bool:
        """Whether this is agreement. One image of a small sample may stand on the edge."""
        most = max(1, int((1 - LEAST_AGREEMENT) * self.samples))
        close = self.relative_error <= LARGEST_ERROR or self.median_error <= MEDIAN_ERROR
        return self.samples - self.same <= most and close

    def to_json(self) -> dict[str, Any]:
        """For the result."""
        found = {"samples": self.samples, "top1_agreement": 100 * self.agreement, "relative_error": self.relative_error,
                 "median_error": self.median_error, "max_abs_diff": self.worst}  # fmt: skip
        return found if self.right is None else {**found, "top1": 100 * self.right / self.samples}


@dataclass
class Trial:
    """All comparisons of one export.

    Args:
        runs: by name, the ways to run the file; those that are `few` see only the first images.
        few: names.
        most: how many images those see.
    """

    runs: dict[str, Run]
    few: tuple[str, ...] = ()
    most: int = 1000
    files: dict[str, Comparison] = field(default_factory=dict)
    twin: Comparison = field(default_factory=Comparison)
    right: int | None = None
    agreements: dict[str, Comparison] = field(default_factory=dict)

    @torch.no_grad()
    def hold(self, model: Callable[[Tensor], Tensor], twin: Callable[[Tensor], Tensor],
             batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:  # fmt: skip
        """Run everything on the same images.

        Args:
            model: the network with its tables as trained.
            twin: the network as the file has it, in PyTorch.
            batches: images and, where they are known, their classes.
        """
        self.files = {name: Comparison() for name in self.runs}
        for images, targets in batches:
            wanted = twin(images)
            exact = model(images)
            self.twin.add(wanted, exact, targets)
            if targets is not None:
                self.right = (self.right or 0) + int((exact.argmax(1) == targets).sum())
            for name, run in self.runs.items():
                if name not in self.few or self.files[name].samples < self.most:
                    self.files[name].add(run(images), wanted, targets)

    def failures(self, names: Iterable[str]) -> list[str]:
        """Those among some ways to run the file that do not agree with the twin, in words."""
        return [f"{name}: {100 * c.agreement:.2f} % of {c.samples} images alike, logit error {c.relative_error:.2g}, "
                f"median {c.median_error:.2g}"
                for name, c in self.files.items() if name in names and not c.holds]  # fmt: skip
