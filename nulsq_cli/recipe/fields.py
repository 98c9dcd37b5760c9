"""The types of a recipe's values: bit widths, names from a table, numbers within bounds.

pydantic's lax mode on purpose: some YAML readers and all shells hand over `1e-3` as text.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from nulsq_cli.errors import NulsqError, suggest
from nulsq_cli.methods import METHODS
from nulsq_cli.schemes import SCHEMES
from nulsq_cli.stabilizers import STABILIZERS
from nulsq_cli.values import INITIALIZER_NAMES
from nulsq_cli.values import Bits as _Bits


def _read_bits(value: Any) -> Any:
    if isinstance(value, _Bits):
        return value
    if isinstance(value, dict) and set(value) == {"w", "a"}:
        value = f"{value['w']}/{value['a']}"
    if re.fullmatch(r"\d+:\d+", str(value)):
        raise ValueError(f"must be weight bits/activation bits, got {value}; write {value.replace(':', '/')}")
    try:
        return _Bits.parse(value)
    except NulsqError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error


def _one_of(kind: str, names: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and (not isinstance(value, str) or value not in names):
            raise ValueError(f"no {kind} called {value!r}; {suggest(str(value), names)}")
        return value

    return BeforeValidator(check)


def _no_bool(value: Any) -> Any:
    # The one laxness of pydantic that is not wanted: true would be 1.
    if isinstance(value, bool):
        raise ValueError(f"must be a number, got {str(value).lower()}")
    return value


def _countable(value: int) -> int:
    if value > 10**9:
        raise ValueError("must be at most 1000000000")
    return value


def _auto_or_bool(value: Any) -> Any:
    if isinstance(value, str):
        value = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}.get(value, value)
    if value != "auto" and not isinstance(value, bool):
        raise ValueError(f"must be auto, true or false, got {value!r}")
    return value


def _compile(value: Any) -> Any:
    try:
        return value if value == "model" else _auto_or_bool(value)
    except ValueError as reason:
        raise ValueError(str(reason).replace("auto, true or false", "auto, true, false or model")) from reason


def _ascending(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError(f"must go from the smaller to the larger number, got {pair}")
    return pair


def _comparable(value: Any) -> Any:
    """A recipe with NaN would be another one each time it is read."""
    if isinstance(value, float) and value != value:
        raise ValueError("must hold numbers, got nan")
    for inner in [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        _comparable(inner)
    return value


def _pattern(text: str) -> str:
    if len(text) > 300:
        raise ValueError(f"must be a pattern of at most 300 characters, got {len(text)}")
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, RecursionError, OverflowError) as reason:
            raise ValueError(f"must be a regular expression after re:, got {text[3:]!r} ({reason})") from reason
    return text


Bits = Annotated[_Bits, BeforeValidator(_read_bits), PlainSerializer(str, return_type=str),
                 WithJsonSchema({"type": "string", "pattern": "^([2-8]|32)/([2-8]|32)$"})]  # fmt: skip
Options = Annotated[dict[str, Any], AfterValidator(_comparable)]
MethodName = Annotated[str, _one_of("method", METHODS)]
StabilizerName = Annotated[str, _one_of("stabilizer", STABILIZERS)]
RuleName = Annotated[str, _one_of("initializer", INITIALIZER_NAMES)]
SchemeName = Annotated[str, _one_of("scheme", SCHEMES)]
Name = Annotated[str, Field(min_length=1)]
# The bounds stand before the validator, else they are missing from the JSON schema.
NUMBER = BeforeValidator(_no_bool)
Number = Annotated[float, Field(allow_inf_nan=False), NUMBER]
Share = Annotated[float, Field(ge=0, le=1), NUMBER]
Percent = Annotated[float, Field(ge=0, le=100), NUMBER]
BelowOne = Annotated[float, Field(ge=0, lt=1), NUMBER]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False), NUMBER]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), NUMBER]
Count = Annotated[int, Field(ge=1), AfterValidator(_countable), NUMBER]
AtLeastZero = Annotated[int, Field(ge=0), AfterValidator(_countable), NUMBER]
AutoOrBool = Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)]
Compile = Annotated[Literal["auto", "model"] | bool, BeforeValidator(_compile)]
Range = Annotated[list[Positive], Field(min_length=2, max_length=2), AfterValidator(_ascending)]
LayerPattern = Annotated[Name, AfterValidator(_pattern)]
