"""Float models by name: timm's, ours, from a hub or folder, with weights or without; errors as sentences."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
from timm.models import (
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    parse_model_name,
    split_model_name_tag,
)
from torch import nn

from nulsq_cli.errors import InputError, NulsqError, UsageError, first_line
from nulsq_cli.models import cifar  # noqa: F401  puts our networks into timm's registry
from nulsq_cli.models.weights import Weights, fit, read_weights

log = logging.getLogger(__name__)

PACKAGED = {"nulsq/digits_resnet8": ("resnet8_cifar.nulsq_digits", "digits_resnet8.safetensors")}
"""Networks that travel with this package: the name in timm's registry, and the file in `nulsq_cli/assets`."""


def create_float_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a float model, with the weights that were asked for.

    Args:
        name: `arch`, `arch.tag`, `hf-hub:org/name`, `local-dir:folder` or `nulsq/name`.
        pretrained: load the weights that belong to the name; a head of another size starts afresh.
        checkpoint: a local file instead (then nothing is downloaded); every tensor must fit.
        num_classes: None: as the checkpoint, else as the name's own settings say.
        in_chans: channels of the input; None: as the checkpoint, else as the name's own settings say.
        kwargs: further arguments of the model's constructor.

    Returns:
        The model in eval mode; `float_info` tells where it came from.

    Raises:
        UsageError: no such model, tag, weights or constructor argument.
        InputError: a file or download that is missing, damaged, or does not fit.
    """
    entry, packaged = _resolve(name)
    if packaged and pretrained and checkpoint is None:
        checkpoint = packaged
    weights = None if checkpoint is None else read_weights(checkpoint)
    arguments = {"num_classes": num_classes, "in_chans": in_chans, **(kwargs or {})}
    arguments = {key: value for key, value in arguments.items() if value is not None}
    model = _build(name, entry, pretrained and weights is None, arguments)
    notes = []
    if weights is not None:
        adopted = _adopt(model, weights, arguments)
        if adopted != arguments:
            model, arguments = _build(name, entry, False, adopted), adopted
        fit(model, weights, model_name=resolved_name(model))
        notes = weights.notes
    elif pretrained and _head_is_fresh(model):
        notes = [f"a new head for {model.num_classes} classes: the downloaded weights have another number"]
        log.warning("%s: %s", name, notes[0])
    source = "checkpoint" if weights else "pretrained" if pretrained else "random"
    model.nulsq_float_info = {
        "name": name,
        "resolved": resolved_name(model),
        "architecture": model.pretrained_cfg.get("architecture") or resolved_name(model),
        "arguments": _arguments(model, arguments),
        "source": "packaged" if packaged and checkpoint == packaged else source,
        "checkpoint": None if weights is None else str(checkpoint),
        "notes": list(notes),
    }
    return model.eval()


def float_info(model: nn.Module) -> dict[str, Any]:
    """Where a model made by `create_float_model` came from.

    Returns:
        name (as asked), resolved (arch.tag), architecture and arguments (enough for `timm.create_model` once
        `nulsq_cli.models` is imported), source (checkpoint, packaged, pretrained, random), checkpoint, notes.
    """
    return dict(getattr(model, "nulsq_float_info", {}))


def resolved_name(model: nn.Module) -> str:
    """The name with its tag, for instance `resnet18.a1_in1k`: tags differ in weights and in preprocessing."""
    cfg = getattr(model, "pretrained_cfg", {})
    architecture = cfg.get("architecture") or type(model).__name__
    return f"{architecture}.{cfg['tag']}" if cfg.get("tag") else architecture


def list_models(pattern: str = "", *, pretrained: bool = False) -> list[str]:
    """Names that `create_float_model` takes; a pattern without wildcards may stand anywhere in the name."""
    if pattern and not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    ours = [name for name in PACKAGED if fnmatch(name, pattern or "*")]
    return ours + timm.list_models(pattern, pretrained=pretrained)


def _resolve(name: str) -> tuple[str, Path | None]:
    """The name as timm wants it, checked, and the packaged weights if it is one of ours."""
    if name in PACKAGED:
        entry, file = PACKAGED[name]
        return entry, Path(str(files("nulsq_cli").joinpath("assets", file)))
    try:
        source, rest = parse_model_name(name)
    except ValueError:
        near = get_close_matches(name, PACKAGED, n=1)
        sources = "sources: hf-hub, local-dir" if ":" in name else f"write hf-hub:{name} or local-dir:{name}"
        fix = f"did you mean {near[0]!r}?" if near else sources
        raise UsageError(f"no model called {name!r}", fix=fix) from None
    if source == "local-dir" and not (Path(rest) / "config.json").is_file():
        raise InputError("no config.json here", where=rest, fix="give a folder written by timm's save_for_hf")
    if source:
        return name, None
    architecture, tag = split_model_name_tag(rest)
    if not is_model(architecture):
        near = get_close_matches(architecture, [*timm.list_models(), *PACKAGED], n=3)
        raise UsageError(
            f"no model called {name!r}",
            fix=f"did you mean {' or '.join(map(repr, near))}?" if near else "see: nulsq ls models",
        )
    try:
        get_pretrained_cfg(rest)
    except RuntimeError:
        tags = [split_model_name_tag(known)[1] for known in get_arch_pretrained_cfgs(architecture)]
        near = get_close_matches(tag, tags, n=1)
        known = ", ".join(t for t in tags if t) or "none"
        fix = f"did you mean {architecture}.{near[0]}?" if near else f"its tags: {known}"
        raise UsageError(f"{architecture} has no weights called {tag!r}", fix=fix) from None
    return name, None


def _build(name: str, entry: str, pretrained: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """timm's factory, with its failures turned into ours."""
    if pretrained and ":" not in entry and not get_pretrained_cfg(entry).has_weights:
        raise UsageError(
            f"{name} has no weights to download",
            fix="give a file with --initial-checkpoint, or start from random weights without --pretrained",
        )
    try:
        return timm.create_model(entry, pretrained=pretrained, **arguments)
    except NulsqError:
        raise
    except Exception as error:
        # the hub's client, the network stack under it and a thousand constructors: no common class to catch
        if pretrained or entry.startswith(("hf-hub:", "hf_hub:")):
            raise InputError(
                f"the weights of {name} could not be had: {first_line(error)}",
                fix="connect to the network once, or copy the file here and give --initial-checkpoint FILE",
            ) from error
        if entry.startswith("local-dir:"):
            raise InputError(f"not a model folder: {first_line(error)}", where=entry) from error
        if arguments:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise UsageError(
                f"{name} cannot be built with {given}: {first_line(error)}",
                fix="see the model's own arguments in timm",
            ) from error
        raise


