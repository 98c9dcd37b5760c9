from itertools import product

import pytest
import torch

from nulsq_cli.initializers import measure
from nulsq_cli.methods import make_quantizer
from nulsq_cli.values import QuantSpec

SPECS = [QuantSpec(bits, role == "weight", role) for bits in (2, 3, 4) for role in ("weight", "activation")]


def started(spec: QuantSpec, x: torch.Tensor, rule: str = "paper"):
    quantizer = make_quantizer("lq-nets", spec)
    quantizer.initialize(measure(x, spec.channels), rule)
    return quantizer.train()


def data(spec: QuantSpec, seed: int = 0) -> torch.Tensor:
    x = torch.randn(600, generator=torch.Generator().manual_seed(seed))
    return x if spec.signed else x.relu()


def by_enumeration(x: torch.Tensor, basis: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest sum and its code for every entry, out of all there are; float64."""
    codes = torch.tensor(list(product((-1.0, 1.0) if signed else (0.0, 1.0), repeat=len(basis))), dtype=torch.float64)
    sums = codes @ basis.double()
    nearest = (x.double()[:, None] - sums).abs().argmin(1)
    return sums[nearest], codes[nearest]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_training_forward_rounds_first_and_then_moves_the_basis_by_the_normal_equations(spec):
    x = data(spec, 1)
    quantizer = started(spec, data(spec))
    quantizer.basis.mul_(torch.linspace(0.8, 1.3, spec.bits))  # an uneven table, as after some training
    before = quantizer.basis.clone().double()
    y, b = by_enumeration(x, before[0], spec.signed)
    torch.testing.assert_close(quantizer(x).double(), y, rtol=1e-6, atol=1e-6)
    fitted = torch.linalg.solve(b.T @ b + 1e-4 * torch.eye(spec.bits), b.T @ x.double() + 1e-4 * before[0])
    torch.testing.assert_close(quantizer.basis[0].double(), 0.9 * before[0] + 0.1 * fitted, rtol=1e-6, atol=1e-7)
    assert not torch.equal(quantizer.basis.double(), before)


def test_each_output_channel_has_its_own_basis():
    w = torch.randn(3, 2, 5, 5) * torch.tensor([0.1, 1, 3]).view(3, 1, 1, 1)
    together = started(QuantSpec(3, True, "weight", "channel", 3), w)
    y = together(w)
    for i in range(3):
        alone = started(QuantSpec(3, True, "weight"), w[i])
        torch.testing.assert_close(y[i], alone(w[i]))
        torch.testing.assert_close(together.basis[i], alone.basis[0])


def test_evaluation_and_other_peoples_gradients_leave_the_basis_alone():
    spec = QuantSpec(3, False)
    quantizer = started(spec, data(spec)).eval()
    before = quantizer.basis.clone()
    quantizer(data(spec))
    quantizer.after_step()
    assert torch.equal(quantizer.basis, before)
    assert quantizer.steps() == [] and "basis" in quantizer.state_dict()


def test_the_gradient_passes_weights_unchanged_and_inputs_up_to_the_end_of_the_table():
    for spec, passes in (
        (QuantSpec(2, True, "weight"), [1, 1, 1, 1, 1]),
        (QuantSpec(2, False), [1, 1, 1, 1, 0]),
        (QuantSpec(2, True), [0, 1, 1, 1, 0]),
    ):
        quantizer = started(spec, data(spec))
        top = quantizer.levels()[-1].item()
        x = torch.tensor([-2 * top, -0.1 * top, 0, 0.9 * top, 1.1 * top], requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad.tolist() == passes


def test_a_digit_that_never_occurs_stays_where_it_is():
    quantizer = started(QuantSpec(3, False), data(QuantSpec(3, False)))
    quantizer.basis.copy_(torch.tensor([[0.1, 0.2, 4.0]]))
    quantizer(torch.linspace(0, 0.32, 50))
    assert quantizer.basis[0, 2].item() == pytest.approx(4, rel=1e-6)
    assert quantizer.basis.isfinite().all()


def test_a_basis_of_any_sign_and_order_gives_a_sorted_table():
    quantizer = make_quantizer("lq-nets", QuantSpec(2, False))
    quantizer.basis.copy_(torch.tensor([[1.0, -0.25]]))
    assert quantizer.levels().tolist() == [-0.25, 0, 0.75, 1]
    assert quantizer(torch.tensor([0.8, 0.1, -3])).tolist() == [0.75, 0, -0.25]


def test_the_authors_start():
    w = torch.randn(4000)
    weights = started(QuantSpec(3, True, "weight"), w)
    unit = 0.6745 * w.std() / 4
    torch.testing.assert_close(weights.basis[0], unit * torch.tensor([1.0, 2, 4]))
    inputs = started(QuantSpec(2, False), w.relu())
    torch.testing.assert_close(inputs.basis[0], 2 * 0.6745 / 3 * torch.tensor([1.0, 2]))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fitting_in_turn_comes_to_rest_below_where_it_started(spec):
    x = data(spec) * 7
    errors = {}
    for rule in ("paper", "mse", "lloyd"):
        quantizer = started(spec, x, rule)
        errors[rule] = by_enumeration(x, quantizer.basis[0], spec.signed)[0].sub(x).square().mean()
    assert errors["lloyd"] < errors["paper"] and errors["lloyd"] < 1.05 * errors["mse"]
    _, b = by_enumeration(x, quantizer.basis[0], spec.signed)
    best = torch.linalg.lstsq(b, x.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(quantizer.basis[0].double(), best, rtol=0.03, atol=0.01)
