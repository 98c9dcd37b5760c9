"""Recipes: YAML in, frozen typed sections out; every mistake with its file and line. The only place that knows YAML."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from nulsq_cli.errors import InputError, RecipeError, UsageError, suggest
from nulsq_cli.recipe.schema import Recipe

Key = tuple[str | int, ...]
Places = dict[Key, str]

LARGEST_FILE = 1 << 20
DEEPEST = 40


def _folder() -> Path:
    """Where the shipped recipes are: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "_recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped() -> list[tuple[str, str]]:
    """(name, description) of every shipped recipe, by name."""
    return [(path.stem, load(path).description) for path in sorted(_folder().glob("*.yaml"))]


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe that is given by name or by path.

    Raises:
        UsageError: no shipped recipe of that name.
        InputError: no such file.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        if not path.is_file():
            raise InputError("no such recipe file", where=name)
        return path
    found = _folder() / f"{name}.yaml"
    if not found.is_file():
        raise UsageError(f"no recipe called {str(name)!r}", fix=suggest(str(name), (p.stem for p in _folder().glob("*.yaml"))))
    return found


def load(source: str | Path, *, flags: Mapping[str, tuple[str, Any]] | None = None,
         overrides: Sequence[str] = ()) -> Recipe:  # fmt: skip
    """Read a recipe, what it extends, and the changes to it; low to high precedence in that order.

    Args:
        source: a shipped recipe's name, or a file.
        flags: dotted key -> (the flag as typed, its value).
        overrides: `key.path=value`, the value as YAML.

    Raises:
        RecipeError: all complaints at once, each `file:line: key: what`.
        InputError, UsageError: there is no such recipe.
    """
    return _checked(*_gather(source, flags or {}, overrides))


def loads(text: str) -> Recipe:
    """A resolved recipe from text, for instance from a packed file."""
    data, places, complaints = _parse(text, "recipe")
    return _checked(data, places, complaints)


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """A recipe with some dotted keys changed, checked again."""
    data = recipe.model_dump(mode="json")
    for key, value in values.items():
        _put(data, {}, key.split("."), value, key)
    return _checked(data, {}, [])


def origins(source: str | Path) -> dict[str, str]:
    """Dotted key -> where its value comes from, for every value of the resolved recipe."""
    data, places, complaints = _gather(source, {}, ())
    resolved = _checked(data, places, complaints).model_dump(mode="json")
    return {".".join(map(str, key)): places.get(key, "default") for key in _leaves(resolved)}


def json_schema() -> dict[str, Any]:
    """The schema of recipe files, for editors."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {"type": "array", "items": {"type": "string"}}
    return schema


def _leaves(value: Any, at: Key = ()) -> Iterator[Key]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*at, key))
    else:
        yield at


# ---- YAML with positions ----------------------------------------------------------------------------


def _gather(source: str | Path, flags: Mapping[str, tuple[str, Any]], overrides: Sequence[str]) -> tuple[
        dict[str, Any], Places, list[str]]:  # fmt: skip
    data, places, complaints = _read(recipe_path(source), ())
    for key, (flag, value) in flags.items():
        _put(data, places, key.split("."), value, flag)
    for text in overrides:
        key, equals, value = text.partition("=")
        path = key.split(".")
        if not equals or not all(path):
            raise UsageError(f"cannot read the change {text!r}", fix="write key.path=value, for instance optimizer.weights.lr=0.01")
        try:
            _put(data, places, path, yaml.safe_load(value), "<command line>")
        except yaml.YAMLError as reason:
            raise UsageError(f"the value of {text!r} is no YAML", fix="put it in quotes") from reason
    return data, places, complaints


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], Places, list[str]]:
    if path.resolve() in above:
        raise RecipeError("extends itself", where=path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise RecipeError("is too large for a recipe", where=path)
        text = path.read_text(encoding="utf-8")
    except OSError as reason:
        raise InputError(f"cannot be read: {reason.strerror}", where=path) from reason
    except UnicodeDecodeError as reason:
        raise RecipeError("is no text", where=path) from reason
    own, own_places, complaints = _parse(text, path.name)
    data: dict[str, Any] = {}
    places: Places = {}
    parents = own.pop("extends", [])
    if not isinstance(parents, list) or not all(isinstance(p, str) for p in parents):
        raise RecipeError("extends: must be a list of recipe names or files", where=own_places.get(("extends",), path))
    for parent in parents:
        beside = path.parent / f"{parent.removesuffix('.yaml')}.yaml"
        inherited = _read(beside if beside.is_file() else recipe_path(parent), (*above, path.resolve()))
        for key in ("published", "measured", "description"):
            inherited[0].pop(key, None)
        _merge(data, inherited[0])
        places |= inherited[1]
        complaints += inherited[2]
    _merge(data, own)
    return data, places | own_places, complaints


def _parse(text: str, name: str) -> tuple[dict[str, Any], Places, list[str]]:
    """Plain data, the file:line of every key, and complaints about the YAML itself."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as reason:
        mark = getattr(reason, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"is no valid YAML: {getattr(reason, 'problem', None) or 'cannot be read'}", where=f"{name}{line}") from reason
    except RecursionError as reason:
        raise RecipeError("is nested too deeply", where=name) from reason
    if node is None:
        return {}, {}, []
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError("is no recipe: it must be a mapping of sections", where=name)
    places: Places = {}
    complaints: list[str] = []
    data = _plain(node, (), name, places, complaints, set())
    return data, places, complaints