def _adopt(model: nn.Module, weights: Weights, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the checkpoint's own class and channel counts, where none were asked for.

    Raises:
        InputError: a count was asked for, and the checkpoint has another.
    """
    adopted = dict(arguments)
    for argument, setting, axis, what in (
        ("num_classes", "classifier", 0, "classes"),
        ("in_chans", "first_conv", 1, "input channels"),
    ):
        layers = model.pretrained_cfg.get(setting) or ()
        key = f"{layers if isinstance(layers, str) else next(iter(layers), '')}.weight"
        given, wanted = weights.tensors.get(key), model.state_dict().get(key)
        if given is None or wanted is None or given.ndim != wanted.ndim:
            continue
        if given.shape[axis] == wanted.shape[axis]:
            continue
        if argument in arguments:
            raise InputError(
                f"the checkpoint has {given.shape[axis]} {what} ({key}), asked was {arguments[argument]}",
                where=weights.path,
                fix=f"leave {argument} out to take the checkpoint's own",
            )
        adopted[argument] = given.shape[axis]
    return adopted


def input_channels(model: nn.Module) -> int | None:
    """How many channels the model takes, or None if it does not say."""
    if isinstance(getattr(model, "in_chans", None), int):
        return model.in_chans
    first = getattr(model, "pretrained_cfg", {}).get("first_conv")
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    layer = dict(model.named_modules()).get(first) if first else None
    return getattr(layer, "in_channels", None)


def _arguments(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """All that `timm.create_model` needs to build the same network again."""
    # timm keeps there what the config of a hub or folder said
    arguments = {**given, **getattr(model, "_model_args", {})}
    sizes = {"num_classes": getattr(model, "num_classes", None), "in_chans": input_channels(model)}
    return {**arguments, **{key: value for key, value in sizes.items() if value is not None}}


def _head_is_fresh(model: nn.Module) -> bool:
    cfg = model.pretrained_cfg
    return bool(cfg.get("classifier")) and model.num_classes != cfg.get("num_classes")
