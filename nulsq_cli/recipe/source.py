"""YAML text to a tree in which every value knows its file and line; merging of such trees; YAML out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nulsq_cli.errors import RecipeError

Key = tuple[str | int, ...]
Places = dict[Key, str]

LARGEST_TEXT = 1 << 17
"""Characters of a recipe and of what it extends together: a reader in Python takes some seconds for ten times as many."""
DEEPEST = 40
MOST_NODES = 10_000

_TAG = "tag:yaml.org,2002:"
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(rf"(?:{'|'.join(form for w in _WORDS for form in (w, w.capitalize(), w.upper()))})\Z")
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=e))(?:e[-+]?[0-9]+)?|[-+]?\.inf|\.nan)\Z",
    re.I | re.A,
)


class _Reader(yaml.SafeLoader):
    """Less is guessed than in YAML 1.1: no dates, base 60 or octal; but `1e-3` is a number.

    What is not guessed stays text, and text is what the typed sections turn into numbers anyway.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}
    depth = 0
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        self.nodes += 1
        if self.depth > DEEPEST or self.nodes > MOST_NODES:
            problem = "is nested too deeply" if self.depth > DEEPEST else "is too long for a recipe"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _Writer(yaml.SafeDumper):
    """Quotes all that either YAML 1.1 or the reader above would take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        short = not any(isinstance(item, dict | list) for item in sequence)
        return super().represent_sequence(tag, sequence, flow_style=short)

    def represent_str(self, data: str) -> Any:
        # PyYAML folds these line breaks away in every other style.
        style = '"' if any(c in data for c in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar(f"{_TAG}str", data, style=style)


for _kind, _form, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("yYnNtTfFoO")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    _Reader.add_implicit_resolver(f"{_TAG}{_kind}", _form, _first)
_Writer.add_representer(str, _Writer.represent_str)
_Writer.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class Node:
    """A value and where it was written.

    Args:
        value: a scalar, a dict of nodes or a list of nodes.
        place: file:line, or the flag.
        bare: nothing was written after the key, which is not the same as writing null.
    """

    value: Any
    place: str
    bare: bool = False


def read(text: str, name: str) -> tuple[Node, list[str]]:
    """The tree of a recipe's text, and complaints that do not stop the reading.

    Raises:
        RecipeError: no YAML at all, no mapping, or too much of it.
    """
    if len(text) > LARGEST_TEXT:
        raise RecipeError("is too large for a recipe", where=name)
    node, complaints = _compose(text, name)
    if node.bare:
        return Node({}, f"{name}:1"), complaints
    if not isinstance(node.value, dict):
        raise RecipeError("is no recipe: it must be a mapping of sections", where=node.place,
                          fix="`nulsq cat quickstart` shows a recipe")  # fmt: skip
    return node, complaints


def read_value(text: str, place: str) -> Node:
    """The value of a `key.path=value` on the command line.

    Raises:
        RecipeError: the value is no YAML.
    """
    node, complaints = _compose(text, place, lines=False)
    if complaints:
        raise RecipeError("\n".join(complaints))
    return Node(node.value, place)


def from_python(value: Any, place: str) -> Node:
    """A tree of plain data that all come from one place."""
    if isinstance(value, Mapping):
        return Node({str(k): from_python(v, place) for k, v in value.items()}, place)
    if isinstance(value, list | tuple):
        return Node([from_python(v, place) for v in value], place)
    return Node(str(value) if isinstance(value, Path) else value, place)


def at_path(path: list[str], node: Node) -> Node:
    """A tree that holds nothing but this node at this dotted path."""
    for part in reversed(path):
        node = Node({part: node}, node.place)
    return node


def plain(node: Node) -> Any:
    """The data alone."""
    if isinstance(node.value, dict):
        return {key: plain(inner) for key, inner in node.value.items()}
    if isinstance(node.value, list):
        return [plain(inner) for inner in node.value]
    return node.value


def places(node: Node, at: Key = ()) -> Places:
    """Where each value was written, by its path."""
    found = {at: node.place}
    if isinstance(node.value, dict | list):
        items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        for key, inner in items:
            found |= places(inner, (*at, key))
    return found


def merge(base: Node | None, top: Node) -> Node:
    """Mappings are merged, all else is replaced.

    `key+` appends to a list. `key:` with nothing after it changes no section and no list.
    """
    if not isinstance(top.value, dict):
        return base if base and top.bare and isinstance(base.value, dict | list) else top
    if base and isinstance(base.value, list) and top.value and all(k.isascii() and k.isdigit() for k in top.value):
        return _merge_items(base, top)
    merged = dict(base.value) if base and isinstance(base.value, dict) else {}
    for key, node in top.value.items():
        if not key.endswith("+"):
            merged[key] = merge(merged.get(key), node)
    for key, node in top.value.items():
        if key.endswith("+"):
            old = merged.get(key[:-1])
            new = [merge(None, n) for n in (node.value if isinstance(node.value, list) else [node])]
            merged[key[:-1]] = Node([*(old.value if old and isinstance(old.value, list) else []), *new], node.place)
    return Node(merged, top.place)


def _merge_items(base: Node, top: Node) -> Node:
    items = list(base.value)
    for key, node in top.value.items():
        if len(key) > 9 or int(key) >= len(items):
            raise RecipeError(f"there is no number {key[:20]} in this list of {len(items)}", where=node.place)
        items[int(key)] = merge(items[int(key)], node)
    return Node(items, base.place)


def unwritable(node: Node) -> list[str]:
    """Complaints about text that no file can hold: halves of characters, and zero bytes, which end a name for the system."""
    if isinstance(node.value, dict | list):
        items = node.value.items() if isinstance(node.value, dict) else enumerate(node.value)
        found = [what for key, inner in items for what in (*_unwritable(str(key), inner.place), *unwritable(inner))]
        return found
    return _unwritable(node.value, node.place) if isinstance(node.value, str) else []


def _unwritable(text: str, place: str) -> list[str]:
    odd = next((c for c in text if c == "\0" or "\ud800" <= c <= "\udfff"), None)
    return [] if odd is None else [f"{place}: {text[:40]!r} holds a character that cannot be written, {odd!r}"]


def dump(data: dict[str, Any]) -> str:
    """YAML that `read` turns into the same data."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=100, default_flow_style=False)


