from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nulsq_cli.methods.apot import unit_levels
from nulsq_cli.ops import integer
from nulsq_cli.values import QuantSpec

ENDS = {"weights": (-127, 127), "inputs": (0, 255), "signed inputs": (-128, 127)}
gaps = st.lists(st.floats(2**-10, 2, width=32), min_size=3, max_size=15)


def table(gaps, zero: int) -> torch.Tensor:
    levels = torch.nn.functional.pad(torch.tensor(gaps).cumsum(0), (1, 0))
    return levels - levels[zero]


@settings(max_examples=30)
@given(gaps, st.sampled_from(sorted(ENDS)), st.integers(0, 15))
def test_any_table_becomes_distinct_integers_with_zero_at_zero(gaps, kind, zero):
    lowest, highest = ENDS[kind]
    zero = 0 if kind == "inputs" else min(zero, len(gaps))
    levels = table(gaps, zero)
    scale, integers = integer.snap(levels, lowest=lowest, highest=highest)
    assert integers.dtype == torch.int16 and scale.dtype == torch.float32 and scale > 0
    assert (integers.diff() > 0).all() and lowest <= int(integers.min()) and int(integers.max()) <= highest
    assert integers[zero] == 0
    again = integer.snap(levels, lowest=lowest, highest=highest)
    assert torch.equal(scale, again[0]) and torch.equal(integers, again[1])
    # Where no two levels compete for one integer, each goes to its nearest.
    if levels.diff().min() > scale:
        assert (integer.values(integers, scale) - levels).abs().max() <= scale * 0.5001


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_even_tables_are_their_own_codes_on_their_own_step(bits, signed):
    spec = QuantSpec(bits, signed, "weight" if signed else "activation")
    lowest, highest = integer.limits(spec)
    codes = torch.arange(-spec.negative, spec.positive + 1)
    for step in (0.037, 1.0, 3e-5, 812.7):
        levels = torch.tensor(step) * codes
        scale, integers = integer.snap(levels, lowest=lowest, highest=highest)
        assert torch.equal(integers, codes.short())
        torch.testing.assert_close(integer.values(integers, scale), levels, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", range(2, 8))
def test_tables_that_lie_on_integers_in_some_unit_lose_nothing(bits):
    symmetric = torch.arange(2**bits) - (2**bits - 1) / 2  # no zero: the odd halves
    scale, integers = integer.snap(0.3 * symmetric)
    assert torch.equal(integers, (2 * symmetric).short())
    if bits <= 5:
        levels = (0.7 * unit_levels(bits, True)).float()
        scale, integers = integer.snap(levels)
        torch.testing.assert_close(integer.values(integers, scale), levels, rtol=2e-7, atol=0)


def test_integers_by_hand():
    levels = torch.tensor([-0.9, -0.3, 0, 0.21])
    scale, integers = integer.snap(levels)
    assert integers.tolist() == [-30, -10, 0, 7] and scale == pytest.approx(0.03)
    # Three levels want 0 or 1: the one that is 0 keeps it, the others make room.
    crowded = torch.tensor([-100.0, -0.2, 0, 0.2, 0.4, 100])
    assert integer.nearest(crowded, torch.tensor(1.0), -127, 127).tolist() == [-100, -1, 0, 1, 2, 100]
    # Two that want the same integer move apart, one down and one up as room is; without a zero none is fixed.
    assert integer.nearest(torch.tensor([4.9, 5.0, 5.1]), torch.tensor(1.0), 0, 255).tolist() == [4, 5, 6]


def test_full_tables_are_all_integers_and_fuller_ones_are_refused():
    levels = torch.linspace(-1, 1, 256) ** 3
    _, integers = integer.snap(levels, lowest=-128, highest=127)
    assert integers.tolist() == list(range(-128, 128))
    with pytest.raises(ValueError, match="256 levels do not fit"):
        integer.snap(levels)


def test_the_searched_scale_leaves_less_error_than_the_smallest_one():
    generator = torch.Generator().manual_seed(0)
    better = 0
    for _ in range(20):
        levels = table(torch.rand(15, generator=generator).add(0.5).tolist(), 8)
        counts = torch.rand(16, generator=generator)
        share = counts / counts.sum()

        def cost(scale, integers, levels=levels, share=share):
            error = integer.values(integers, scale) - levels
            return float((share * error**2).sum() + 100 * (share * error).sum() ** 2)

        smallest = integer.scale_of(levels, torch.tensor(127.0))
        naive = cost(smallest, integer.nearest(levels, smallest, -127, 127))
        found = cost(*integer.snap(levels, counts, coherence=100.0))
        assert found <= naive * 1.0001
        better += found < naive / 4
    assert better > 10


def test_a_table_that_only_starts_even_gets_the_finest_of_its_grids():
    levels = 0.3 * torch.arange(-8, 8)
    assert integer.best_top(levels, lowest=-127, highest=127) == 8
    assert integer.best_top(levels, lowest=-127, highest=127, finest=True) == 120


def test_tables_per_channel_are_single_ones_row_by_row():
    levels = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).sort(1).values
    levels[2] = 0.1 * torch.arange(-4, 4)
    counts = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    scale, integers = integer.snap(levels, counts, coherence=3.0)
    for row in range(5):
        one = integer.snap(levels[row], counts[row], coherence=3.0)
        assert torch.equal(scale[row], one[0]) and torch.equal(integers[row], one[1])


@pytest.mark.parametrize("spec", [QuantSpec(b, s, r) for b in (2, 7, 8) for s, r in
                                  ((True, "weight"), (True, "activation"), (False, "activation"))])  # fmt: skip
def test_limits_are_a_byte_and_leave_room_for_every_level(spec):
    lowest, highest = integer.limits(spec)
    assert spec.levels <= highest - lowest + 1 <= 256
    if spec.role == "weight":
        assert lowest >= -128 and highest <= 127
    else:
        assert lowest + integer.ZERO_POINT * spec.signed == 0
