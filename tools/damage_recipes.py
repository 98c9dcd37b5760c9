"""Recipes for `tools/fuzz.py` that nobody would write: broken text, bombs, tricks with names, and changes that make no sense."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from damage import ARGUMENTS, COMMAND, edited, flipped, nasty

SHIPPED = Path(__file__).resolve().parents[1] / "recipes"
SNIPPETS = ["&a ", "*a", "<<: *a\n", f'!!python/object/apply:os.system ["{COMMAND}"]', f"!!python/name:os.system {COMMAND}",
            "!!binary aGk=",
            "!!set {a, b}", "!!int x", "!!timestamp x", "! x", "!<tag:a> x", "? [a, b]\n: c\n", "? ", "%TAG ! !x\n",
            "%YAML 1.1\n---\n", "---\n",
            "...\n", "\t", '"\\0"', '"\\ud800"', '"\\uD834"', "'", '"', "|", ">-\n", "{", "[", "}", "]", ": ", "- ", "#", "@",
            "`", "\x85", "\ufeff",
            "\u2028", "é", "9" * 5000, "1e999", "0x" + "f" * 400, "1:30:00", "~", "null", "<<", "²", "٣", "\x00", "\x7f",
            "\r"]  # fmt: skip
TOP = ["model", "teacher", "scheme", "data", "quant", "optimizer", "schedule", "bn", "ema", "engine", "checkpoint", "log",
       "output",
       "seed", "export", "published", "measured", "extends", "version", "description"]  # fmt: skip
KEYS = ["quant.bits", "quant.rules", "quant.rules+", "quant.rules.0.bits", "quant.rules.²", "quant.stabilizers",
        "quant.stabilizers.0", "seed",
        "schedule.epochs", "scheme.options", "scheme.name", "data.input_size", "data.augment.scale", "model.kwargs",
        "quant.options",
        "teacher.name", "optimizer.weights.lr", "schedule.min_lr", "extends", "a.b.c", "", ".", "quant.", "x" * 500,
        "quant..bits"]  # fmt: skip


@dataclass
class Case:
    """Some files, the first of them a recipe, and changes on the command line."""

    files: dict[str, bytes]
    overrides: list[str] = field(default_factory=list)
    flags: dict[str, tuple[str, Any]] = field(default_factory=dict)


def bombs(rng: random.Random) -> str:
    """Texts that are small to write and large to read."""
    size = rng.choice([10, 1000, 30_000])
    return rng.choice([
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1,
                                                                                                                            40)),
        "model: {kwargs: &k {a: *k}}\n", "model: &m {kwargs: *m}\n", "a: &a [*a]\n", "[" * size, "{a: " * size, "- " * size,
        "? " * size,
        "".join(f"{' ' * k}a:\n" for k in range(min(size, 1000))), "".join(f"key{k}: {k}\n" for k in range(size)),
        "quant: {" + ", ".join(f"k{k}: 1" for k in range(min(size, 15_000))) + "}\n",
        "quant: {rules: [" + "{}, " * min(size, 15_000) + "]}\n",
        "published: [" + ", ".join(["1"] * min(size, 15_000)) + "]\n", f"description: {'x' * 30 * size}\n",
        f"{'x' * 30 * size}: 1\n",
        f"# {'x' * 30 * size}\n", f"seed: {'9' * size}\n", f"quant: {{bits: {'9' * size}/{'9' * size}}}\n",
        "&" + "a" * size + " b: 1\n",
        "quant: {method: " + "lsq" * size + "}\n", "%TAG ! !\n" * size + "---\na: 1\n", "---\n" * size, "a: 'b\n" * size,
        "a: |\n" + "  x\n" * size,
        "? " + "x " * size + "\n: 1\n", "a: " + "b: " * min(size, 5000) + "\n", "a, " * size, "!!map " * min(size, 5000) + "{}",
        "seed: 42\n" * size,
        "model: {kwargs: {" + ", ".join(f"k{k}: [{k}]" for k in range(min(size, 6000))) + "}}\n",
        "model: {kwargs: " + "[" * 38 + "]" * 38 + "}\n",
        "quant: {rules: [{match: 're:" + "(" * size + "'}]}\n",
        "quant: {rules: [{match: 're:" + "(?:a{900}){900}" * 20 + "'}]}\n",
    ])  # fmt: skip


def _tree(name: str, rng: random.Random) -> Any:
    tree = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    if rng.random() < 0.3:
        tree[rng.choice(TOP)] = nasty(rng)
    if rng.random() < 0.2:
        tree["model"] = {"name": "resnet18", "kwargs": dict(rng.sample(list(ARGUMENTS.items()), 3))}
    if rng.random() < 0.2:
        options = ["self_study", "co_study", "ladder", "parts", "float_epochs", "x"]
        tree["scheme"] = {"name": rng.choice(["qkd", "profit", "kd"]), "options": {rng.choice(options): nasty(rng)}}
    return edited(tree, rng)


def _dumped(tree: Any) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False, width=10**9).encode("utf-8", "replace")


def _mangled(name: str, rng: random.Random) -> bytes:
    """The text of a shipped recipe with its lines or words disturbed."""
    text = (SHIPPED / f"{name}.yaml").read_text()
    for _ in range(rng.choice([1, 1, 2, 3])):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 1:
            lines[at] = rng.choice([" ", "  ", "\t"]) + lines[at]
        elif kind == 2:
            lines[at] = lines[at].lstrip()
        else:
            place = rng.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + rng.choice(SNIPPETS) + lines[at][place:]
        text = "\n".join(lines)
    return text.encode("utf-8", "replace")


def _family(rng: random.Random) -> dict[str, bytes]:
    """Several files that extend each other, also in circles, also by names that are no names."""
    count = rng.randint(2, 5)
    names = [f"r{k}.yaml" for k in range(count)]
    files = {}
    for name in names:
        others = rng.choices([*names, "quickstart", "base/cifar", "../r0", "./r1.yaml", "nothing", str(nasty(rng))],
                             k=rng.randint(0, 6))
        tree = {"extends": nasty(rng) if rng.random() < 0.1 else others}
        tree |= {rng.choice(TOP): nasty(rng)} if rng.random() < 0.5 else {"seed": 1}
        files[name] = _dumped(tree)
    return files


def draw(rng: random.Random) -> Case:
    """One case."""
    names = sorted(str(p.relative_to(SHIPPED))[:-5] for p in SHIPPED.rglob("*.yaml"))
    name = rng.choice(names)
    kind = rng.randrange(20)
    if kind < 4:
        files = {"r0.yaml": flipped((SHIPPED / f"{name}.yaml").read_bytes(), rng)}
    elif kind < 8:
        files = {"r0.yaml": _mangled(name, rng)}
    elif kind < 14:
        files = {"r0.yaml": _dumped(_tree(name, rng))}
    elif kind < 16:
        files = _family(rng)
    elif kind < 17:
        files = {"r0.yaml": bombs(rng).encode()}
    else:
        files = {"r0.yaml": (SHIPPED / "quickstart.yaml").read_bytes()}
        path = rng.choice(KEYS) if rng.random() < 0.7 else f"{rng.choice(TOP)}.{rng.choice(['x', 'name', 'kwargs', '0'])}"
        value = rng.choice([str(nasty(rng)), *SNIPPETS])
        if rng.random() < 0.5:
            return Case(files, [f"{path}={value}", *([f"{rng.choice(KEYS)}={nasty(rng)}"] if rng.random() < 0.3 else [])])
        return Case(files, flags={path or "x": ("--flag", nasty(rng))})
    return Case(files)
