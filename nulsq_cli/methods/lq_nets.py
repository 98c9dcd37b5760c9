"""LQ-Nets: levels are sums of a basis with binary codes, fitted and not trained. Zhang et al., ECCV 2018, arXiv:1807.10029."""

from __future__ import annotations

import torch
from torch import Tensor

from nulsq_cli import initializers
from nulsq_cli.methods.base import Quantizer
from nulsq_cli.ops import codebook
from nulsq_cli.ops.estimators import straight_through
from nulsq_cli.values import QuantSpec, TensorStats

QUARTILE = 0.6745
"""Where a quarter of a unit normal distribution lies above."""

MEMORY = 0.9
RIDGE = 1e-4


class LQNets(Quantizer):
    """The levels are the 2**bits inner products of a basis, (bits,), with all binary codes.

    Codes are {0, 1} for inputs after ReLU, {-1, +1} for weights and, which is ours, for signed inputs.
    There is nothing to learn by gradients: every forward in training fits the basis to what it saw, and
    moves it a tenth of the way there, after it was used.

    Args:
        spec: what this quantizer has to be; the authors' weights have a basis per output channel.
    """

    learned_shape = True
    codes: Tensor
    basis: Tensor

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__(spec)
        places = torch.arange(spec.bits)
        digits = (torch.arange(spec.levels)[:, None] >> places) & 1
        self.register_buffer("codes", (2 * digits - 1 if spec.signed else digits).float(), persistent=False)
        self.register_buffer("basis", (2.0**places).repeat(spec.channels, 1))

    @torch.no_grad()
    def initialize(self, stats: TensorStats, rule: str) -> None:
        """Start from an even table; `lloyd` goes on from the authors' by fitting codes and basis in turn.

        The authors' constants are those of a unit normal. Weights take their measured width where
        the authors' take that which fresh weights are given; for `lloyd` inputs do so too.
        """
        places = 2.0 ** torch.arange(self.spec.bits, dtype=torch.float64, device=self.basis.device)
        if rule in ("paper", "lloyd"):
            basis = self._authors_unit(stats, measured=rule == "lloyd")[:, None] * places
            self.basis.copy_(self._fit(stats, basis) if rule == "lloyd" else basis)
            return
        if rule == "mse":
            unit = initializers.best_scale(stats, self.codes.double() @ places)
        else:
            unit = initializers.even(rule)(stats, self.spec)[:, 0] / (2 if self.spec.signed else 1)
        self.basis.copy_(unit[:, None] * places)

    def _authors_unit(self, stats: TensorStats, measured: bool) -> Tensor:
        """(C,): the smallest element of the first basis."""
        if self.spec.signed:
            width = stats.std if measured or self.spec.role == "weight" else torch.ones_like(stats.std)
            return QUARTILE * width.clamp_min(initializers.SMALLEST) / 2 ** (self.spec.bits - 1)
        width = (2 * stats.mean_square).sqrt() if measured else torch.ones_like(stats.std)
        return 2 * QUARTILE * width.clamp_min(initializers.SMALLEST) / self.spec.gaps

    def _fit(self, stats: TensorStats, basis: Tensor, iterations: int = 200, tolerance: float = 1e-6) -> Tensor:
        """Codes and basis in turn, until the basis rests."""
        sums = initializers.RunningSums(stats)
        for _ in range(iterations):
            levels, codes = sorted_levels(self.codes, basis)
            moved = least_squares(codes, *sums.between(codebook.midpoints(levels)), basis)
            change = (moved - basis).abs().amax() / moved.abs().amax()
            basis = moved
            if change < tolerance:
                break
        return basis

    def levels(self) -> Tensor:
        """(K,) or (C, K). No level is 0 where codes are {-1, +1}."""
        table = sorted_levels(self.codes, self.basis)[0]
        return table if self.spec.granularity == "channel" else table[0]

    def quantize(self, x: Tensor) -> Tensor:
        """To the nearest level. The gradient passes weights unchanged, and inputs up to the end of the table."""
        with torch.no_grad():
            tables, codes = sorted_levels(self.codes, self.basis)
            levels = self.on_grid(tables if self.spec.granularity == "channel" else tables[0])
            y = codebook.lookup(x, levels, codebook.midpoints(levels))
            self._follow(x, tables, codes)
        if self.spec.role == "weight":
            return straight_through(y, x)
        return straight_through(y, x.clamp(levels[0] if self.spec.signed else None, levels[-1]))

    def _follow(self, x: Tensor, levels: Tensor, codes: Tensor) -> None:
        """Move the basis towards the one that fits x best under the codes that x has now; tables as from `sorted_levels`."""
        rows = x.reshape(self.spec.channels, -1)
        place = codebook.encode(rows, codebook.midpoints(levels)).long()
        mass, moment = (codebook.sum_by_code(place, v, levels.shape) for v in (torch.ones_like(rows), rows))
        fitted = least_squares(codes.double(), mass, moment, self.basis.double())
        self.basis.lerp_(fitted.float(), 1 - MEMORY)


def sorted_levels(codes: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The levels of a basis, ascending, and their codes.

    Args:
        codes: (K, B).
        basis: (C, B), of any sign and order.

    Returns:
        (C, K) levels and (C, K, B) codes, of the basis' own type.
    """
    levels, order = (basis @ codes.to(basis.dtype).T).sort(1)
    return levels, codes.to(basis.dtype)[order]


def least_squares(codes: Tensor, mass: Tensor, moment: Tensor, basis: Tensor) -> Tensor:
    """The basis under which given codes come closest to the values they stand for.

    A ridge holds what the codes leave open, such as the element of a digit that never occurs, where it is.

    Args:
        codes: (C, K, B) float64.
        mass: (C, K), how many values have each code.
        moment: (C, K), their sums.
        basis: (C, B), the one in use.

    Returns:
        (C, B) float64.

    Source: LQ-Nets, arXiv:1807.10029, eq. 8 and section 3.3; the ridge is that of the released code's weights.
    """
    ridge = RIDGE * torch.eye(codes.shape[2], dtype=codes.dtype, device=codes.device)
    normal = codes.mT @ (mass[..., None] * codes) + ridge
    right = (codes.mT @ moment[..., None])[..., 0] + RIDGE * basis
    return torch.linalg.solve_ex(normal, right)[0]