def _compose(text: str, name: str, lines: bool = True) -> tuple[Node, list[str]]:
    def place(mark: Any) -> str:
        return f"{name}:{mark.line + 1}" if lines and mark is not None else name

    try:
        loader = _Reader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as reason:
        problem = getattr(reason, "problem", None) or "it holds characters that YAML does not allow"
        what = problem if problem.startswith("is ") else f"is no valid YAML: {problem}"
        raise RecipeError(what, where=place(getattr(reason, "problem_mark", None)),
                          fix="indent with spaces, and put text that holds : or # in quotes") from reason  # fmt: skip
    if root is None:
        return Node(None, name, bare=True), []
    complaints: list[str] = []
    seen = 0

    def walk(node: yaml.Node, depth: int) -> Node:
        nonlocal seen
        seen += 1
        here = place(node.start_mark)
        if depth > DEEPEST or seen > MOST_NODES:  # aliases can make a short text endless
            raise RecipeError("is nested too deeply, or repeats itself through aliases", where=here,
                              fix="write it without & and *")  # fmt: skip
        if isinstance(node, yaml.ScalarNode):
            value, complaint = _scalar(node)
            if complaint:
                complaints.append(f"{here}: {complaint}")
            return Node(value, here, bare=node.value == "" and node.style is None and value is None)
        if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
            complaints.append(f"{here}: tags such as {node.tag.replace(_TAG, '!!')} are not read")
        if isinstance(node, yaml.SequenceNode):
            return Node([walk(item, depth + 1) for item in node.value], here)
        values: dict[str, Node] = {}
        for key_node, value_node in node.value:
            at = place(key_node.start_mark)
            if not isinstance(key_node, yaml.ScalarNode):
                complaints.append(f"{at}: a key must be a word")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                complaints.append(f"{at}: << is not read here; write extends: [recipe] at the top")
                continue
            if key in values:
                complaints.append(f"{at}: duplicate key {key!r} (first at {values[key].place})")
            inner = walk(value_node, depth + 1)
            values[key] = Node(inner.value, at, inner.bare)
        return Node(values, here)

    return walk(root, 0), complaints


def _scalar(node: yaml.ScalarNode) -> tuple[Any, str | None]:
    """The value of a scalar, and what is wrong with it."""
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "null":
            return None, None
        if kind == "bool":
            return _WORDS[text.lower()], None
        if kind == "int":
            return int(text.replace("_", "")), None
        if kind == "float":
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")), None
    except (KeyError, ValueError):
        return text, None  # an explicit !!int on a word, or 5000 digits: text, which the schema refuses
    return text, None if kind == "str" else f"tags such as {node.tag.replace(_TAG, '!!')} are not read"
