"""The library's few functions: what the commands do, for use from Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nulsq_cli import calibrate, jobs, recipe, session
from nulsq_cli.cli.show import Show
from nulsq_cli.convert import Policy, make_plan
from nulsq_cli.errors import UsageError
from nulsq_cli.pairing import pair
from nulsq_cli.values import Bits


@torch.inference_mode(False)
def quantize(model: nn.Module, batches: Iterable[Tensor], *, bits: str = "3/3", method: str = "nulsq-wa",
             init: str = "lloyd", reestimate_batchnorm: bool = True, **policy: Any) -> nn.Module:  # fmt: skip
    """Put quantizers into a float model, in place, and start them from its weights and some images.

    Afterwards train it with any loop: steps are ordinary parameters. Of every
    `nulsq_cli.layers.quantizers(model)`, add `penalty()` to the loss where it is not None (`pact` and `llsq`
    have one), and call `after_step()` after each update; it keeps the steps positive. It trains sooner with its forward
    pass inside `nulsq_cli.layers.weights_together(model)` and `nulsq_cli.pairing.one_operation(model, images)`.

    Args:
        model: any model of `nn.Conv2d` and `nn.Linear` layers.
        batches: images as the model takes them, (N, C, H, W) each; a few hundred in all.
        bits, method: as `--bits` and `--method`.
        init: lloyd, mse, nmse or lsq.
        reestimate_batchnorm: replace running statistics by those of the quantized model.
        policy: further fields of `nulsq_cli.convert.Policy`.

    Returns:
        The model; `model.nulsq_plan` says what was done to each layer and why.

    Raises:
        NulsqError: a bad width, method, rule or initializer, or an input that is not finite.
    """
    kept = list(batches)
    if not kept or not all(isinstance(images, Tensor) for images in kept):
        raise UsageError("quantize needs batches of images to measure, each one tensor",
                         fix="of a loader that gives labels, too: (images for images, _ in loader)")  # fmt: skip
    wanted = Policy(Bits.parse(bits), method, **policy)
    passes: calibrate.Passes = (lambda: enumerate(kept), len(kept))
    plan = make_plan(model, wanted, kept[0].shape[1:])
    model.nulsq_plan, _ = calibrate.quantize(model, plan, wanted, passes, (init, init),
                                             passes if reestimate_batchnorm else None)  # fmt: skip
    pair(model, kept[0][:2].to(next(model.parameters()).device))
    return model


def finetune(name: str = "quickstart", *changes: str, output: str | Path | None = None,
             resume: str | None = None, quiet: bool = True) -> dict[str, Any]:  # fmt: skip
    """Run a recipe, as `nulsq finetune` does.

    Args:
        name: a shipped recipe or a file.
        changes: `key.path=value`.
        output: the run folder.
        resume: `auto` goes on with the run in `output`.
        quiet: show nothing.

    Returns:
        The result, with the keys that `--json` prints.
    """
    wanted = recipe.load(name, overrides=changes)
    return jobs.finetune(wanted, Path(output) if output else None, resume=resume, export_after=True, dry_run=False,
                         min_top1=None, show=Show(as_json=True, quiet=quiet))  # fmt: skip


def export(run: str | Path, path: str | Path | None = None) -> dict[str, Any]:
    """Write the packed file of a run and verify it, as `nulsq export` does."""
    return jobs.export(Path(run), Path(path) if path else None, show=Show(as_json=True, quiet=True))


def load(target: str | Path) -> nn.Module:
    """A packed file or a run as a model in evaluation mode."""
    return session.target_model(str(target))[0]
