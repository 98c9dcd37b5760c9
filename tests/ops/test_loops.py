"""Every path of the two quantizer ops computes what the eager functions compute."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.methods.base import keep_positive
from nulsq_cli.ops import codebook, fast, fused, grid, native, traced


class Native:
    """The C++ loops by the names that the other path has."""

    lookup = staticmethod(lambda x, levels, cuts: native.quantize(x, levels, None, cuts))
    levels_backward = staticmethod(lambda grad, x, levels, **more: native.quantize_backward(grad, x, levels, None, **more))
    grid = staticmethod(lambda x, step, *ends: native.quantize(x, step, ends))
    grid_backward = staticmethod(lambda grad, x, step, *ends, **more: native.quantize_backward(grad, x, step, ends, **more))


PATHS = [pytest.param(Native, id="native"), pytest.param(traced, id="traced")]
LAYOUTS = ["contiguous", "channels_last", "gaps"]


pytestmark = pytest.mark.usefixtures("loops")


@pytest.fixture
def eager():
    fast.use(False)
    yield
    fast.use(True)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return x if layout == "contiguous" else torch.stack((x, x), -1)[..., 0]


def case(count: int, tables: int, shape: tuple[int, ...], seed: int):
    draw = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(shape, generator=draw) * s for s in (3, 1))
    levels = torch.randn(tables, count, generator=draw).sort(1).values
    levels = levels if tables > 1 else levels[0]
    if x.numel() > 8:  # what is special: exact levels, exact boundaries, the ends, no numbers
        table = levels if tables == 1 else levels[0]
        special = [table[0], table[-1], table[0] - 1, (table[0] + table[1]) / 2, torch.inf, -torch.inf]
        x.view(tables, -1)[0, : len(special)] = torch.tensor(special)
    return x, grad, levels


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 16, 17, 255, 256])
def test_looking_up_is_bit_for_bit_the_eager_one(path, layout, count, eager):
    for tables in (1, 6):
        x, _, levels = case(count, tables, (6, 5, 3, 7), count)
        x[0, 0, 0, 6] = torch.nan
        x, cuts = laid_out(x, layout), codebook.midpoints(levels)
        truth = codebook.lookup(x, levels, cuts)
        assert torch.equal(path.lookup(x, levels, cuts).nan_to_num(), truth.nan_to_num())
        assert truth[0, 0, 0, 6].isnan() and path.lookup(x, levels, cuts)[0, 0, 0, 6].isnan()


UNEVEN = st.sampled_from([0.0, 1e-7, 0.3, 0.6, 3.0])


@given(st.integers(17, 256), st.floats(-3, 3), st.floats(1e-6, 1e3), UNEVEN, st.integers(0, 99))
def test_large_tables_that_are_nearly_even_are_looked_up_exactly(count, start, step, uneven, seed):
    """By a guess that may be off by one: at every threshold, and beside it."""
    draw = torch.Generator().manual_seed(seed)
    levels = ((torch.arange(count) + uneven * torch.rand(count, generator=draw)) * step + start).sort().values
    cuts = codebook.midpoints(levels)
    beside = [torch.nextafter(cuts, torch.full_like(cuts, sign * torch.inf)) for sign in (-1, 1)]
    x = torch.cat((cuts, *beside, levels, levels * 1.001, torch.tensor([torch.inf, -torch.inf, 0.0, torch.nan, 3e38, -3e38])))
    truth = torch.where(x.isnan(), x, codebook.decode(codebook.encode(x, cuts), levels))
    assert torch.equal(Native.lookup(x, levels, cuts).nan_to_num(7), truth.nan_to_num(7))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3, 4, 8, 13, 16])
def test_gradients_of_levels_are_the_eager_ones(path, layout, count, eager):
    for tables in (1, 6):
        x, grad, levels = case(count, tables, (6, 5, 3, 7), count)
        to_x, to_levels = path.levels_backward(laid_out(grad, layout), laid_out(x, layout), levels)
        truth = codebook.backward_eager(grad, x, levels)
        assert torch.equal(to_x, truth[0])
        torch.testing.assert_close(to_levels, truth[1], rtol=1e-4, atol=1e-5 * x.numel())


@pytest.mark.parametrize("count", [4, 8, 16])
def test_a_gap_in_which_nothing_lies_has_no_gradient_at_all(count):
    levels = torch.arange(count).float()
    x = torch.randn(3000, generator=torch.Generator().manual_seed(0)).abs().clamp_max(1)  # all in the lowest gap
    _, to_levels = Native.levels_backward(torch.rand(3000), x, levels)
    assert to_levels[0] != 0 and to_levels[1] != 0 and not to_levels[2:].any()


@pytest.mark.parametrize("negative", [0, 1, 3, 7])
def test_levels_from_gaps_are_bit_for_bit_the_eager_ones(negative, eager):
    draw = torch.Generator().manual_seed(negative)
    gaps, grad = torch.rand(5, 7, generator=draw), torch.randn(5, 8, generator=draw)
    truth = gaps.clone().requires_grad_()
    made = codebook.levels_around_zero(truth, negative)
    made.backward(grad)
    assert torch.equal(native.around(gaps, negative), made)
    assert torch.equal(native.around_backward(grad, negative), truth.grad)


@pytest.mark.parametrize("count", [1, 3, 15])
def test_steps_are_kept_positive_like_eagerly(count, eager):
    draw = torch.Generator().manual_seed(count)
    steps = torch.randn(8, count, generator=draw).exp() * torch.randn(8, count, generator=draw).sign()
    steps[0], steps[1], steps[2, 0], steps[3, 0] = -1.0, 1e-12, torch.nan, torch.inf
    truth = steps.clone()
    keep_positive(truth)
    fast.use(True)
    keep_positive(steps)
    torch.testing.assert_close(steps, truth, rtol=1e-6, atol=0, equal_nan=True)
    assert (steps[4:] > 0).all() and steps[2].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_spent_gradient_becomes_the_one_to_x(layout, eager):
    x, grad, levels = case(4, 1, (6, 5, 3, 7), 3)
    x, grad = x.nan_to_num(posinf=9, neginf=-9), grad.to(memory_format=torch.channels_last)
    x = laid_out(x, layout)
    step = torch.tensor([0.3])
    for eager, ours, table in ((codebook.backward_eager, Native.levels_backward, (levels,)),
                               (grid.backward_eager, Native.grid_backward, (step, -2, 1))):  # fmt: skip
        spent = grad.clone(memory_format=torch.preserve_format)
        to_x, _ = ours(spent, x, *table, spent=True)
        assert torch.equal(to_x, eager(grad, x, *table)[0])
        assert (to_x.data_ptr() == spent.data_ptr()) == (layout == "channels_last")


def test_gradients_of_a_wide_table_are_the_eager_ones_when_traced(eager):
    for tables in (1, 4):
        x, grad, levels = case(64, tables, (4, 50), 0)
        to_x, to_levels = traced.levels_backward(grad, x, levels)
        truth = codebook.backward_eager(grad, x, levels)
        assert torch.equal(to_x, truth[0])
        torch.testing.assert_close(to_levels, truth[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ends", [(0, 3), (-2, 1), (-128, 127), (0, 255)])
def test_the_even_grid_is_the_eager_one(path, layout, ends, eager):
    for steps in (torch.tensor([0.3]), torch.rand(6, 1, 1, 1) + 0.1):
        x, grad, _ = case(4, 1, (6, 5, 3, 7), 1)
        x[0, 0, 1] = torch.arange(7) * steps.view(-1)[0] / 2  # ties
        x, grad = laid_out(x, layout), laid_out(grad, layout)
        assert torch.equal(path.grid(x, steps, *ends), grid.quantize_to_grid(x, steps, *ends))
        to_x, to_steps = path.grid_backward(grad, x, steps, *ends)
        truth = grid.backward_eager(grad, x, steps, *ends)
        finite = x.isfinite()
        assert torch.equal(to_x[finite], truth[0][finite])
        x = torch.where(finite, x, 0)
        to_steps, truth = path.grid_backward(grad, x, steps, *ends)[1], grid.backward_eager(grad, x, steps, *ends)[1]
        torch.testing.assert_close(to_steps, truth, rtol=1e-4, atol=1e-3)


@given(st.lists(st.floats(width=32), max_size=40), st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=20))
def test_any_numbers_and_any_table(values, levels):
    x, levels = torch.tensor(values), torch.tensor(levels).sort().values
    fast.use(False)
    truth = codebook.lookup(x, levels, codebook.midpoints(levels))
    fast.use(True)
    ours = codebook.lookup(x, levels, codebook.midpoints(levels))
    assert torch.equal(ours.isnan(), truth.isnan()) and torch.equal(ours.nan_to_num(), truth.nan_to_num())


def test_the_bits_depend_on_no_thread_count():
    torch.manual_seed(0)
    x, grad, levels = torch.randn(3, 40, 50, 60), torch.randn(3, 40, 50, 60), torch.randn(8).sort().values
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append((*Native.levels_backward(grad, x, levels), *Native.grid_backward(grad, x, torch.tensor([0.2]), 0, 7)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_ops_take_the_loops_and_stop_when_told(monkeypatch):
    x, levels = torch.randn(100), torch.randn(4).sort().values
    calls = []
    monkeypatch.setattr(native, "quantize", lambda *_: calls.append("quantize") or x)
    codebook.quantize_to_levels(x, levels)
    fast.use(False)
    codebook.quantize_to_levels(x, levels)
    fast.use(True)
    assert calls == ["quantize"]


def test_a_table_of_another_type_is_left_to_the_eager_functions():
    x, levels = torch.linspace(-2, 2, 60), torch.tensor([-1, 0, 0.1, 1.5], dtype=torch.float64)
    assert torch.equal(codebook.quantize_to_levels(x, levels), codebook.quantize_to_levels(x.double(), levels))
    step = torch.tensor([0.3], dtype=torch.float64)
    assert torch.equal(grid.quantize_to_grid(x, step, -2, 3), grid.quantize_to_grid(x.double(), step, -2, 3))


@pytest.mark.slow
def test_the_loops_of_accelerators_compile_and_compute_the_same(eager):
    if not fused.use(True, "cpu"):
        pytest.skip("nothing to compile with on this machine")
    fused.use(False)
    x, grad, levels = case(4, 1, (4, 6, 5, 5), 0)
    x = x.nan_to_num(posinf=9, neginf=-9).to(memory_format=torch.channels_last)
    to_x, to_levels = fused.levels_backward(grad, x, levels)
    truth = codebook.backward_eager(grad, x, levels)
    assert torch.equal(to_x, truth[0])
    torch.testing.assert_close(to_levels, truth[1], rtol=1e-4, atol=1e-3)
    cuts = codebook.midpoints(levels)
    assert torch.equal(fused.lookup(x, levels, cuts), codebook.lookup(x, levels, cuts))


WITHOUT_COMPILER = """
import logging, torch
logging.basicConfig(format="%(message)s")
from nulsq_cli.ops import codebook, fast
x, levels = torch.randn(50, requires_grad=True), torch.arange(4.0).requires_grad_()
for _ in range(2):
    codebook.quantize_to_levels(x, levels).sum().backward()
