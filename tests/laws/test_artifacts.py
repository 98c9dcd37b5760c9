"""Every method leaves as the same packed file, which computes exactly what the model computes."""

from __future__ import annotations

import pytest
import torch

from nulsq_cli import artifact
from nulsq_cli.layers import quant_layers, quantizers
from nulsq_cli.methods import METHODS
from nulsq_cli.models import create_float_model
from nulsq_cli.values import Bits
from tests.test_convert import policy, quantized

SIZE = (3, 8, 8)
CASES = [
    (method, bits, granularity)
    for method, line in METHODS.items()
    for bits, granularity in ((2, "channel" if line.per_channel else "tensor"),
                              (min(line.largest_weights, line.largest_activations), "tensor"))
]  # fmt: skip


@pytest.mark.parametrize(("method", "bits", "granularity"), CASES)
def test_the_packed_file_of_a_trained_model_computes_the_same(tmp_path, method, bits, granularity):
    torch.manual_seed(0)
    # The same method at both ends, too: the first layer has a signed input, all others have unsigned ones.
    wanted = policy(f"{bits}/{bits}", method, granularity=granularity, first_last_method=method, first_last_bits=Bits(bits, bits))
    model, plan = quantized(create_float_model("resnet8_cifar"), SIZE, wanted)
    assert {p.signed for p in plan.layers} == {True, False} and all(p.method == method for p in plan.layers)
    start = [q.codebook(torch.randn(q.spec.channels, 50)).levels.clone() for q in quantizers(model).values()]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss = model.train()(torch.randn(8, *SIZE)).square().sum()
    (loss + sum(p for q in quantizers(model).values() if (p := q.penalty()) is not None)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
    optimizer.step()
    for quantizer in quantizers(model).values():  # so the tables are as training leaves them
        quantizer.after_step()
    now = [q.codebook(torch.randn(q.spec.channels, 50)).levels for q in quantizers(model).values()]
    assert METHODS[method].activations == "dorefa:DoReFa" or any(not torch.equal(*pair) for pair in zip(start, now, strict=True))
    meta = {"arch": "resnet8_cifar", "arch_kwargs": {}, "num_classes": 10, "data_cfg": {}, "bits": f"{bits}/{bits}",
            "method": method}  # fmt: skip
    artifact.save(tmp_path / "a.safetensors", model.eval(), meta)
    fresh, read = artifact.load(tmp_path / "a.safetensors")
    images = torch.randn(5, *SIZE)
    with torch.no_grad():
        assert torch.equal(fresh(images), model(images))
    for name, layer in quant_layers(fresh).items():
        codes = read.tensors[f"{name}.weight.codes"]
        assert codes.numel() == -(-layer.weight.numel() * bits // 8)
