from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nulsq_cli.errors import UsageError
from nulsq_cli.exporters import grids
from nulsq_cli.exporters.trace import Site
from nulsq_cli.ops import codebook
from nulsq_cli.ops.bits import pack
from tests.exporters.nets import packed

gaps = st.lists(st.floats(0.0625, 2, width=32), min_size=2, max_size=15)


class Packed:
    """As much of a packed file as the tables of one layer need."""

    def __init__(self, levels=None, thresholds=None, weights=None, bits=4):
        weights = torch.tensor([-1.3, -0.4, 0.0, 0.77]) if weights is None else weights
        self.weight_codes = (torch.arange(8 * len(weights)).view(8, -1) % len(weights)).to(torch.uint8)
        self.tensors = {"a.act.levels": levels, "a.act.thresholds": thresholds, "a.weight.levels": weights}
        self.meta = {"layers": {"a": {"act_bits": bits, "weight_bits": bits, "act_counts": None,
                                      "shape": list(self.weight_codes.shape)}}}  # fmt: skip

    def codes(self, layer):
        return self.weight_codes


def table(steps, below):
    """Ascending levels around an exact 0."""
    values = torch.tensor([0.0, *steps]).cumsum(0)
    return values - values[below]


@given(gaps, st.integers(0, 15), st.sampled_from(["where", "sum8", "table"]), st.sampled_from([7, 8]))
def test_an_input_is_placed_near_its_level_and_within_a_byte(steps, below, act, reach):
    levels = table(steps, min(below, len(steps)))
    thresholds = codebook.midpoints(levels)
    found = grids.inputs(Packed(levels, thresholds), Site(None, "a"), act, reach)
    assert 0 <= found.zero <= 255 and int(found.stored[0]) >= 0 and found.top <= (127 if reach == 7 else 255)
    assert bool((found.stored.diff() > 0).all())
    x = torch.linspace(float(levels[0]) - 1, float(levels[-1]) + 1, 500)
    near = 0 if found.form == "where" else 0.6 * found.cell if found.form != "even" else 1e-2 * found.scale
    away = (x[:, None] - thresholds).abs().amin(1) > near
    exact = codebook.encode(x, thresholds)
    assert torch.equal(found.place(x)[away], (found.stored - found.zero).float()[exact.int()][away])


@given(st.integers(2, 8), st.floats(0.015625, 3, width=32), st.booleans())
def test_even_steps_need_no_table(bits, step, signed):
    levels = (torch.arange(2**bits) - (2 ** (bits - 1) if signed else 0)).float() * step
    found = grids.inputs(Packed(levels, codebook.midpoints(levels), bits=bits), Site(None, "a"), "where", 7)
    assert found.form == "even" and found.stored.tolist() == list(range(2**bits))
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)) * step * 2**bits
    away = (x[:, None] - codebook.midpoints(levels)).abs().amin(1) > 1e-4 * step
    expected = codebook.lookup(x, levels, codebook.midpoints(levels))
    torch.testing.assert_close((found.place(x) * found.scale)[away], expected[away])