assert fast.use(True) is False and x.grad is not None
"""


def test_without_a_compiler_everything_works_and_is_said_once(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("quantizers run uncompiled") == 1 and "no C++ compiler" in done.stderr


OLDER = """
import sys, pytest
from nulsq_cli.ops import native
native.FLAGS = tuple(flag.replace("native", "haswell") for flag in native.FLAGS)
assert native.library() is not None
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.skipif("avx512f" not in native._processor(), reason="this processor has no longer vectors than AVX2's")
def test_the_loops_of_processors_with_shorter_vectors_compute_the_same(tmp_path):
    here = Path(__file__).parent
    chosen = "bit_for_bit or gradients or even_grid or one_after or thread"
    tests = [str(here / "test_norm.py"), str(here / "test_loops.py"), "-k", chosen]
    done = subprocess.run([sys.executable, "-c", OLDER, *tests], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0 and "[100%]" in done.stdout, done.stdout[-2000:]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of another kind")
def test_the_loops_compile_for_the_oldest_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", tuple(flag.replace("native", "x86-64").replace("-O3", "-O1") for flag in native.FLAGS))
    native._build(tmp_path / "loops.so")
    assert (tmp_path / "loops.so").stat().st_size > 0


def test_a_library_is_built_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []
    monkeypatch.setattr(native, "_build", lambda target: built.append(target) or target.write_bytes(b"no library"))
    assert native.library.__wrapped__() is None  # what is there cannot be loaded: said, and the eager functions do it
    assert native.library.__wrapped__() is None and len(built) == 1
    assert [p.suffix for p in (tmp_path / "nulsq").iterdir()] == [".so"]


def test_tensors_larger_than_caches_are_written_like_others():
    x = torch.randn((1 << 22) + 64, generator=torch.Generator().manual_seed(0))
    grad, step, levels = torch.rand_like(x), torch.tensor([0.2]), torch.tensor([-0.5, 0.0, 0.4, 1.0])
    for table, kind in ((levels, None), (step, (-2, 3))):
        small = [native.quantize(part, table, kind) for part in x.split(1 << 20)]
        assert torch.equal(native.quantize(x, table, kind), torch.cat(small))
        to_x, to_table = native.quantize_backward(grad, x, table, kind)
        parts = [native.quantize_backward(*both, table, kind) for both in zip(grad.split(1 << 20), x.split(1 << 20), strict=True)]
        assert torch.equal(to_x, torch.cat([part for part, _ in parts]))
        torch.testing.assert_close(to_table, sum(part for _, part in parts), rtol=1e-4, atol=1e-2)
