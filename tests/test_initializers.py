from __future__ import annotations

import pytest
import torch

from nulsq_cli import initializers
from nulsq_cli.values import QuantSpec

NORMAL = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
QUANTILES = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)


def error(gaps: torch.Tensor, x: torch.Tensor, spec: QuantSpec) -> float:
    from nulsq_cli.ops.codebook import levels_around_zero

    levels = levels_around_zero(gaps, spec.negative)[0]
    nearest = (x.double()[:, None] - levels).abs().amin(1)
    return float(nearest.square().mean())


@pytest.mark.parametrize(("bits", "gaps"), [
    (2, [0.56058, 0.62757, 0.84522]), (3, [0.27386, 0.28091, 0.29637, 0.32374, 0.37118, 0.46042, 0.67439]),
])  # fmt: skip
def test_lloyd_finds_the_known_optimum_of_half_a_normal(bits, gaps):
    """Computed from the closed form of the cell errors of a normal distribution."""
    found = initializers.lloyd(initializers.measure(QUANTILES.relu()), QuantSpec(bits, False))[0]
    torch.testing.assert_close(found, torch.tensor(gaps, dtype=torch.float64), rtol=0.01, atol=0)


def test_lloyd_finds_the_known_optimum_of_a_normal_with_a_pinned_zero():
    found = initializers.lloyd(initializers.measure(QUANTILES), QuantSpec(2, True, "weight"))[0]
    torch.testing.assert_close(found, torch.tensor([0.95958, 0.76457, 1.22401], dtype=torch.float64), rtol=0.01, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_finds_the_known_best_even_step_of_a_normal(bits):
    known = {2: 1.048385, 3: 0.601824, 4: 0.338608, 8: 0.030766}[bits]
    found = initializers.mse(initializers.measure(QUANTILES), QuantSpec(bits, True, "weight"))
    assert abs(float(found[0, 0]) / known - 1) < 0.03


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_rule_beats_lloyd_and_no_even_rule_beats_mse(bits, signed):
    spec = QuantSpec(bits, signed)
    x = NORMAL[:20_000] ** 3 if signed else NORMAL[:20_000].abs().sqrt()
    stats = initializers.measure(x)
    errors = {name: error(rule(stats, spec), x, spec) for name, rule in initializers.INITIALIZERS.items()}
    assert errors["lloyd"] <= errors["mse"] * 1.001
    assert errors["mse"] <= min(errors["nmse"], errors["lsq"]) * 1.01


def test_authors_rules_by_hand():
    x = torch.tensor([-1.0, 0, 1, 4])
    stats = initializers.measure(x)
    assert initializers.lsq(stats, QuantSpec(3, True))[0, 0] == pytest.approx(2 * 1.5 / 3**0.5)
    assert initializers.nmse(stats, QuantSpec(2, True))[0, 0] == pytest.approx(0.99568669 * x.double().std())
    assert initializers.nmse(stats, QuantSpec(2, False))[0, 0] == pytest.approx(0.65076985 * (2 * 4.5) ** 0.5)


@pytest.mark.parametrize("rule", initializers.INITIALIZERS.values())
@pytest.mark.parametrize(
    "x", [torch.zeros(50), torch.ones(50), torch.tensor([0.0, 0, 0, 5]), torch.tensor([-3.0]), torch.full((9,), 1e-12)]
)
@pytest.mark.parametrize("signed", [True, False])
def test_degenerate_tensors_still_give_positive_finite_gaps(rule, x, signed):
    gaps = rule(initializers.measure(x), QuantSpec(3, signed))
    assert gaps.shape == (1, 7) and gaps.isfinite().all() and (gaps > 0).all()


def test_binning_keeps_counts_means_and_order():
    stats = initializers.measure(NORMAL, bins=512)
    assert float(stats.mass.sum()) == len(NORMAL)
    assert float((stats.mass * stats.points).sum()) == pytest.approx(float(NORMAL.double().sum()), rel=1e-9)
    assert (stats.points.diff(dim=1) >= 0).all()


def test_channels_are_measured_apart():
    x = NORMAL[:3000].view(3, 1000) * torch.tensor([[1.0], [2], [3]])
    together = initializers.lloyd(initializers.measure(x, 3), QuantSpec(3, True, "weight", "channel", 3))
    for c in range(3):
        alone = initializers.lloyd(initializers.measure(x[c]), QuantSpec(3, True, "weight"))
        torch.testing.assert_close(together[c], alone[0], rtol=1e-4, atol=0)


@pytest.mark.parametrize("levels", [[0, 1, 2, 3], [-1.0, -0.25, 0, 0.25, 1], [-3, -1, 1, 3], [0, 0.25, 0.5, 1]])
def test_the_best_scale_is_the_one_that_trying_all_finds(levels):
    x = NORMAL[:2000] if levels[0] < 0 else NORMAL[:2000].relu()
    table = torch.tensor(levels, dtype=torch.float64)
    best = float(initializers.best_scale(initializers.measure(x), table)[0])

    def error(scale: float) -> float:
        return float((x.double()[:, None] - scale * table).abs().amin(1).square().mean())

    tried = torch.logspace(-2, 1, 600).tolist()
    assert error(best) <= min(error(scale) for scale in tried) * 1.002


def test_standardized_statistics_are_those_of_the_standardized_tensor():
    x = NORMAL[:900].view(3, 300) * torch.tensor([[1.0], [2], [3]]) + 0.5
    ours = initializers.standardized(initializers.measure(x, 3))
    x = x.double()
    truth = initializers.measure((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), 3)
    for name in ("mean", "mean_abs", "mean_square", "std", "least", "largest", "points", "mass"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9)


def test_a_clip_is_as_many_even_steps_as_there_are_levels_above_zero():
    stats, spec = initializers.measure(NORMAL[:5000]), QuantSpec(3, True)
    even = torch.arange(-3, 4) / 3
    assert float(initializers.clip("nmse", stats, spec, even)) == pytest.approx(3 * float(initializers.nmse(stats, spec)[0, 0]))
    assert float(initializers.clip("lloyd", stats, spec, even)) == float(initializers.best_scale(stats, even))
