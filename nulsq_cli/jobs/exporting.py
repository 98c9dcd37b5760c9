"""`nulsq export --to onnx | openvino`: a packed file into one for a runtime, proven before it is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from nulsq_cli import artifact, recipe, session
from nulsq_cli.errors import InputError, UsageError
from nulsq_cli.exporters import EXPORTERS
from nulsq_cli.jobs.targets import some_images
from nulsq_cli.report import entropy as entropy_report
from nulsq_cli.training import data, transforms
from nulsq_cli.training.order import spread

SMALL = 3 * 64 * 64
"""Values of an image up to which all of a split of 10 000 is run through the file, and 1000 through its slow forms."""


def export_for_runtime(target: str, to: str, path: Path | None, *, grid: str, act: str, reach: int, data_dir: str | None,
                       samples: int | None, rounds: int, show: Any) -> dict[str, Any]:  # fmt: skip
    """Write the file of a run or of a packed file that a runtime reads, and prove it.

    Args:
        target: run folder or packed file.
        to: a name in `EXPORTERS`.
        path: where to; None: beside the packed file.
        grid, act, reach: as the command line takes them.
        data_dir: where the images are, if not where the run found them.
        samples: how many images the file is tried on; None: as many as take a moment.
        rounds: how often each network is timed; 0: not at all.
        show: for people.

    Raises:
        CheckFailedError: the file does not compute what it should; none is written.
    """
    if session.kind_of(target) == "run":
        packed = Path(target) / "export" / "model.safetensors"
        if not packed.exists():
            raise InputError("has no packed file yet", where=target, fix=f"run `nulsq export {target}` first")
    else:
        packed = Path(target)
    EXPORTERS[to].check_installed()
    from nulsq_cli.exporters import deploy

    options = deploy.options_for(to, grid, act, reach)
    model, read = artifact.load(packed)
    if not read.meta["data_cfg"].get("input_size"):
        raise InputError("does not say how large its images are", where=packed, fix="export the run again")
    suffix = EXPORTERS[to].suffix
    path = path or packed.with_suffix(suffix)
    if path.suffix != suffix:
        raise UsageError(f"a file for {to} is called *{suffix}", where=path, fix=f"give -o a name that ends with {suffix}")
    material, words = _material(read, data_dir, samples)
    show.heading(f"{packed} to {to}")
    show.say(f"  {words}")
    found = deploy.deploy(to, model, read, path, options, material, rounds=rounds, say=show.say)
    return found | _sizes(read, found["bytes"])


def _material(read: artifact.Artifact, data_dir: str | None, samples: int | None) -> tuple[Any, str]:
    """Images to set ranges and to try the file, and where they are from."""
    from nulsq_cli.exporters.deploy import Material

    config = read.meta["data_cfg"]
    small = torch.Size(config["input_size"]).numel() <= SMALL
    most, few = (10_000, 1000) if small else (1000, 200)
    most = samples or most
    few = min(few, most)
    stored, known = read.meta.get("recipe"), None
    if stored:
        used = recipe.loads(stored)
        if data_dir is not None:
            used = recipe.with_values(used, {"data.data_dir": data_dir})
        calibration, real = some_images(used, config)
        known = calibration if real else None
        try:
            split = session.open_split(used, used.data.val_split, config["input_size"][0])
            listed = not isinstance(split, IterableDataset)
        except (InputError, UsageError):
            listed = False
        if real and listed:
            chosen = spread(len(split), min(most, len(split)), 0)
            _, transform = transforms.build_transforms(config)
            part = Subset(split, sorted(int(k) for k in chosen))
            loader = data.eval_loader(part, transform, batch_size=64, workers=0)
            return Material(calibration, loader, few), f"tried on {len(part)} images of split {used.data.val_split!r}"
    if data_dir is not None and known is None:
        raise InputError("holds none of the images that the run was made with", where=data_dir,
                         fix="give the folder that was its --data-dir")  # fmt: skip
    few = min(few, 256)
    words = "the run's images are not at hand: ranges and trial from noise" if known is None else \
        "its validation images are not at hand: ranges from training images, tried on noise"  # fmt: skip
    return Material(known or [_noise(config, 0, 64)], list(_noisy(config, few)), few, real=known is not None), words


def _noise(config: dict[str, Any], seed: int, count: int) -> Tensor:
    return torch.randn(count, *config["input_size"], generator=torch.Generator().manual_seed(seed))


def _noisy(config: dict[str, Any], count: int) -> Iterator[tuple[Tensor, None]]:
    for start in range(0, count, 64):
        yield _noise(config, start + 1, min(64, count - start)), None


def _sizes(read: artifact.Artifact, written: int) -> dict[str, int]:
    """Bytes of the float network, of the packed codes, of these without rounding, and the least that any code could take."""
    layers = read.meta["layers"]
    packed, ideal, bound = 0, 0, 0.0
    for name, entry in layers.items():
        if entry["weight_bits"] < 32:
            codes = read.codes(name)
            packed += read.tensors[f"{name}.weight.codes"].numel()
            ideal += codes.numel() * entry["weight_bits"]
            bound += codes.numel() * entropy_report.shannon(torch.bincount(codes.flatten().int()))
    rest = sum(t.numel() * t.element_size() for key, t in read.tensors.items() if not key.endswith(".weight.codes"))
    return {"float_bytes": int(read.meta["float_bytes"]), "packed_weight_bytes": packed, "ideal_weight_bytes": -(-ideal // 8),
            "entropy_bound_bytes": int(bound / 8), "rest_bytes": rest, "graph_bytes": written - packed - rest}  # fmt: skip
