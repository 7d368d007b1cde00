"""The kinds of classes that data may be of: dataclass, attrs, msgspec, pydantic. Pure.

None of these libraries is imported: a class tells its kind by an attribute, and whoever made an
object of it has imported the library.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection
from typing import Any


def field_names(kind: type) -> Collection[str]:
    """The names of the fields of its objects, in Python; none if it is another kind of class."""
    for attribute in ("__struct_fields__", "model_fields", "__dataclass_fields__"):
        if isinstance(names := getattr(kind, attribute, None), Collection):
            return names
    return [field.name for field in getattr(kind, "__attrs_attrs__", ())]


def is_pydantic(kind: object) -> bool:
    """Whether it is a pydantic model, or a dataclass of pydantic's."""
    return isinstance(kind, type) and hasattr(kind, "__pydantic_serializer__")


def fields_of(value: Any) -> Any:
    """The fields of an object by the names that they have in JSON; anything else as it is.

    The values of the fields stay what they are, except that pydantic also converts the models
    inside a model. Its serializers, aliases and exclusions apply, and msgspec's renamed fields.
    """
    kind = type(value)
    if isinstance(value, type):
        return value  # msgspec's classes have these attributes, too
    if hasattr(kind, "__pydantic_serializer__"):
        if hasattr(kind, "model_dump"):
            return value.model_dump(mode="python", by_alias=True)
        return kind.__pydantic_serializer__.to_python(value, mode="python", by_alias=True)
    if hasattr(kind, "__struct_config__"):
        return _of_struct(value)
    if hasattr(kind, "__dataclass_fields__"):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(kind, "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    return value


def _of_struct(value: Any) -> Any:
    """As msgspec.to_builtins, but only the struct itself, so that what is in it stays as it is."""
    kind = type(value)
    config = kind.__struct_config__
    values = [getattr(value, name) for name in kind.__struct_fields__]
    if config.array_like:
        return values if config.tag is None else [config.tag, *values]
    unset = sys.modules["msgspec"].UNSET
    fields = {} if config.tag is None else {config.tag_field: config.tag}
    # Of the last fields: those without a default come first.
    defaults = kind.__struct_defaults__
    first = len(values) - len(defaults)
    for at, (name, each) in enumerate(zip(kind.__struct_encode_fields__, values, strict=True)):
        is_left_out = (
            config.omit_defaults and at >= first and _is_default(each, defaults[at - first])
        )
        if each is not unset and not is_left_out:
            fields[name] = each
    return fields


def _is_default(value: object, default: Any) -> bool:
    """Whether msgspec leaves it out: the very default, or an empty container made anew."""
    if value is default:
        return True
    kind = type(value)
    return kind in (list, dict) and not value and getattr(default, "factory", None) is kind
