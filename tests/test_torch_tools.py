"""What torch does with any model it does with a quantized one: transforms, traces, copies, modes, gradient checkpointing."""

from __future__ import annotations

import copy
import io
from contextlib import ExitStack, nullcontext

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from nulsq_cli.layers import quant_layers, weights_together
from nulsq_cli.pairing import one_operation, pair
from nulsq_cli.rectified import QuantReLU
from tests.paired import IMAGES, paired_and_plain, quantized


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def parametrized(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    parametrize.register_parametrization(model.convs[1], "weight", nn.Identity())
    return model


def counted(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() > 0
    return y


TOOLS = {
    "deepcopy": lambda model, x: copy.deepcopy(model)(x),
    "torch.save": lambda model, x: saved(model)(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, torch.randn_like(x))(x),
    "export": lambda model, x: torch.export.export(model, (torch.randn_like(x),)).module()(x),
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model)(x),
    "feature extraction": lambda model, x: create_feature_extractor(model, ["acts.2", "head"])(x)["head"],
    "functional_call": lambda model, x: torch.func.functional_call(model, dict(model.named_parameters()), (x,)),
    "vmap": lambda model, x: torch.vmap(lambda one: model(one[None])[0])(x),
    "flop counter": counted,
    "parametrize": lambda model, x: parametrized(model)(x),
    "share_memory": lambda model, x: copy.deepcopy(model).share_memory()(x),
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),
}


UNABLE = {
    ("export", torch.inference_mode): "not even with a float model",
    ("flop counter", torch.inference_mode): "not with any module that is given a parameter, as quantizers of weights are",
    ("vmap", nullcontext): "torch wants autograd functions to be written for it, and says so",
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_computes_what_the_model_does(tool, mode):
    model = quantized()
    pair(model, IMAGES)
    model.eval()
    with torch.no_grad():
        truth = model(IMAGES)
    if (tool, mode) in UNABLE:
        pytest.skip(UNABLE[tool, mode])
    with mode():
        y = TOOLS[tool](model, IMAGES)
    torch.testing.assert_close(y.detach(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_without_memory_there_are_shapes(train):
    model = quantized()
    pair(model, IMAGES)
    model.train(train)
    assert copy.deepcopy(model).to("meta")(IMAGES.to("meta")).shape == (4, 5)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert model(fake.from_tensor(IMAGES)).shape == (4, 5)


def test_a_trace_calls_layers_and_relus_as_a_whole():
    model = quantized()
    pair(model, IMAGES)
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert {name for name, m in model.named_modules() if type(m) is QuantReLU} <= set(called)
    assert set(quant_layers(model)) <= set(called) and set(quant_layers(traced)) == set(quant_layers(model))


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("changed", [None, *(f"acts.{k}" for k in range(5)), "norms.0", "convs.0", "convs.2"])
def test_in_inference_mode_a_change_in_place_is_seen(changed, one):
    """Tensors have no version there."""
    found = []
    for model in paired_and_plain():
        model.eval()
        if changed is not None:
            model.get_submodule(changed).register_forward_hook(lambda m, args, y: y.mul_(1.5))
        with torch.inference_mode(), one_operation(model, IMAGES) if one and hasattr(model, "_nulsq_paired") else nullcontext():
            found.append(model(IMAGES))
    assert torch.equal(*found)


class Blocks(nn.Sequential):
    """What one part hands on, a ReLU quantizes for the next one; the second part ends in the middle of such a pair."""

    def __init__(self) -> None:
        conv = lambda: nn.Conv2d(3, 3, 3, padding=1, bias=False)  # noqa: E731
        end = lambda: (nn.BatchNorm2d(3), nn.ReLU(inplace=True))  # noqa: E731
        super().__init__(
            nn.Sequential(conv(), *end()), nn.Sequential(conv(), nn.BatchNorm2d(3)),
            nn.Sequential(nn.ReLU(), conv(), *end(), conv(), *end()), nn.Sequential(conv(), nn.Flatten(), nn.Linear(108, 5)),
        )  # fmt: skip

    again = reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint_sequential(list(self), len(self), x, use_reentrant=self.reentrant) if self.again else super().forward(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["nothing", "a run", "a run, backward, too"])
def test_gradient_checkpointing_changes_no_gradient(reentrant, inside):
    truth, model = quantized(of=Blocks), quantized(of=Blocks)
    model.again, model.reentrant = True, reentrant
    pair(model, IMAGES)
    assert sum(type(m) is QuantReLU for m in model.modules()) == 4
    found = []
    for net in (model, truth):
        x = IMAGES.clone().requires_grad_()
        with ExitStack() as stack:
            if net is model and inside != "nothing":
                stack.enter_context(one_operation(net, IMAGES))
                stack.enter_context(weights_together(net))
            y = net(x)
            if inside != "a run":
                y.square().sum().backward()
        if inside == "a run":
            y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in net.parameters() if p.requires_grad)])
    torch.testing.assert_close(*found)


def test_gradient_checkpointing_keeps_nothing(monkeypatch):
    """Not what layers would make again, either."""
    monkeypatch.setattr("nulsq_cli.ops.remake.WORTH_MAKING_TWICE", 0)
    kept, model = [], quantized()
    pair(model, IMAGES)
    x = IMAGES.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = checkpoint(model, x, use_reentrant=False)
    assert set(kept) <= {x.data_ptr()}
    y.sum().backward()
    assert x.grad.abs().sum() > 0
