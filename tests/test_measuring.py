from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.measuring import HALF, Measured, reach
from nulsq_cli.ops import fast, native


@pytest.fixture(autouse=True, params=[True, False], ids=["loops", "eager"], scope="module")
def _both_ways(request):
    fast.use(request.param)
    yield
    fast.use(True)


numbers = st.floats(-(2.0**40), 2.0**40, width=32) | st.floats(-4, 4, width=32) | st.floats(0, 2**-90, width=32) | st.just(0.0)
tensors = st.lists(st.lists(numbers, min_size=1, max_size=30).map(torch.tensor), min_size=1, max_size=5)


def measured(chunks, order=None):
    found = Measured(len(chunks))
    for k in order or range(len(chunks)):
        found.add(k, chunks[k])
    return found


@given(tensors, st.randoms())
def test_the_order_of_chunks_does_not_matter(chunks, random):
    order = list(range(len(chunks)))
    random.shuffle(order)
    one, other = measured(chunks), measured(chunks, order)
    assert torch.equal(one.sums, other.sums) and torch.equal(one.ends, other.ends)
    assert torch.equal(one.counts, other.counts) and one.exponent == other.exponent


@given(tensors)
def test_counts_are_those_of_bins_that_were_known_from_the_start(chunks):
    found, x = measured(chunks), torch.cat(chunks).double().numpy()
    assert found.exponent == reach(x.min(), x.max())
    places = np.floor(x * HALF / 2.0**found.exponent).astype(int) + HALF
    assert np.array_equal(found.counts.numpy(), np.bincount(places, minlength=2 * HALF))


@given(tensors)
def test_points_stand_for_entries_less_than_a_bin_away(chunks):
    stats, x = measured(chunks).stats(), torch.cat(chunks).double().sort().values
    points = stats.points[0].repeat_interleave(stats.mass[0].long())
    assert float(stats.mass.sum()) == stats.count == x.numel() and (stats.points.diff() > 0).all()
    assert float((points - x).abs().max()) <= 2.0 ** reach(float(x[0]), float(x[-1])) / HALF


SOME = [torch.arange(-99.0, 111.0).view(2, 3, 5, 7) / 50, torch.rand(9000) + 3, -torch.rand(5000), torch.zeros(3), torch.ones(())]


@pytest.mark.parametrize("x", SOME)
def test_moments(x):
    stats, exact = measured([x]).stats(), x.double()
    for name, value in (("mean", exact.mean()), ("mean_abs", exact.abs().mean()), ("mean_square", exact.square().mean())):
        torch.testing.assert_close(getattr(stats, name)[0], value, rtol=1e-6, atol=1e-7)
    assert (stats.least[0], stats.largest[0], stats.count) == (exact.min(), exact.max(), x.numel())


def test_layouts_are_read_in_place():
    x = torch.rand(4, 8, 6, 6)
    one, other = measured([x]), measured([x.to(memory_format=torch.channels_last)])
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-6, atol=0)
    assert torch.equal(one.counts, other.counts)


def test_zeros_after_relu_are_a_point_at_zero():
    stats = measured([torch.tensor([0.0, 0.0, 0.0, 1.0])]).stats()
    assert (float(stats.points[0, 0]), float(stats.mass[0, 0])) == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_sums(bad):
    found = measured([torch.ones(3), torch.tensor([0.0, bad]), torch.ones(3)])
    assert not torch.isfinite(found.sums).all() and torch.isfinite(found.sums[0]).all()


@pytest.mark.parametrize("size", [1, 15, 4096, 4097, 70_001])
def test_the_bits_depend_on_no_thread_count(size):
    x, before, found = torch.randn(size), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(measured([x, x.abs() * 5, -x.abs()]))
    torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.sums, found[0].sums) and torch.equal(other.counts, found[0].counts)
        assert torch.equal(other.ends, found[0].ends)


@pytest.mark.usefixtures("loops")
def test_the_loops_are_taken(monkeypatch):
    calls = []
    for name in ("moments", "add_histogram"):
        plain = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args, name=name, plain=plain: (calls.append(name), plain(*args))[1])
    measured([torch.rand(3)])
    assert calls == (["moments", "add_histogram"] if fast.readable(torch.ones(1)) else [])