def _plain(node: yaml.Node, at: Key, name: str, places: Places, complaints: list[str], open_nodes: set[int]) -> Any:
    if len(at) > DEEPEST or id(node) in open_nodes or len(places) > 20_000:
        raise RecipeError("is nested too deeply, or repeats itself through aliases", where=f"{name}:{node.start_mark.line + 1}")
    places.setdefault(at, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.ScalarNode):
        loader = yaml.SafeLoader("")
        with contextlib.suppress(ValueError):
            value = loader.construct_object(node)
            # Dates and bytes are strings to a recipe; so is a number written in base 60.
            sexagesimal = isinstance(value, (int, float)) and not isinstance(value, bool) and ":" in node.value
            return value if isinstance(value, (str, int, float, bool, type(None))) and not sexagesimal else node.value
        return node.value
    open_nodes = open_nodes | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(n, (*at, i), name, places, complaints, open_nodes) for i, n in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key in result:
            complaints.append(f"{name}:{line}: duplicate key {key!r} (first at {places[(*at, key)]})")
        places[(*at, key)] = f"{name}:{line}"
        result[key] = _plain(value_node, (*at, key), name, places, complaints, open_nodes)
    return result


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Mappings are merged, lists replaced; `key+` appends to an inherited list."""
    for key, value in new.items():
        if key.endswith("+") and isinstance(value, list):
            into[key[:-1]] = [*into.get(key[:-1], []), *value]
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _put(data: dict[str, Any], places: Places, path: list[str], value: Any, origin: str) -> None:
    for depth, part in enumerate(path[:-1]):
        inner = data.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UsageError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is no section", where=origin)
        data = inner
    data[path[-1]] = value
    places[tuple(path)] = origin


# ---- complaints -------------------------------------------------------------------------------------


def _checked(data: dict[str, Any], places: Places, complaints: list[str]) -> Recipe:
    found = list(complaints)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        # An unknown key comes first: a misspelt required key is also a missing one.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        found += dict.fromkeys(_sentence(e, places) for e in errors)
    except RecursionError:
        found.append("is nested too deeply")
    if found:
        raise RecipeError("\n".join(found))
    return recipe


def _sentence(error: Any, places: Places) -> str:
    loc: Key = tuple(error["loc"])
    place = next((places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in places), "recipe")
    shown = tuple(p for i, p in enumerate(loc) if loc[: i + 1] in places or i == 0 or len(loc) == i + 1)
    key = ".".join(map(str, shown)) or "recipe"
    kind, context, value = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "extra_forbidden":
        return f"{place}: unknown key {key!r}{_meant(loc)}"
    if kind == "value_error":
        return f"{place}: {key}: {str(context.get('error', error['msg']))}"
    bounds = {"greater_than_equal": ("at least", "ge"), "greater_than": ("more than", "gt"),
              "less_than_equal": ("at most", "le"), "less_than": ("less than", "lt")}  # fmt: skip
    got = f", got {value!r}" if len(repr(value)) < 80 else ""
    if kind in bounds:
        words, bound = bounds[kind]
        return f"{place}: {key}: must be {words} {context[bound]:g}{got}"
    if kind == "literal_error":
        return f"{place}: {key}: must be {context['expected']}{got}"
    what = error["msg"].replace("Input should be", "must be").replace("a valid ", "a ")
    return f"{place}: {key}: {what[0].lower()}{what[1:]}{got}"


def _meant(loc: Key) -> str:
    """The nearest good key: in the same section first, then anywhere."""
    names = [part for part in loc if isinstance(part, str)]
    section: Any = Recipe
    for part in names[:-1]:
        field = section.model_fields.get(part)
        section = field.annotation if field is not None else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            break
    else:
        if near := get_close_matches(names[-1], section.model_fields, n=1):
            return f" (did you mean {'.'.join([*names[:-1], near[0]])!r}?)"
    every: dict[Any, str] = {name: name for name in Recipe.model_fields}
    for key in _leaves(Recipe().model_dump(mode="json")):
        every.setdefault(key[-1], ".".join(map(str, key)))
    near = get_close_matches(names[-1], every, n=1) if names else []
    return f" (did you mean {every[near[0]]!r}?)" if near else ""


__all__ = ["Recipe", "json_schema", "load", "loads", "origins", "recipe_path", "shipped", "with_values"]
