"""The models that the benchmarks train and evaluate: float, quantized, and with the authors' layers."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pairing import compiled
from torch import Tensor, nn
from torch.nn import functional as F

from nulsq_cli import api
from nulsq_cli.layers import quantizers, weights_together
from nulsq_cli.models import create_float_model
from nulsq_cli.pairing import one_operation
from nulsq_cli.training import watch
from nulsq_cli.training.optim import Pair

METHODS = ("lsq", "nulsq-a", "nulsq-wa")


@dataclass(frozen=True)
class Case:
    """A model and its batch."""

    model: str
    batch: int
    side: int

    def images(self) -> Tensor:
        """Noise: what the numbers are does not change how long they take."""
        return torch.randn(self.batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(0))

    def float_model(self) -> nn.Module:
        """With weights as they are initialized, the same in every call."""
        torch.manual_seed(0)
        return create_float_model(self.model).train()


def cases(options: argparse.Namespace, short: tuple[int, int], full: tuple[int, int]) -> list[Case]:
    """ResNet-20 on 32x32 and ResNet-18 on 224x224 images, the batch of each given; or the model that was asked for."""
    if options.model:
        name, batch, side = options.model.split(":")
        return [Case(name, int(batch), int(side))]
    if options.tiny:
        return [Case("resnet8_cifar", 2, 8)]
    small, large = short if options.short else full
    return [Case("resnet20_cifar", small, 32), Case("resnet18", large, 224)]


def widths(options: argparse.Namespace) -> tuple[int, ...]:
    """The bits that are measured."""
    return (2,) if options.tiny else (2, 4) if options.short else (2, 3, 4)


def quantized(model: nn.Module, method: str, bits: int, images: Tensor) -> nn.Module:
    """A converted copy of a float model, its steps started from some images."""
    made = api.quantize(copy.deepcopy(model).eval(), [images[:16]], bits=f"{bits}/{bits}", method=method, init="mse",
                        reestimate_batchnorm=False)  # fmt: skip
    return made.train()


def variants(case: Case, options: argparse.Namespace) -> Iterator[tuple[dict[str, object], nn.Module]]:
    """({"code", "method", "bits"}, model): ours, and the authors' where a checkout is named."""
    reference = None
    if options.reference:
        from reference import Reference

        reference = Reference(options.reference)
    base, images = case.float_model(), case.images()
    for method in METHODS:
        for bits in widths(options):
            made = quantized(base, method, bits, images)
            theirs = reference.model(copy.deepcopy(made), method) if reference else None
            yield {"code": "ours", "method": method, "bits": bits}, made
            if theirs is not None:
                yield {"code": "authors", "method": method, "bits": bits}, theirs


class Step:
    """A training step as the engine takes it: forward, loss, backward, is all finite, both optimizers, quantizers."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.target = torch.arange(len(images)) % 10
        sgd = {"opt": "momentum", "lr": 1e-3, "weight_decay": 1e-4, "momentum": 0.9, "filter_bias_and_bn": False}
        adamw = {"opt": "adamw", "lr": 1e-5, "weight_decay": 1e-4, "momentum": 0.9}
        schedule = {"sched": "cosine", "warmup_epochs": 0, "warmup_lr": 0.0, "min_lr": 0.0}
        self.pair = Pair(model, sgd, adamw, schedule, 1, 1000)
        self.quantizers = list(quantizers(model).values())

    def loss(self) -> Tensor:
        """Of the forward pass, with its graph."""
        with one_operation(self.model, self.images), weights_together(self.model):
            return F.cross_entropy(self.model(self.images), self.target)

    def __call__(self) -> None:
        """One whole step."""
        loss = self.loss()
        loss.backward()
        float(watch.one_number(self.model.parameters(), float(loss.detach())))
        for optimizer in self.pair.optimizers.values():
            optimizer.step()
        self.pair.zero_grad()
        for quantizer in self.quantizers:
            quantizer.after_step()

    def check(self) -> None:
        """The compiled loops give the loss and the gradients of the eager functions, or the benchmark ends here."""
        found = []
        for on in (False, True):
            compiled(on)
            loss = self.loss()
            loss.backward()
            found.append((loss.detach(), {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}))
            self.pair.zero_grad()
        (loss, grads), (fast_loss, fast_grads) = found
        torch.testing.assert_close(fast_loss, loss, rtol=1e-4, atol=1e-4)
        assert fast_grads.keys() == grads.keys(), "other parameters get a gradient"
        for name, grad in grads.items():
            apart, size = float((fast_grads[name] - grad).norm()), float(grad.norm())
            # An entry that lies on a threshold may fall to either side; that moves sums by little.
            assert apart <= 1e-2 * size + 1e-6, f"the gradient of {name} is off by {apart:.3g} of {size:.3g}"
