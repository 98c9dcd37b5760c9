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
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from nulsq_cli.layers import quant_layers, standing_still, weights_together
from nulsq_cli.pairing import one_operation, pair
from nulsq_cli.rectified import QuantNorm, QuantReLU
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
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
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


def test_transforms_find_the_gradients_of_evaluation():
    model = quantized()
    pair(model, IMAGES)
    x = IMAGES.clone().requires_grad_()
    model.eval()(x).sum().backward()
    assert x.grad.any()
    torch.testing.assert_close(torch.func.grad(lambda x: model(x).sum())(IMAGES), x.grad, rtol=1e-4, atol=1e-5)
    each = torch.vmap(torch.func.grad(lambda one: model(one[None]).sum()))(IMAGES)
    torch.testing.assert_close(each, x.grad, rtol=1e-4, atol=1e-5)
    _, along = torch.func.jvp(model, (IMAGES,), (IMAGES,))
    torch.testing.assert_close(along.sum(), (x.grad * IMAGES).sum(), rtol=1e-4, atol=1e-4)


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


WHERE = {
    "nowhere": lambda model, change: None,
    **{name: lambda model, change, name=name: model.get_submodule(name).register_forward_hook(change)
       for name in (*(f"acts.{k}" for k in range(5)), "norms.0", "convs.0", "convs.2", "acts", "")},
    "everywhere": lambda model, change: nn.modules.module.register_module_forward_hook(
        lambda m, args, y: change(m, args, y) if type(m) in (nn.ReLU, QuantReLU) else None),
}  # fmt: skip


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("where", WHERE)
def test_a_change_in_place_is_seen(where, one, mode):
    """Also in inference mode, where tensors have no version."""
    found = []
    for model in paired_and_plain():
        model.eval()
        hook = WHERE[where](model, lambda m, args, y: (y.mul_(1.5), None)[1])
        inside = one_operation(model, IMAGES) if one and hasattr(model, "_nulsq_paired") else nullcontext()
        with mode(), standing_still(model), inside:
            found.append(model(IMAGES))
        if hook is not None:
            hook.remove()
    assert torch.equal(*found)


class Scaled(nn.Sequential):
    """Something is done to a ReLU's result in a container that has a hook for it."""

    def __init__(self) -> None:
        held = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        super().__init__(held, nn.Conv2d(8, 5, 6))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_hook_on_what_holds_a_relu_may_change_its_result(mode):
    found = []
    for paired in (True, False):
        model = quantized(of=Scaled).eval()
        if paired:
            pair(model, IMAGES)
        model[0].register_forward_hook(lambda m, args, y: (y.mul_(1.5), None)[1])
        with mode(), standing_still(model):
            found.append(model(IMAGES))
    assert torch.equal(*found)


def test_all_may_begin_in_inference_mode():
    with torch.inference_mode():
        images = IMAGES.clone()
        model = quantized().eval()
    truth = copy.deepcopy(model)
    with torch.inference_mode():
        with one_operation(model, images):
            y = model(images)
        assert torch.equal(y, truth(images))


