"""Damage for `tools/fuzz.py`: of bytes, of JSON, of safetensors files with checksums that hold, and of recipes."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

COMMAND = "__import__('os').system('touch executed')"
NUMBERS = [0, 1, -1, 2, 7, 8, 32, 33, 255, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**9, 10**30, 10**400, 0.5, -0.0, 1e-320,
           1e308, float("nan"), float("inf"), float("-inf"), True, False]  # fmt: skip
TEXTS = ["", " ", "x", "3", "-1", "nan", "3/3", "²/2", "0\0", "\ud800", "\u202egnp", "é" * 50, "a" * 300, "a" * 70_000,
         "../../x", "/etc/passwd",
         ".", "..", "a/b", "a.b", "*", "re:(", "re:" + "(" * 3000, "~", "null", "${HOME}", "{0}", "%s%n", COMMAND]  # fmt: skip
MODELS = ["resnet20_cifar", "resnet18", "vit_giant_patch14_dinov2", "convnext_xxlarge", "swin_tiny_patch4_window7_224", "no_such",
          "nulsq/digits_resnet8", "hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/etc", "local-dir:.", "test_vit",
          "resnet18.a1_in1k",
          "hf-hub:", ":", "resnet18:x"]  # fmt: skip
ARGUMENTS = {
    "pretrained": True, "pretrained_cfg": {"hf_hub_id": "evil/model"}, "pretrained_cfg_overlay": {"url": "http://evil"},
    "checkpoint_path": "/etc/passwd", "cache_dir": "/", "scriptable": True, "features_only": True, "depth": 10**6,
    "num_classes": 10**9,
    "in_chans": 10**8, "embed_dim": 10**6, "img_size": 10**5, "patch_size": 0, "layers": [10**6] * 4, "block": COMMAND,
    "act_layer": COMMAND, "norm_layer": "os.system", "drop_rate": "x", "global_pool": [], "channels": [2**40], "depths": [[]],
    "window_size": 10**5, "num_heads": 0, "base_width": 10**7, "mlp_ratio": 1e30, "stem_width": -1, "qkv_bias": "no", "": 1,
}  # fmt: skip


def deep(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def nasty(rng: random.Random) -> Any:
    """A value that nobody expects."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 5:
        return rng.choice(TEXTS)
    return copy.deepcopy(rng.choice([None, [], {}, [[]], {"a": {}}, [1] * 300, {str(k): k for k in range(300)}, deep(60),
                                     [None], rng.choice(MODELS)]))


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, cut, repeated, inserted or taken away."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        if not data:
            break
        # Half of all damage in the first part, where the structure is.
        at = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 4096))
        kind = rng.randrange(7)
        length = rng.choice([1, 2, 8, 100])
        if kind < 2:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at] = rng.choice(b'\x00\xff{}[]",:\\0-9e\n')
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = rng.randbytes(length)
        elif kind == 5:
            data[at:at] = data[max(at - length, 0) : at]
        else:
            del data[at:]
    return bytes(data)


# ---- JSON -----------------------------------------------------------------------------------------


