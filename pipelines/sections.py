"""Dataclasses from the mappings of a YAML file, with a check of every key and type."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeGuard

if typing.TYPE_CHECKING:
    from pipelines.mistakes import Mistakes

# What `build` returns for a value with mistakes.
INVALID: Any = object()

_WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
}


def build(kind: Any, where: str, value: Any, mistakes: Mistakes) -> Any:
    """A value of a type, from what YAML gives.

    Args:
        kind: A dataclass; `str`, `int`, `float` or `bool`; an `X | None`,
            `tuple[X, ...]` or `Mapping[str, X]` of these; or `Any`.
        where: Name of the value in the file, such as `"train.digits.epochs"`.
        value: What the file has: tuples are lists there, and dataclasses mappings.
        mistakes: Gets what is wrong.

    Returns:
        The value. Where it has mistakes, `INVALID`, or for a dataclass a namespace of
        the fields without any.
    """
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, where, value, mistakes)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in {types.UnionType, typing.Union}:
        (other,) = (each for each in inner if each is not types.NoneType)
        return None if value is None else build(other, where, value, mistakes)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(build(inner[0], where, each, mistakes) for each in value)
    if origin is Mapping and isinstance(value, Mapping):
        return {
            key: build(inner[1], f"{where}.{key}", each, mistakes)
            for key, each in value.items()
        }
    if origin is None and _is_plain(kind, value):
        return value
    mistakes.add(f"`{where}` must be {_words(kind)}. Received: {value!r}")
    return INVALID


def build_fields(
    kind: Any, where: str, values: Any, mistakes: Mistakes
) -> dict[str, Any]:
    """The fields of a dataclass, from a mapping.

    Args:
        kind: The dataclass.
        where: Name of the mapping in the file; empty for the whole file.
        values: The mapping.
        mistakes: Gets what is wrong.

    Returns:
        The fields that are given, `INVALID` where they have mistakes.
    """
    if not isinstance(values, Mapping):
        name = f"`{where}`" if where else "The file"
        mistakes.add(f"{name} must be a mapping. Received: {values!r}")
        return {}
    fields = {each.name: each for each in dataclasses.fields(kind)}
    required = {
        name
        for name, each in fields.items()
        if each.default is dataclasses.MISSING
        and each.default_factory is dataclasses.MISSING
    }
    mistakes.check_keys(where, values, required, set(fields) - required)
    kinds = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    return {
        name: build(kinds[name], f"{prefix}{name}", value, mistakes)
        for name, value in values.items()
        if name in fields
    }


def _dataclass(kind: Any, where: str, value: Any, mistakes: Mistakes) -> Any:
    before = len(mistakes)
    fields = build_fields(kind, where, value, mistakes)
    if len(mistakes) == before:
        try:
            return kind(**fields)
        except ValueError as error:
            mistakes.add(str(error))
    return types.SimpleNamespace(
        **{name: field for name, field in fields.items() if field is not INVALID}
    )


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is float:
        return is_number(value)
    return is_integer(value) if kind is int else isinstance(value, kind)


def _words(kind: Any) -> str:
    """A type in words."""
    inner = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return f"a list, each entry {_words(inner[0])}"
    if origin is Mapping:
        return "a mapping"
    return _WORDS[kind]