class Parts(nn.Sequential):
    """Some of its parts are checkpointed; they begin and end before and behind everything that may be one operation."""

    again: tuple[int, ...] = ()
    reentrant = grad_checkpointing = False

    def __init__(self) -> None:
        conv = lambda: nn.Conv2d(8, 8, 3, padding=1, bias=False)  # noqa: E731
        end = lambda: (nn.BatchNorm2d(8), nn.ReLU(inplace=True))  # noqa: E731
        super().__init__(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), *end()), nn.Sequential(conv(), nn.BatchNorm2d(8)),
            nn.Sequential(nn.ReLU(), conv(), *end()), nn.Sequential(conv(), *end()),
            nn.Sequential(conv(), nn.Flatten(), nn.Linear(288, 5)),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, part in enumerate(self):
            x = checkpoint(part, x, use_reentrant=self.reentrant) if self.grad_checkpointing and k in self.again else part(x)
        return x


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["nothing", "a run", "a run, backward, too"])
def test_gradient_checkpointing_changes_no_gradient(inside, reentrant, learning):
    plain = quantized(of=Parts, grid="int8").train(learning)
    grads = []
    for again in [None, *(tuple(k for k in range(5) if parts >> k & 1) for parts in range(32))]:
        model = copy.deepcopy(plain)
        if again is not None:
            pair(model, IMAGES)
            assert [sum(isinstance(m, kind) for m in model.modules()) for kind in (QuantReLU, QuantNorm)] == [4, 4]
            model.again, model.reentrant, model.grad_checkpointing = again, reentrant, True  # as timm's switch, at any time
        x = IMAGES.clone().requires_grad_()
        with ExitStack() as stack:
            if again is not None and inside != "nothing":
                stack.enter_context(one_operation(model, IMAGES))
                stack.enter_context(weights_together(model))
            y = model(x)
            if inside != "a run":
                y.square().sum().backward()
        if inside == "a run":
            y.square().sum().backward()
        grads.append([y.detach(), x.grad, *(p.grad for p in model.parameters())])
        assert all((a is None) == (b is None) for a, b in zip(grads[0], grads[-1], strict=True)), again
        for one, truth in zip(grads[-1], grads[0], strict=True):
            assert truth is None or (one - truth).norm() <= 1e-4 * truth.norm(), again
    assert sum(grad is not None for grad in grads[0]) > (20 if learning else 10)


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_whole_run_may_be_checkpointed(inside, reentrant, learning):
    found = []
    for model in paired_and_plain():
        model.train(learning)
        x = IMAGES.clone().requires_grad_()
        with ExitStack() as stack:
            if hasattr(model, "_nulsq_paired"):
                stack.enter_context(one_operation(model, IMAGES))
                y = checkpoint(model, x, use_reentrant=reentrant)
            else:
                y = model(x)
            if inside:
                y.square().sum().backward()
        if not inside:
            y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 12
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_pairing_inside_of_a_checkpoint_is_not_the_last_word():
    model = quantized(of=Parts)
    checkpoint(lambda x: pair(model, x) or model(x), IMAGES.clone().requires_grad_(), use_reentrant=False).sum().backward()
    pair(model, IMAGES)
    assert sum(isinstance(m, QuantNorm) for m in model.modules()) == 4


def bytes_kept(model: nn.Module, x: torch.Tensor) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        y = model(x)
    assert y.requires_grad
    return sum(event.self_cpu_memory_usage for event in seen.key_averages())


def test_gradient_checkpointing_keeps_nothing(monkeypatch):
    """Not what layers would make again, either."""
    monkeypatch.setattr("nulsq_cli.ops.remake.WORTH_MAKING_TWICE", 0)
    model, x = quantized(), IMAGES.repeat(1, 1, 8, 8).requires_grad_()
    pair(model, x)
    model(x)
    assert bytes_kept(lambda x: checkpoint(model, x, use_reentrant=False), x) < bytes_kept(model, x) / 20


def test_who_else_keeps_tensors_in_a_way_of_their_own():
    found = []
    for model in paired_and_plain():
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.double, torch.Tensor.float):
            y = model(IMAGES.clone().requires_grad_())
        y.square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*found)


def test_what_ran_without_gradients_is_no_obstacle_to_those_behind_it():
    """As where a backbone is not trained."""
    found = []
    for paired in (True, False):
        model = quantized(of=Parts, grid="int8")
        if paired:
            pair(model, IMAGES)
        with torch.no_grad():
            x = model[3](model[2](model[1](model[0](IMAGES))))
        model[4](x).square().sum().backward()
        found.append([p.grad for p in model[4].parameters()])
    assert all(grad is not None for grad in found[1])
    torch.testing.assert_close(*found)