def spots(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a tree."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += spots(inner, (*at, key))
    return found


def edited(tree: Any, rng: random.Random) -> Any:
    """A tree with some values replaced, removed, moved, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        known = spots(tree)
        if not known:
            return nasty(rng)
        # By depth first: otherwise nearly all damage would hit the longest list.
        depth = rng.choice(sorted({len(s) for s in known}))
        *way, key = rng.choice([s for s in known if len(s) == depth])
        place = tree
        for part in way:
            place = place[part]
        kind = rng.randrange(8)
        if kind < 4:
            place[key] = nasty(rng)
        elif kind == 4:
            del place[key]
        elif kind == 5 and isinstance(place, dict):
            place[str(nasty(rng))[:1000]] = place.pop(key)
        elif kind == 6:
            place[key] = [place[key]] if rng.random() < 0.5 else {"x": place[key]}
        elif isinstance(place[key], int | float):
            place[key] = rng.choice([-place[key], place[key] + 1, place[key] * 10**6, str(place[key])])
        elif isinstance(place[key], dict):
            place[key][str(nasty(rng))[:1000]] = nasty(rng)
    return tree


def written(tree: Any, rng: random.Random) -> str:
    """As JSON, sometimes with what a plain writer never writes."""
    text = json.dumps(tree)
    kind = rng.randrange(40)
    if kind == 0 and text.startswith("{") and len(text) > 2:
        key = json.dumps(rng.choice(list(tree))) if tree else '"a"'
        text = f"{{{key}:{json.dumps(nasty(rng))},{text[1:]}"  # twice the same key
    elif kind == 1:
        text = text[:-1] + ',"deep":' + "[" * 100_000 + "]" * 100_000 + text[-1:]
    elif kind == 2:
        text = text[:-1] + ',"long":' + "9" * 5000 + text[-1:]
    elif kind == 3:
        text = text[:-1] + ',"many":[' + ",".join(["{}"] * 300_000) + "]" + text[-1:]
    elif kind == 4:
        text = flipped(text.encode(), rng).decode(errors="replace")
    return text


# ---- safetensors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: list[int]
    content: bytes


DTYPES = ["F32", "F16", "BF16", "F64", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "F8_E4M3", "F8_E5M2",
          "F8_E8M0",
          "F4", "F6_E2M3", "C64", "XX", ""]  # fmt: skip


def unpack(content: bytes) -> tuple[list[Piece], str]:
    """The tensors and the one note of a whole file."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    (note,) = header.pop("__metadata__").values()
    data = content[8 + size :]
    return [Piece(k, v["dtype"], v["shape"], data[slice(*v["data_offsets"])]) for k, v in header.items()], note


def pack(pieces: list[Piece], note: str, twist: Callable[[dict[str, Any]], None] | None = None) -> bytes:
    """A file; `twist` may change its header before it is written."""
    header: dict[str, Any] = {"__metadata__": {"nulsq": note}}
    at = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [at, at + len(piece.content)]}
        at += len(piece.content)
    if twist:
        twist(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(piece.content for piece in pieces)


def _floats(content: bytes, rng: random.Random) -> bytes:
    count = len(content) // 4
    values = list(struct.unpack(f"<{count}f", content[: 4 * count]))
    if not values:
        return content
    kind = rng.randrange(5)
    if kind == 0:
        values[rng.randrange(count)] = rng.choice([float("nan"), float("inf"), -float("inf"), 3e38, 1e-45])
    elif kind == 1:
        rng.shuffle(values)
    elif kind == 2:
        values = [values[0]] * count
    elif kind == 3:
        values.reverse()
    else:
        values = [struct.unpack("<f", rng.randbytes(4))[0] for _ in values]
    return struct.pack(f"<{count}f", *values)


def pieces_changed(pieces: list[Piece], rng: random.Random) -> list[Piece]:
    """Tensors with other contents, shapes, types or names; some twice, some gone."""
    pieces = list(pieces)
    for _ in range(rng.choice([1, 1, 2])):
        if not pieces:
            break
        at = rng.randrange(len(pieces))
        piece = pieces[at]
        kind = rng.randrange(10)
        if kind < 2 and piece.dtype == "F32":
            pieces[at] = replace(piece, content=_floats(piece.content, rng))
        elif kind == 2:
            pieces[at] = replace(piece, content=rng.randbytes(len(piece.content)))
        elif kind == 3:
            pieces[at] = replace(piece, dtype=rng.choice(DTYPES))
        elif kind == 4:
            count = len(piece.content) // max(len(piece.content) // max(_count(piece.shape), 1), 1)
            pieces[at] = replace(piece, shape=rng.choice([[count], [1, count], [count, 1], [], [0], [2**40, 2**40],
                                                          [count] + [1] * 70]))
        elif kind == 5:
            other = rng.choice([str(nasty(rng))[:1000], f"{piece.name}.x", rng.choice(pieces).name])
            pieces[at] = replace(piece, name=other)
        elif kind == 6:
            del pieces[at]
        elif kind == 7:
            pieces.append(replace(piece, name=str(nasty(rng))[:1000]))
        elif kind == 8:
            half = len(piece.content) // 2
            pieces[at] = replace(piece, content=piece.content[:half],
                                 shape=[half // max(len(piece.content) // max(_count(piece.shape), 1), 1)])
        else:
            pieces[at] = replace(piece, content=b"", shape=rng.choice([[0], [0, 2**60], [2**31, 0]]))
    return pieces


def _count(shape: list[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def header_twisted(rng: random.Random) -> Callable[[dict[str, Any]], None]:
    """A change of a file's header that its contents do not follow."""

    def twist(header: dict[str, Any]) -> None:
        kind = rng.randrange(6)
        entry = rng.choice([v for k, v in header.items() if k != "__metadata__"] or [{}])
        if kind == 0 and "data_offsets" in entry:
            bounds = [0, 1, -1, 2**40, 2**64, *entry["data_offsets"]]
            entry["data_offsets"] = rng.choices(bounds, k=rng.choice([2, 2, 1, 3]))
        elif kind == 1:
            header["__metadata__"] = rng.choice([{}, None, [], "x", {"nulsq": 1}, {"nulsq": None}, {"other": "x"}])
        elif kind == 2:
            header[str(nasty(rng))[:1000]] = nasty(rng)
        elif kind == 3:
            for number in range(rng.choice([1000, 30_000])):
                header[f"n{number}"] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
        elif entry:
            entry[rng.choice(list(entry))] = nasty(rng)

    return twist
