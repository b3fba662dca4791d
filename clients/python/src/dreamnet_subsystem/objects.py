"""JSON objects as Python has them, to and from `google.protobuf.Struct`."""

import math
import numbers
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import ListValue, Struct, Value

MAX_DEPTH = 90  # Nested messages: protobuf libraries of some languages stop at 100. The contract sets it.
MAX_WHOLE = 1 << 53  # Whole numbers up to it are exact in a double, which is what JSON's numbers are here.


def from_struct(struct: Struct) -> dict[str, Any]:
    """The object. Its numbers are floats, since JSON has no others."""
    return {key: _from_value(value) for key, value in struct.fields.items()}


def _from_value(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return from_struct(value.struct_value)
    if kind == "list_value":
        return [_from_value(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)


def to_struct(name: str, given: Mapping[str, Any]) -> Struct:
    """The message.

    Raises TypeError or ValueError with the place of what JSON can't represent, such as `output.prices[3]`.
    """
    struct = Struct()
    _fill_struct(name, given, struct, 1)
    return struct


def _fill_struct(place: str, given: Mapping[Any, Any], struct: Struct, depth: int) -> None:
    _check_depth(place, depth)
    for key, item in given.items():
        if not isinstance(key, str):
            raise TypeError(f"{place} has the key {key!r}, which is not a str")
        _fill_value(f"{place}.{key}", item, struct.fields[_text(place, key)], depth + 2)


def _fill_list(place: str, given: list[Any] | tuple[Any, ...], values: ListValue, depth: int) -> None:
    _check_depth(place, depth)
    for index, item in enumerate(given):
        _fill_value(f"{place}[{index}]", item, values.values.add(), depth + 1)


def _fill_value(place: str, given: object, value: Value, depth: int) -> None:
    _check_depth(place, depth)
    if given is None:
        value.null_value = 0  # type: ignore[assignment]
    elif isinstance(given, bool):
        value.bool_value = given
    elif isinstance(given, str):
        value.string_value = _text(place, given)
    elif isinstance(given, numbers.Real):  # Numbers of numpy too.
        value.number_value = to_number(place, given)  # type: ignore[arg-type]
    elif isinstance(given, Mapping):
        _fill_struct(place, given, value.struct_value, depth + 1)
        value.struct_value.SetInParent()  # Also if it is empty.
    elif isinstance(given, (list, tuple)):
        _fill_list(place, given, value.list_value, depth + 1)
        value.list_value.SetInParent()
    else:
        kind = type(given).__name__
        raise TypeError(f"{place} is of type {kind}; JSON has None, bool, float, int, str, list and dict")


def to_number(place: str, given: float) -> float:
    """The number as JSON has it.

    Raises ValueError if it is NaN, infinite, or a whole number that a double can't represent exactly.
    """
    if isinstance(given, numbers.Integral) and abs(int(given)) > MAX_WHOLE:
        raise ValueError(f"{place} is {given}, beyond 2^53, where a double is not exact; send it as a str")
    made = float(given)
    if not math.isfinite(made):
        raise ValueError(f"{place} is {made}, which JSON can't represent; send None")
    return made


def _text(place: str, given: str) -> str:
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} contains a text that is not Unicode: {error.reason}") from None
    return given


def _check_depth(place: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError(f"{place[:80]}… nests deeper than {MAX_DEPTH // 3} objects")
