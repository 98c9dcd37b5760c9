"""BatchNorm, a shortcut, a ReLU and a quantizer as one operation, against torch's own and the quantizer, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nulsq_cli.ops import codebook, fast, grid, native
from nulsq_cli.ops.native import Norm
from nulsq_cli.ops.norm import norm_and_lookup, norm_and_quantize
from nulsq_cli.ops.relu import rectify

pytestmark = pytest.mark.usefixtures("loops")

SHAPES = [(2, 16, 6, 6), (3, 5, 7, 7), (2, 48, 20, 13), (1, 3, 70, 90), (5, 32, 1, 2), (130, 16, 2, 2)]
KINDS = {"levels": None, "gaps": 0, "grid": (0, 5)}


def table_of(kind: native.Kind, bits: int = 2) -> Tensor:
    if isinstance(kind, tuple):
        return torch.tensor([0.31])
    gaps = torch.rand(1, 2**bits - 1, generator=torch.Generator().manual_seed(bits)) + 0.05
    return gaps if kind == 0 else codebook.levels_of(gaps, 0)


def quantize(y: Tensor, table: Tensor, kind: native.Kind) -> Tensor:
    if isinstance(kind, tuple):
        return grid.quantize_to_grid(y, table, *kind)
    return codebook.quantize_to_levels(y, table) if kind is None else codebook.quantize_by_gaps(y, table, kind)


TOPS = {"relu": native.NO_TOP, "relu6": 1.0}
"""1 stands for 6, which too few numbers here reach."""


def case(shape: tuple[int, ...], last: bool, *, batch: bool = True, top: float = native.NO_TOP) -> tuple[Tensor, Tensor, Norm]:
    """x, a shortcut and a BatchNorm."""
    draw = torch.Generator().manual_seed(sum(shape))
    channels = shape[1]
    x, shortcut = (torch.randn(shape, generator=draw) * 2 + torch.randn(1, channels, 1, 1, generator=draw) for _ in range(2))
    if last:
        x, shortcut = (t.contiguous(memory_format=torch.channels_last) for t in (x, shortcut))
    weight, bias, mean, var = (torch.rand(channels, generator=draw) + 0.1 for _ in range(4))
    return x, shortcut, Norm(weight, bias - 0.5, mean, var, 0.1, 1e-5, batch, top)


def one_after_the_other(x: Tensor, shortcut: Tensor | None, norm: Norm, table: Tensor,
                        kind: native.Kind) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.batch, norm.share, norm.eps)
    y = rectify(y if shortcut is None else y + shortcut, norm.top)
    return y, quantize(y, table, kind)


def gradients(made: tuple[Tensor, Tensor], wanted: list[Tensor], others: bool) -> list[Tensor]:
    """Of the quantized result, and of the ReLU's if somebody else reads it."""
    y, quantized = made
    draw = torch.Generator().manual_seed(3)
    loss = (quantized * torch.randn(y.shape, generator=draw)).sum()
    if others:
        loss = loss + (y * torch.randn(y.shape, generator=draw)).sum()
    return list(torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("top", TOPS.values(), ids=TOPS)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("last", [False, True], ids=["apart", "last"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("added", "alone", "batch"), [
    (False, True, True), (False, False, True), (True, False, True), (True, True, False),
])  # fmt: skip
def test_all_is_that_of_one_after_the_other(shape, last, kind, top, added, alone, batch):
    x, shortcut, norm = case(shape, last, batch=batch, top=top)
    truth = norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
    table = table_of(kind, 4)
    wanted = [x, norm.weight, norm.bias, table, *([shortcut] if added else [])]
    for t in wanted:
        t.requires_grad_()
    extra = shortcut if added else None
    ours = norm_and_quantize(x, table, kind, norm, extra, alone=alone)
    if last and shape[1] % 16:
        assert ours is None
        return
    exact = one_after_the_other(x, extra, truth, table, kind)
    near = {"rtol": 1e-5, "atol": 1e-5} if last and batch else {"rtol": 0, "atol": 0}  # torch adds up in another order there
    torch.testing.assert_close(ours[0], exact[1] if alone and not added else exact[0], **near)
    torch.testing.assert_close(ours[1], exact[1], **near)
    torch.testing.assert_close(norm[:4], truth[:4], rtol=1e-6, atol=1e-6)
    assert ours[0].stride() == ours[1].stride() == x.stride()
    assert (ours[0] is ours[1]) is (alone and not added)
    others = added or not alone
    for one, other in zip(gradients(ours, wanted, others), gradients(exact, wanted, others), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * x.numel() ** 0.5)


@pytest.mark.parametrize("last", [False, True])
def test_gradients_are_those_of_float64(last):
    x, _, norm = case((8, 16, 9, 9), last)
    table, grad = table_of(0, 3), torch.randn(8, 16, 9, 9, generator=torch.Generator().manual_seed(5))
    facts = native.room_for_facts(x)
    native.normalize(x, norm, facts, table, 0)
    to_x, _, to_weight, to_bias, _ = native.normalize_backward(grad, x, norm, facts, table, 0)
    exact = [t.double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    y = F.batch_norm(exact[0], None, None, *exact[1:], True, eps=norm.eps).relu()
    inside = y.detach() <= float(codebook.levels_of(table, 0)[-1])
    for one, other in zip((to_x, to_weight, to_bias), torch.autograd.grad(y, exact, grad.double() * inside), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-6 * float(other.abs().max()))


@pytest.mark.parametrize("top", TOPS.values(), ids=TOPS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(("added", "alone", "inplace"), [
    (False, True, True), (False, False, True), (True, False, False), (True, True, True),
])  # fmt: skip
def test_lookups(top, last, batch, added, alone, inplace):
    x, shortcut, norm = case((3, 16, 9, 5), last, batch=batch, top=top)
    truth = norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())
    levels = codebook.levels_of(table_of(0, 5), 0)
    extra = shortcut if added else None
    y, quantized = one_after_the_other(x, extra, truth, levels, None)
    before, version = x.clone(), x._version
    ours = norm_and_lookup(x, levels, codebook.midpoints(levels), None, norm, extra, inplace=inplace, alone=alone)
    near = {"rtol": 1e-5, "atol": 1e-5} if last and batch else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(ours[0], quantized if alone else y, **near)
    torch.testing.assert_close(ours[1], quantized, **near)
    assert (ours[0].data_ptr() == x.data_ptr()) is inplace and (x._version > version) is inplace
    assert inplace or torch.equal(x, before)


def test_the_bits_depend_on_no_thread_count():
    before = torch.get_num_threads()
    for last in (False, True):
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, shortcut, norm = case((3, 32, 40, 30), last)
            table = table_of(0, 4).requires_grad_()
            y, quantized = norm_and_quantize(x.requires_grad_(), table, 0, norm, shortcut)
            found.append((y, quantized, norm.running_var, *torch.autograd.grad((y + quantized).square().sum(), (x, table))))
        torch.set_num_threads(before)
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_what_a_quantizer_hands_on_is_made_again_with_the_same_bits():
    x, _, norm = case((3, 16, 40, 40), False)
    _, quantized = norm_and_quantize(x.requires_grad_(), table_of(0).requires_grad_(), 0, norm, alone=True)
    mean = norm.running_mean.clone()
    assert torch.equal(quantized._nulsq_way(), quantized) and torch.equal(norm.running_mean, mean)


def test_a_spent_gradient_becomes_the_shortcuts():
    x, shortcut, norm = case((2, 16, 5, 5), False)
    table, grad, facts = table_of(0), torch.randn(2, 16, 5, 5), native.room_for_facts(x)
    y = torch.empty_like(x)
    native.normalize(x, norm, facts, table, 0, shortcut=shortcut, relu=y)
    kept = native.normalize_backward(grad.clone(), x, norm, facts, table, 0, y=y)
    spent = native.normalize_backward(grad, x, norm, facts, table, 0, y=y, spent=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, spent, strict=True))
    assert spent[1].data_ptr() == grad.data_ptr() and spent[0].data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_derivative_of_the_derivative(added, batch, frozen):
    found = []
    for way in (norm_and_quantize, lambda x, table, kind, norm, extra: one_after_the_other(x, extra, norm, table, kind)):
        x, shortcut, norm = case((3, 4, 5, 5), False, batch=batch)
        table = table_of(0).requires_grad_()
        wanted = [x, table, *([] if frozen else norm[:2]), *([shortcut] if added else [])]
        for t in wanted:
            t.requires_grad_()
        y, quantized = way(x, table, 0, norm, shortcut if added else None)
        (first,) = torch.autograd.grad((y * quantized.sin()).sum(), x, create_graph=True)
        found.append([first, *torch.autograd.grad(first.square().sum(), wanted)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_only_one_of_the_results_is_of_use():
    for use in (0, 1):
        found = []
        for way in (norm_and_quantize, lambda x, table, kind, norm: one_after_the_other(x, None, norm, table, kind)):
            x, _, norm = case((3, 4, 5, 5), False)
            table = table_of(0).requires_grad_()
            made = way(x.requires_grad_(), table, 0, norm)
            found.append(torch.autograd.grad(made[use].square().sum(), (x, table), allow_unused=True))
        assert (found[0][1] is None) is (use == 0)
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)


def test_what_no_loop_takes_is_left_alone():
    x, shortcut, norm = case((2, 16, 4, 4), False)
    table = table_of(0)
    last = shortcut.contiguous(memory_format=torch.channels_last)
    seen = norm.running_mean.clone()
    assert norm_and_quantize(x, table, 0, norm, last) is None  # in another memory order
    assert norm_and_quantize(x, table, 0, norm, shortcut[:1]) is None  # which torch would repeat
    assert norm_and_quantize(x.double(), table, 0, norm) is None
    for channels in (8, 32):  # torch says what is wrong
        assert norm_and_quantize(torch.randn(2, channels, 4, 4), table, 0, norm) is None
    assert norm_and_quantize(x[..., ::2], table, 0, norm) is None
    assert norm_and_quantize(x[:1, :, :1, :1], table, 0, norm) is None  # one number per channel, which torch refuses
    assert norm_and_quantize(x, table.requires_grad_(), 0, norm) is None  # only the table learns
    fast.use(False)
    assert norm_and_quantize(x, table, 0, norm) is None
    fast.use(True)
    assert torch.equal(norm.running_mean, seen)
