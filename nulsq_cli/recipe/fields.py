"""The field types of a recipe: numbers with ranges, names from a list, bit widths.

Lax pydantic types on purpose: YAML 1.1 readers and shells hand over `1e-3` as text. Only one laxness is
taken back: `true` is not the number 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from nulsq_cli.errors import UsageError, suggest
from nulsq_cli.values import Bits

METHOD_NAMES = ("nulsq-a", "nulsq-w", "nulsq-wa", "lsq")
"""The quantizers a recipe may name; in the nuLSQ family the letters say which side is non-uniform."""

INITIALIZER_NAMES = ("nmse", "lsq", "lloyd", "mse")
"""The rules that turn statistics into first step sizes."""

SCHEME_NAMES = ("plain", "kd")
"""Who teaches the network: the labels alone, or also another network."""

SCHEDULE_NAMES = ("cosine", "tanh", "poly", "step", "multistep", "none")
"""timm's learning-rate schedules that need nothing but the number of the update."""

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def _not_bool(kind: str) -> BeforeValidator:
    def check(value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(f"must be {kind}")
        return value

    return BeforeValidator(check)


def _one_of(names: tuple[str, ...]) -> list[Any]:
    def check(value: str) -> str:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}\n{suggest(value, names)}")
        return value

    return [AfterValidator(check), Field(json_schema_extra={"enum": list(names)})]


Int = Annotated[int, _not_bool("a whole number")]
Float = Annotated[float, _not_bool("a number")]
Count = Annotated[Int, Field(ge=1)]
AtLeastZero = Annotated[Int, Field(ge=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Percent = Annotated[Float, Field(ge=0, le=100)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]

Method = Annotated[str, *_one_of(METHOD_NAMES)]
Initializer = Annotated[str, *_one_of(INITIALIZER_NAMES)]
Scheme = Annotated[str, *_one_of(SCHEME_NAMES)]
Sched = Annotated[str, *_one_of(SCHEDULE_NAMES)]


def _bits(value: Any) -> Bits:
    if isinstance(value, Bits):
        value = str(value)
    if isinstance(value, dict):
        if set(value) != {"w", "a"}:
            raise ValueError("must be W/A such as 3/3, or {w: 3, a: 3}")
        value = f"{value['w']}/{value['a']}"
    if isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        raise ValueError(f"must be W/A with a slash\nwrite {value.replace(':', '/')}")
    if not isinstance(value, str):
        hint = f"\nwrite {value}/{value}" if type(value) is int and value in (*range(2, 9), 32) else ""
        raise ValueError(f"must be weight bits/activation bits such as 3/3{hint}")
    try:
        return Bits.parse(value)
    except UsageError as refused:
        what = refused.what.split(", got")[0].removeprefix("bits ")
        raise ValueError(f"{what}\n{refused.fix}") from None


def _width_schema() -> dict[str, Any]:
    return {"type": "integer", "enum": [2, 3, 4, 5, 6, 7, 8, 32]}


BitWidths = Annotated[
    Bits,
    PlainValidator(_bits),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "description": "weight bits/activation bits, each 2..8, or 32 for float",
            "anyOf": [
                {"type": "string", "pattern": "^([2-8]|32)/([2-8]|32)$"},
                {
                    "type": "object",
                    "properties": {"w": _width_schema(), "a": _width_schema()},
                    "required": ["w", "a"],
                    "additionalProperties": False,
                },
            ],
        }
    ),
]


def _switch(word: str, others: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if isinstance(value, str):
            value = _WORDS.get(value.lower(), value)
        if isinstance(value, bool) or value == word:
            return value
        raise ValueError(f"must be {word}, {others}")

    return read


def _auto_or_bool() -> Any:
    schema = {"anyOf": [{"const": "auto", "type": "string"}, {"type": "boolean"}]}
    return Annotated[Any, PlainValidator(_switch("auto", "true or false")), WithJsonSchema(schema)]


AutoOrBool = _auto_or_bool()


def _amp(value: Any) -> str | None:
    if isinstance(value, str):
        value = _WORDS.get(value.lower(), value)
    if value is None or value is False:
        return None
    if value is True:
        return "bfloat16"
    if value in ("bfloat16", "float16"):
        return str(value)
    raise ValueError("must be bfloat16, float16 or null for full precision")


Amp = Annotated[
    Any,
    PlainValidator(_amp),
    WithJsonSchema({"anyOf": [{"enum": ["bfloat16", "float16"]}, {"type": "boolean"}, {"type": "null"}]}),
]


def _ascending(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("must go from the smaller to the larger number")
    return pair


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


def _pattern(text: str) -> str:
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except re.error as broken:
            raise ValueError(f"must be a regular expression after re: ({broken})") from None
    return text


LayerPattern = Annotated[Name, AfterValidator(_pattern)]


def finite(value: float) -> bool:
    """Whether a number is neither infinite nor NaN."""
    return math.isfinite(value)
