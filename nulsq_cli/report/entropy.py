"""Shannon entropy of code histograms: how many of the bits that a code takes carry information."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nulsq_cli.artifact import Artifact
from nulsq_cli.layers import on_input, quant_layers
from nulsq_cli.ops.codebook import encode
from nulsq_cli.values import Bits


def shannon(counts: Tensor) -> float:
    """Entropy of a histogram in bits, 0..log2(len); 0 for an empty one.

    Source: C. E. Shannon, A mathematical theory of communication, 1948; announced for nuLSQ on its poster.
    """
    total = counts.sum()
    if total == 0:
        return 0.0
    share = counts[counts > 0].double() / total
    # 0.0 - x, because -0.0 would be printed for a single used level.
    return float(0.0 + (-(share * share.log2()).sum()).clamp_min(0))


def _row(name: str, tensor: str, bits: int, levels: Tensor, counts: Tensor) -> dict[str, Any]:
    return {
        "name": name, "tensor": tensor, "bits": bits, "levels_used": int((counts > 0).sum()),
        "entropy": round(shannon(counts), 6), "levels": [float(v) for v in levels], "counts": [int(c) for c in counts],
    }  # fmt: skip


def of_artifact(artifact: Artifact) -> dict[str, Any]:
    """One entry of the JSON that `nulsq entropy` prints.

    Weight histograms are exact. Activation histograms were counted on the calibration images when the
    file was written. The means are over layers of the model's own bit width: the first and the last
    layer are listed, but 8-bit ends would hide what the rest does. A per-channel table is shown as the
    mean over channels of each level.
    """
    meta = artifact.meta
    rows = []
    for name, entry in meta["layers"].items():
        if entry["weight_bits"] < 32:
            levels = artifact.tensors[f"{name}.weight.levels"]
            counts = torch.bincount(artifact.codes(name).flatten().long(), minlength=levels.shape[-1])
            rows.append(_row(name, "weight", entry["weight_bits"], levels.view(-1, levels.shape[-1]).mean(0), counts))
        if entry["act_counts"] is not None:
            levels = artifact.tensors[f"{name}.act.levels"]
            rows.append(_row(name, "activation", entry["act_bits"], levels, torch.tensor(entry["act_counts"])))
    bits = Bits.parse(meta["bits"])
    return {
        "target": str(artifact.path), "bits": meta["bits"], "method": meta["method"], "layers": rows,
        "mean_weight_entropy": _mean(rows, "weight", bits.weights),
        "mean_activation_entropy": _mean(rows, "activation", bits.activations),
    }  # fmt: skip


def _mean(rows: list[dict[str, Any]], tensor: str, bits: int) -> float | None:
    found = [r["entropy"] for r in rows if r["tensor"] == tensor and r["bits"] == bits]
    return round(sum(found) / len(found), 6) if found else None


@torch.no_grad()
def count_activations(model: torch.nn.Module, batches: Any) -> dict[str, list[int]]:
    """Histogram of the activation codes of every quantized input.

    Args:
        model: a converted model.
        batches: images, (N, C, H, W) each, on the model's device.
    """
    layers = {n: m for n, m in quant_layers(model).items() if m.input_quantizer is not None}
    tables = {name: layer.input_quantizer.codebook(torch.zeros(1)) for name, layer in layers.items()}
    counts = {name: torch.zeros(t.levels.shape[-1], dtype=torch.int64) for name, t in tables.items()}

    def hook(name: str) -> Any:
        def count(x: Tensor) -> None:
            codes = encode(x.float(), tables[name].thresholds).flatten().int()
            counts[name] += torch.bincount(codes, minlength=len(counts[name])).cpu()

        return count

    hooks = [on_input(layer, hook(name)) for name, layer in layers.items()]
    was_training = model.training
    try:
        model.eval()
        for images in batches:
            model(images)
    finally:
        for h in hooks:
            h.remove()
        model.train(was_training)
    return {name: c.tolist() for name, c in counts.items()}
