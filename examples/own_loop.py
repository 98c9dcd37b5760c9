"""Quantize a network to 3 bits and train it with a loop of your own: python examples/own_loop.py"""

import timm
import torch

from nulsq_cli import quantize
from nulsq_cli.layers import quantizers, weights_together
from nulsq_cli.pairing import one_operation

torch.manual_seed(0)
model = timm.create_model("resnet18", num_classes=10)
images, labels = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
quantize(model, [images], bits="3/3", method="nulsq-wa")

model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(3):
    with one_operation(model, images), weights_together(model):  # the same without, but slower
        outputs = model(images)
    loss = torch.nn.functional.cross_entropy(outputs, labels)
    loss = loss + sum(p for q in quantizers(model).values() if (p := q.penalty()) is not None)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for quantizer in quantizers(model).values():
        quantizer.after_step()
    print(f"step {step}: loss {loss.item():.3f}")
print(f"{model.nulsq_plan.average_weight_bits:.2f} bits per weight")
