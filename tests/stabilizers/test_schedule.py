from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.stabilizers.schedule import cosine

share = st.floats(0, 1)


def test_it_is_off_then_starts_passes_the_middle_and_arrives():
    assert cosine(0.2499, 0.25, 0.1, 0.01) == 0
    assert cosine(0.25, 0.25, 0.1, 0.01) == pytest.approx(0.1)
    assert cosine(0.625, 0.25, 0.1, 0.01) == pytest.approx(0.055)
    assert cosine(0.4375, 0.25, 0.0, 0.1) == pytest.approx(0.1 - 0.05 * (1 + math.sqrt(0.5)))  # a quarter of the way
    assert cosine(1, 0.25, 0.1, 0.01) == pytest.approx(0.01)
    assert cosine(1, 1, 0.0, 3.0) in (0.0, 3.0) and cosine(0.5, 0, 2.0, 2.0) == 2


@given(share, share, share, st.floats(0, 10), st.floats(0, 10))
def test_after_the_start_it_moves_one_way_between_its_ends(one, two, begin, first, last):
    early, late = (max(begin, p) for p in sorted((one, two)))
    a, b = cosine(early, begin, first, last), cosine(late, begin, first, last)
    slack = 1e-9
    assert all(min(first, last) - slack <= v <= max(first, last) + slack for v in (a, b))
    assert (b - a) * (last - first) >= -slack
