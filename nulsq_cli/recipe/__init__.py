"""Recipes: YAML in, frozen typed sections out; every mistake with its file and line. The only place that knows YAML."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nulsq_cli.errors import InputError, RecipeError, UsageError, suggest
from nulsq_cli.recipe import source as yaml_source
from nulsq_cli.recipe.complaints import sentence
from nulsq_cli.recipe.schema import Recipe
from nulsq_cli.recipe.source import Key, Node, Places

MOST_FILES = 64
MOST_SHOWN, LONGEST = 40, 400
"""Complaints that are shown, and characters of each."""
_NOT_INHERITED = ("published", "measured", "description")
_TOLD = set(_NOT_INHERITED)


def _folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def _names() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def shipped() -> list[tuple[str, str]]:
    """(name, description) of every shipped recipe, by name."""
    return [(name, load(name).description) for name in _names()]


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe that is given by name or by path.

    Raises:
        UsageError: no shipped recipe of that name.
        InputError: no such file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise InputError("no such recipe file", where=name, fix="`nulsq ls recipes` lists the shipped ones")
        return path
    if str(name) not in _names():
        raise UsageError(f"no recipe called {str(name)!r}", fix=suggest(str(name), _names()))
    return _folder() / f"{name}.yaml"


def load(source: str | Path, *, flags: Mapping[str, tuple[str, Any]] | None = None,
         overrides: Sequence[str] = ()) -> Recipe:  # fmt: skip
    """Read a recipe, what it extends, and the changes to it; low to high precedence in that order.

    Args:
        source: a shipped recipe's name, or a file.
        flags: dotted key -> (the flag as typed, its value); None is a value too.
        overrides: `key.path=value`, the value as YAML; `key+=value` appends, `quant.rules.0.bits=4/4` changes an item.

    Raises:
        RecipeError: all complaints at once, each `file:line: key: what`.
        InputError, UsageError: there is no such recipe.
    """
    return _checked(*_gather(source, flags or {}, overrides))


def loads(text: str) -> Recipe:
    """A resolved recipe from text, for instance from a packed file."""
    return _checked(*yaml_source.read(text, "recipe"))


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with some dotted keys changed, checked again."""
    tree = yaml_source.from_python(recipe.model_dump(mode="json"), "recipe")
    for key, value in values.items():
        change = yaml_source.from_python(value, key)
        tree = yaml_source.merge(tree, yaml_source.at_path(key.split("."), change))
    return _checked(tree, [])


def origins(source: str | Path, *, flags: Mapping[str, tuple[str, Any]] | None = None,
            overrides: Sequence[str] = ()) -> dict[str, str]:  # fmt: skip
    """Dotted key -> file:line, flag, `<command line>` or `default`, for every value of the resolved recipe."""
    tree, complaints = _gather(source, flags or {}, overrides)
    resolved = _checked(tree, complaints).model_dump(mode="json")
    where = yaml_source.places(tree)
    return {".".join(map(str, key)): where.get(key, "default") for key, _ in _leaves(resolved)}


def differences(before: Recipe, now: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (before, now) of what two recipes do differently, not of what they say about themselves."""
    old, new = (
        {".".join(map(str, key)): value for key, value in _leaves(r.model_dump(mode="json", exclude=_TOLD))}
        for r in (before, now)
    )  # fmt: skip
    return {key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def json_schema() -> dict[str, Any]:
    """The schema of recipe files, for editors."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "array", "items": {"type": "string"}}
    quant = schema["$defs"]["Quant"]["properties"]
    for name in ("stabilizers", "rules"):
        quant[f"{name}+"] = {**quant[name], "description": f"appended to the {name} of what this recipe extends"}
    return schema


def _leaves(value: Any, at: Key = ()) -> Iterator[tuple[Key, Any]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*at, key))
    else:
        yield at, value


def _gather(source: str | Path, flags: Mapping[str, tuple[str, Any]],
            overrides: Sequence[str]) -> tuple[Node, list[str]]:  # fmt: skip
    path = recipe_path(source)
    tree, complaints = _read(path, _shown(path), (), [])
    for key, (flag, value) in flags.items():
        tree = yaml_source.merge(tree, yaml_source.at_path(key.split("."), yaml_source.from_python(value, flag)))
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > yaml_source.DEEPEST:
            raise UsageError(f"cannot read the change {text[:LONGEST]!r}",
                             fix="write key.path=value, for instance optimizer.weights.lr=0.01")  # fmt: skip
        tree = yaml_source.merge(tree, yaml_source.at_path(parts, yaml_source.read_value(value, "<command line>")))
    return tree, complaints


