"""What pydantic found, as sentences: where, which key, what it must be, what it was, what was meant."""

from __future__ import annotations

from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from nulsq_cli.errors import suggest
from nulsq_cli.recipe.schema import Recipe
from nulsq_cli.recipe.source import Key, Places

Schema = dict[str, Any]

# What other tools call it.
_ALIASES = {
    "auto_augment": "data.augment.aa",
    "img_size": "data.input_size",
    "drop_path": "model.kwargs.drop_path_rate",
    "drop_path_rate": "model.kwargs.drop_path_rate",
    "amp_dtype": "engine.amp",
    "torchcompile": "engine.compile",
    "nepochs": "schedule.epochs",
    "expect": "measured",
}

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of `key: value` lines",
    "model": "a section of `key: value` lines",
    "finite": "a finite number",
}
_BOUNDS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def sentence(error: Any, places: Places) -> str:
    """One complaint of pydantic as `place: key: what, got value (did you mean ...?)`."""
    loc: Key = tuple(error["loc"])
    if not loc and error["type"] == "value_error":
        return "\n".join(_across(line, places) for line in _must(error, loc).split("\n"))
    place = next((places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in places), "recipe")
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {'.'.join(map(str, loc))!r}{_meant(loc)}"
    # A union adds the name of the alternative that failed; nobody wrote that.
    known = [p for i, p in enumerate(loc) if loc[: i + 1] in places or _at(loc[: i + 1]) is not None]
    key = ".".join(map(str, known))
    if error["type"] == "missing":
        return f"{place}: {key}: is missing"
    what = _must(error, loc)
    value = _shown(error.get("input"))
    got = "" if error["type"] == "value_error" or len(value) > 80 else f", got {value}"
    return f"{place}: {key}: {what}{got}{_hint(error)}" if key else f"{place}: {what}{got}"


def _across(line: str, places: Places) -> str:
    """A complaint about several sections, `key: what`, with the place of its key."""
    key = tuple(int(part) if part.isdigit() else part for part in line.partition(": ")[0].split("."))
    place = next((places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in places), "recipe")
    return f"{place}: {line}"


def _must(error: Any, loc: Key) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    if kind in _BOUNDS:
        return f"must be {_range(_at(loc))}"
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind in ("too_short", "too_long", "string_too_short") and (where := _at(loc)) and "minItems" in where:
        low, high = where["minItems"], where.get("maxItems")
        return f"must have {low if low == high else f'{low} to {high}'} values"
    if kind == "string_too_short":
        return "must not be empty"
    for start, words in _KINDS.items():
        if kind.startswith(start):
            return f"must be {words}"
    return f"{error['msg'][0].lower()}{error['msg'][1:]}"


def _hint(error: Any) -> str:
    if error["type"] == "literal_error" and isinstance(error.get("input"), str):
        choices = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        near = get_close_matches(error["input"], choices, n=1)
        return f" ({suggest(error['input'], choices)})" if near else ""
    if error["type"] == "string_type" and isinstance(error.get("input"), bool | int | float):
        return " (write it in quotes)"
    return ""


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _range(schema: Schema | None) -> str:
    """`2..8`, `0 or more`, `more than 0 and less than 1` ..., from the bounds of a JSON schema."""
    bounds = schema or {}
    low, high = bounds.get("minimum"), bounds.get("maximum")
    above, below = bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{low:g}..{high:g}"
    words = [
        f"{low:g} or more" if low is not None else "",
        f"more than {above:g}" if above is not None else "",
        f"{high:g} or less" if high is not None else "",
        f"less than {below:g}" if below is not None else "",
    ]
    return " and ".join(filter(None, words)) or "within its range"


@lru_cache(maxsize=1)
def _root() -> Schema:
    return Recipe.model_json_schema()


def _resolved(schema: Schema) -> Schema:
    """A schema without references, and without the alternative `null`."""
    while True:
        if "$ref" in schema:
            schema = _root()["$defs"][schema["$ref"].rsplit("/", 1)[1]]
        elif "anyOf" in schema and len(rest := [s for s in schema["anyOf"] if s.get("type") != "null"]) == 1:
            schema = rest[0]
        else:
            return schema


def _at(loc: Key) -> Schema | None:
    """The schema of the value at a path; None where there is no such key."""
    schema = _resolved(_root())
    for part in loc:
        inner = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
        if inner is None:
            return None
        schema = _resolved(inner)
    return schema


@lru_cache(maxsize=1)
def _every_key() -> dict[str, list[str]]:
    """Last word of each key -> the dotted keys that end in it; sections before their contents."""
    found: dict[str, list[str]] = {}

    def visit(schema: Schema, at: str) -> None:
        for key, inner in _resolved(schema).get("properties", {}).items():
            found.setdefault(key, []).append(f"{at}{key}")
            visit(inner, f"{at}{key}.")

    visit(_root(), "")
    return found


def _meant(loc: Key) -> str:
    """The nearest good key: nearly the same in this section, else the same elsewhere, else something like it."""
    if not isinstance(loc[-1], str):
        return ""
    name, section = loc[-1], ".".join(str(part) for part in loc[:-1])
    near_by = (_at(loc[:-1]) or {}).get("properties", {})

    def beside(cutoff: float) -> list[str]:
        return [f"{section}.{n}".lstrip(".") for n in get_close_matches(name, near_by, n=1, cutoff=cutoff)]

    elsewhere = [key for n in get_close_matches(name, _every_key(), n=1, cutoff=0.8) for key in _every_key()[n]]
    alias = [_ALIASES[name]] if name in _ALIASES else []
    found = beside(0.8) or alias or _every_key().get(name) or beside(0.6) or elsewhere
    return f" (did you mean {' or '.join(map(repr, found[:3]))}?)" if found else ""
