"""What holds on an int8 grid, for every method there is and every one that will be added to the table."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from nulsq_cli import artifact
from nulsq_cli.initializers import measure
from nulsq_cli.methods import METHODS, make_quantizer
from nulsq_cli.models import create_float_model, float_info
from nulsq_cli.ops import codebook, integer
from nulsq_cli.values import Bits, QuantSpec
from tests.laws.test_quantizers import data
from tests.test_convert import policy, quantized

SIDES = (("weight", True, "tensor"), ("weight", True, "channel"), ("activation", True, "tensor"),
         ("activation", False, "tensor"))  # fmt: skip


def can(method: str, spec: QuantSpec) -> bool:
    widths = Bits(spec.bits, 2) if spec.role == "weight" else Bits(2, spec.bits)
    signed = spec.signed if spec.role == "activation" else None
    return METHODS[method].complaint(widths, spec.granularity, signed, spec.grid) is None


CASES = [
    pytest.param(method, spec, id=f"{method}-{bits}-{role}-{'signed' if signed else 'unsigned'}-{granularity}")
    for method in METHODS for bits in (2, 4, 7, 8) for role, signed, granularity in SIDES
    for spec in [QuantSpec(bits, signed, role, granularity, 3 if granularity == "channel" else 1, "int8")]
    if can(method, spec) and (bits < 7 or granularity == "tensor")
]  # fmt: skip


def started(method: str, spec: QuantSpec, learned: bool = False):
    quantizer = make_quantizer(method, spec)
    stats = measure(data(spec), spec.channels)
    quantizer.initialize(stats, "lloyd")
    quantizer.place_on_grid(stats, data(spec) if spec.role == "weight" else None)
    if learned:
        generator = torch.Generator().manual_seed(9)
        for p in [*quantizer.parameters(), *(b for name, b in quantizer.named_buffers() if name == "basis")]:
            p.data.mul_(1 + 0.3 * torch.rand(p.shape, generator=generator))
        quantizer.after_step()
    return quantizer


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(("method", "spec"), CASES)
def test_outputs_are_the_scale_times_integers_in_training_and_evaluation(method, spec, learned):
    quantizer, x = started(method, spec, learned), data(spec, 1).sort(1).values
    tables = quantizer.codebook(x)
    lowest, highest = integer.limits(spec)
    integers, scale = tables.integers, tables.scale.view(spec.channels, 1)
    assert (tables.scale > 0).all() and scale.dtype == torch.float32
    assert (integers.diff(dim=-1) > 0).all() and lowest <= int(integers.min()) and int(integers.max()) <= highest
    own = quantizer.own_codebook(x)
    assert "grid_top" in quantizer.state_dict()  # what a continued run needs
    assert torch.equal(tables.levels, integers.float() * tables.scale[..., None])
    assert (tables.levels[own.levels == 0] == 0).all()
    assert tables.thresholds.isfinite().all() and (tables.thresholds.diff(dim=-1) >= 0).all()
    for mode in (False, True):
        twin = deepcopy(quantizer).train(mode)
        y = twin(x).detach().view(spec.channels, -1)
        place = y / scale
        assert (place - place.round()).abs().max() < 2e-4
        assert (y.view(3, -1).diff(dim=1) >= -1e-6 * y.abs().max()).all()
        assert torch.isin(place.round().unique(), integers.float().unique()).all()
    evaluated = codebook.decode(codebook.encode(x, tables.thresholds), tables.levels)
    assert torch.equal(deepcopy(quantizer).eval()(x), evaluated)
    if not quantizer.learned_shape:
        torch.testing.assert_close(tables.levels, own.levels, rtol=1e-5, atol=1e-6 * float(own.levels.abs().max()))


@pytest.mark.parametrize(("method", "spec"), CASES)
def test_training_and_evaluation_agree_away_from_thresholds(method, spec):
    quantizer, x = started(method, spec, learned=True), data(spec, 2)
    tables = quantizer.codebook(x)
    gap = (x.view(spec.channels, -1, 1) - tables.thresholds.view(spec.channels, 1, -1)).abs().amin(2).view(x.shape)
    sure = gap > 1e-5 * tables.levels.abs().max()
    trained, evaluated = (deepcopy(quantizer).train(mode)(x).detach() for mode in (True, False))
    torch.testing.assert_close(trained[sure], evaluated[sure], rtol=1e-6, atol=2e-7 * float(tables.levels.abs().max()))


@pytest.mark.parametrize(("method", "spec"), [c for c in CASES if c.values[1].bits == 4])
def test_gradients_pass_the_grid(method, spec):
    quantizer, x = started(method, spec, learned=True).train(), data(spec, 3).requires_grad_()
    (quantizer(x) * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    if quantizer.learned_shape:
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in quantizer.steps())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_one_bit_more_than_a_method_says_is_refused(method):
    weights, *inputs = METHODS[method].widest_on_grid
    for role, signed, width in (("weight", True, weights), ("activation", False, inputs[0]), ("activation", True, inputs[1])):
        assert can(method, QuantSpec(width, signed, role, grid="int8"))
        if width < 8:
            assert not can(method, QuantSpec(width + 1, signed, role, grid="int8"))


@pytest.mark.parametrize("method", METHODS)
def test_the_packed_file_computes_what_the_model_computes(method, tmp_path):
    torch.manual_seed(0)
    model, _ = quantized(create_float_model("resnet8_cifar"), (3, 16, 16), policy("3/3", method, grid="int8"))
    meta = {"arch": float_info(model)["architecture"], "arch_kwargs": {}, "num_classes": 10, "data_cfg": {}, "bits": "3/3",
            "method": method}  # fmt: skip
    artifact.save(tmp_path / "a.safetensors", model.eval(), meta)
    fresh, packed = artifact.load(tmp_path / "a.safetensors")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    assert packed.meta["grid"] == "int8"
    for name in packed.meta["layers"]:
        t = {key.removeprefix(f"{name}."): value for key, value in packed.tensors.items() if key.startswith(f"{name}.")}
        assert torch.equal(t["weight.levels"], t["weight.levels_i8"].float() * t["weight.scale"])
        assert torch.equal(t["act.levels"], (t["act.levels_q8"].float() - t["act.zero_point"].float()) * t["act.scale"])