def _shown(path: Path) -> str:
    """How complaints name a file: as it was given, but a shipped one by its place among the shipped ones."""
    return path.relative_to(_folder()).as_posix() if path.is_relative_to(_folder()) else str(path)


def _read(path: Path, name: str, above: tuple[Path, ...], opened: list[int]) -> tuple[Node, list[str]]:
    """A file's tree on top of the trees of what it extends, and complaints about the YAML of all of them."""
    text = _text(path, name)
    opened.append(len(text))
    if len(opened) > MOST_FILES or sum(opened) > yaml_source.LARGEST_TEXT:
        raise RecipeError(f"extends more than {MOST_FILES} files, or too large ones" if len(opened) > 1 else
                          "is too large for a recipe", where=name)  # fmt: skip
    own, complaints = yaml_source.read(text, name)
    parents = own.value.pop("extends", Node([], name))
    listed = yaml_source.plain(parents)
    if not isinstance(listed, list) or not all(isinstance(p, str) and 0 < len(p) <= LONGEST for p in listed):
        raise RecipeError("extends: must be a list of recipe names or files", where=parents.place)
    tree = Node({}, name)
    above = (*above, path.resolve())
    for parent in listed:
        found = _parent(path, parent, parents.place)
        if found.resolve() in above:
            raise RecipeError(f"extends: {parent!r} extends itself", where=parents.place)
        inherited, more = _read(found, _shown(found), above, opened)
        for key in _NOT_INHERITED:
            inherited.value.pop(key, None)
        tree = yaml_source.merge(tree, inherited)
        complaints += more
    return yaml_source.merge(tree, own), complaints


def _parent(child: Path, name: str, place: str) -> Path:
    """The file that `extends` means: one beside the recipe, else a shipped one."""
    named = name if Path(name).suffix in (".yaml", ".yml") else f"{name}.yaml"
    beside = child.parent / named
    with contextlib.suppress(OSError):  # a name that is too long for a file
        # A copy may bear the name of the shipped recipe that it extends.
        if beside.is_file() and (beside.resolve() != child.resolve() or not (_folder() / named).is_file()):
            return beside
        if (_folder() / named).is_file() and ".." not in Path(named).parts:
            return _folder() / named
    raise RecipeError(f"extends: no recipe called {name!r}, got neither {beside} nor a shipped one", where=place,
                      fix=suggest(name, _names()))  # fmt: skip


def _text(path: Path, name: str) -> str:
    try:
        if path.stat().st_size > 4 * yaml_source.LARGEST_TEXT:  # a character takes up to 4 bytes
            raise RecipeError("is too large for a recipe", where=name)
        return path.read_text(encoding="utf-8-sig")
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror}", where=name) from reason
    except UnicodeDecodeError as reason:
        raise RecipeError("is no text", where=name) from reason


def _checked(tree: Node, complaints: list[str]) -> Recipe:
    found = [*complaints, *yaml_source.unwritable(tree)]
    recipe = None
    try:
        recipe = Recipe.model_validate(yaml_source.plain(tree))
    except ValidationError as error:
        where: Places = yaml_source.places(tree)
        # An unknown key comes first: a misspelt required key is also a missing one.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        sentences = [sentence(e, where) for e in errors[:MOST_SHOWN]]
        unknown = sum(e["type"] == "extra_forbidden" for e in errors[:MOST_SHOWN])
        found = [*sentences[:unknown], *found, *sentences[unknown:]]
    if recipe is None or found:
        lines = dict.fromkeys(line for several in found for line in several.split("\n"))
        told = [line if len(line) <= LONGEST else f"{line[:LONGEST]} ..." for line in lines]
        more = [f"and {len(told) - MOST_SHOWN} more"] if len(told) > MOST_SHOWN else []
        raise RecipeError("\n".join([*told[:MOST_SHOWN], *more]), fix="`nulsq cat quickstart --resolved` shows every key")
    return recipe


__all__ = ["Recipe", "differences", "json_schema", "load", "loads", "origins", "recipe_path", "shipped", "with_values"]
