"""Inside of a run modules do the work of others, whatever becomes of the model meanwhile and whoever uses its parts."""

from __future__ import annotations

import copy
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from nulsq_cli.pairing import one_operation, pair
from nulsq_cli.rectified import QuantNorm
from tests.paired import IMAGES, Net, paired_and_plain, quantized

pytestmark = pytest.mark.usefixtures("loops")


class Changing(Net):
    """Between a BatchNorm and its ReLU something is done, or not; by keyword or not."""

    def __init__(self) -> None:
        super().__init__()
        self.doubled, self.times, self.mask, self.wanted = False, 1, None, []

    def forward(self, x: torch.Tensor, also: bool = False) -> torch.Tensor:
        x = self.norms[0](self.convs[0](input=x))
        if self.doubled or self.times == 2 or self.mask is not None or self.wanted or also:
            x = 2 * x
        return self.convs[1](input=self.acts[0](input=x))


def patched(module: nn.Module) -> None:
    """Its result is doubled."""
    before = module.forward
    module.forward = lambda input: 2 * before(input)


CHANGES = {
    "nothing": lambda model: None,
    "True": lambda model: setattr(model, "doubled", True),
    "a number": lambda model: setattr(model, "times", 2),
    "a tensor": lambda model: setattr(model, "mask", torch.ones(1)),
    "a list": lambda model: model.wanted.append(1),
    "forward of the model": lambda model: setattr(model, "forward", lambda x: type(model).forward(model, x, also=True)),
    "forward of a class": lambda model: setattr(model, "__class__", type("Other", (Changing,), {
        "forward": lambda self, x: Changing.forward(self, x, also=True)})),
    **{f"forward of {name}": lambda model, name=name: patched(model.get_submodule(name))
       for name in ("acts.0", "norms.0", "convs.1")},
    "forward of a quantizer": lambda model: patched(model.convs[1].input_quantizer),
    "compiled": lambda model: model.acts[0].compile(backend="eager"),
    "no layers": lambda model: setattr(model, "convs", nn.ModuleList([nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)])),
}  # fmt: skip


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_goes_another_way_later_computes_so(change, inside):
    found = []
    for paired in (True, False):
        model = quantized(of=Changing)
        if paired:
            pair(model, IMAGES)
            assert isinstance(model.norms[0], QuantNorm)
        torch.manual_seed(0)
        if not inside:
            CHANGES[change](model)
        with one_operation(model, IMAGES) if paired else nullcontext():
            if inside:
                CHANGES[change](model)
            y = model(IMAGES)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_an_argument_may_change_the_way():
    found = []
    for paired in (True, False):
        model = quantized(of=Changing)
        with one_operation(model, IMAGES) if paired else nullcontext():
            found.append(model(IMAGES, also=True))
    assert torch.equal(*found)


class Keeping(Net):
    """Somebody else reads its features, too."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norms[0](self.convs[0](x))
        self.kept = [x]
        x = self.acts[0](x)
        self.feature = {"act": x}
        return self.convs[1](x)


def test_features_that_a_model_keeps_are_its_own():
    found = []
    for paired in (True, False):
        model = quantized(of=Keeping)
        with one_operation(model, IMAGES) if paired else nullcontext():
            y = model(IMAGES)
        (y.square().sum() + model.feature["act"].square().sum() + model.kept[0].abs().sum()).backward()
        found.append([*model.kept, model.feature["act"], *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(*found)


def test_what_is_made_of_a_model_inside_of_a_run_is_another_one(tmp_path):
    model = quantized()
    with one_operation(model, IMAGES):
        other = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    plain = quantized()
    for one in (other, read):
        torch.testing.assert_close(one.norms[0](one.convs[0](IMAGES)), plain.norms[0](plain.convs[0](IMAGES)))
        seen = []
        one.norms[0].register_forward_hook(lambda m, args, y, seen=seen: seen.append(float(y.detach().min())))
        one(IMAGES)
        assert seen[0] < 0


def test_several_threads_may_run_one_model():
    model = quantized().eval()
    plain = copy.deepcopy(model)
    pair(model, IMAGES)  # torch's traces change all modules for a moment
    with torch.no_grad():
        truth, part = plain(IMAGES), plain.norms[0](plain.convs[0](IMAGES))

        def work(whole: bool) -> bool:
            for _ in range(20):
                if whole:
                    with torch.no_grad(), one_operation(model, IMAGES):
                        if not torch.allclose(model(IMAGES), truth, atol=1e-5):
                            return False
                elif not torch.allclose(model.norms[0](model.convs[0](IMAGES)), part, atol=1e-5):
                    return False
            return True

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            with ThreadPoolExecutor(4) as pool:
                assert all(pool.map(work, (True, False, True, True)))
        finally:
            sys.setswitchinterval(before)
    assert "forward" not in model.__dict__


def test_inside_of_a_run_parts_that_somebody_else_calls_are_as_they_were():
    paired, plain = paired_and_plain()
    with one_operation(paired, IMAGES):
        for model in (paired, plain):
            model.part = model.norms[0](model.convs[0](IMAGES))
    torch.testing.assert_close(paired.part, plain.part)
    assert paired.part.min() < 0 and "forward" not in paired.__dict__