@given(st.lists(st.floats(0.0625, 2, width=32), min_size=3, max_size=15), st.sampled_from([15, 127, 255]), st.data())
def test_two_products_fit_16_bits_unless_the_weight_is_stored_wide(steps, top, data):
    levels = table(steps, len(steps) // 2)
    gain = torch.tensor(data.draw(st.lists(st.sampled_from([-2.0, -0.5, 0.0, 1.0]), min_size=8, max_size=8)), dtype=torch.float64)
    w = grids.weights(Packed(weights=levels), Site(None, "a", gain, torch.zeros(8)), top, 7)
    assert w.offset == 128 or 2 * top * w.largest() <= 32767
    value = w.integer() * w.per_output(w.scale)
    wanted = levels[w.codes.int()] * w.per_output(gain).float()
    assert float((value - wanted).abs().max()) <= 2 * float(w.scale.abs().max()) * len(levels)
    assert bool((value[gain == 0] == 0).all()) and int(w.integer().min()) >= -128 and int(w.integer().max()) <= 127


def test_a_bias_beyond_32_bits_stays_what_it_is_and_switches_its_channel_off():
    gain = torch.tensor([1.0, 1e-8, -1e-8, 0.5, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    levels = torch.tensor([-0.2, -0.05, 0.0, 0.1])
    artifact = Packed(levels.abs().sort().values, codebook.midpoints(levels.abs().sort().values), levels, bits=2)
    site = Site(None, "a", gain, torch.zeros(8))
    x = grids.inputs(artifact, site, "where", 7)
    w = grids.weights(artifact, site, x.top, 7)
    bias = torch.tensor([0.3, 0.5, -0.7, 0.0, 1e-6, -2.0, 9.0, 0.1])
    roomy = grids.with_room(w, bias, x)
    assert (roomy.sign == 0).tolist() == [False, True, True, False, False, False, False, True]
    whole = (bias.double() / (roomy.scale.double() * x.scale)).round()
    assert whole.abs().max() <= 2**31 - 1 - int(roomy.integer().abs().flatten(1).sum(1).max()) * x.top
    torch.testing.assert_close((whole * roomy.scale.double() * x.scale).float(), bias, rtol=1e-6, atol=1e-5)
    assert grids.with_room(w, None, x) is w and torch.equal(roomy.scale[[0, 3]], w.scale[[0, 3]])


def test_256_even_levels_keep_all_their_integers():
    levels = (torch.arange(256) - 128).float() * 0.02
    artifact = Packed(weights=levels, bits=8)
    artifact.weight_codes = torch.arange(256).to(torch.uint8).view(8, 32)
    gain = torch.tensor([-1.0, *[1.0] * 7], dtype=torch.float64)
    for reach, offset in ((7, 128), (8, 0)):
        w = grids.weights(artifact, Site(None, "a", gain, torch.zeros(8)), 255, reach)
        assert w.even and w.offset == offset
        torch.testing.assert_close(w.integer() * w.per_output(w.scale), levels[w.codes.int()] * w.per_output(gain).float())
        assert int(w.integer().min()) >= -128 and int(w.integer().max()) <= 127


def test_integers_that_were_trained_are_taken_as_they_are():
    levels = torch.tensor([0.0, 0.25, 0.75, 2.0])
    artifact = Packed(levels, codebook.midpoints(levels), levels, bits=2)
    artifact.tensors |= {
        "a.act.levels_q8": torch.tensor([0, 25, 75, 200], dtype=torch.uint8), "a.act.scale": torch.tensor(0.01),
        "a.act.zero_point": torch.tensor(0, dtype=torch.uint8),
        "a.weight.levels_i8": torch.tensor([0, 15, 45, 120], dtype=torch.int8), "a.weight.scale": torch.tensor(2 / 120),
    }  # fmt: skip
    found = grids.inputs(artifact, Site(None, "a"), "where", 7)
    assert found.stored.tolist() == [0, 25, 75, 200]
    w = grids.weights(artifact, Site(None, "a"), found.top, 7)
    assert w.integers.tolist() == [0, 15, 45, 120] and w.offset == 128


def test_many_comparisons_are_refused_with_the_form_that_takes_any_width():
    levels = torch.linspace(0, 1, 32).square()
    artifact = Packed(levels, codebook.midpoints(levels), bits=5)
    for act in ("where", "sum8"):
        with pytest.raises(UsageError, match=f"--act {act}.*\n.*--act table"):
            grids.inputs(artifact, Site(None, "a"), act, 7)
    assert grids.inputs(artifact, Site(None, "a"), "table", 7).top <= 127


def test_codes_take_their_own_width_in_the_file():
    from nulsq_cli.exporters.lower import Options, lower
    from nulsq_cli.exporters.onnx_file import build
    from nulsq_cli.exporters.trace import trace

    pytest.importorskip("onnx")
    for bits in ("2/2", "3/3"):
        model, artifact = packed("resnet8_cifar", bits)
        network = lower(trace(model, (3, 16, 16)), artifact, Options(act="where", outputs=False))
        constants = {t.name: t for t in build(network, artifact, [3, 16, 16]).graph.initializer}
        for name, entry in artifact.meta["layers"].items():
            stored, wanted = constants[f"{name}.weight.codes"].raw_data, artifact.tensors[f"{name}.weight.codes"].numpy()
            assert abs(len(stored) - len(wanted)) <= 2
            if entry["weight_bits"] == 3:
                assert stored[: len(wanted)] == wanted.tobytes() == pack(artifact.codes(name).numpy(), 3).tobytes()
