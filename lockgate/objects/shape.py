"""Checks that plain JSON values have the shape of a Struct of `model`, with paths for people.

msgspec checks types too, but cannot say under which label a wrong value is, nor what to do about
an unquoted `yes`. `shape` also drops nulls, which the API treats as absent fields.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from lockgate.objects.errors import FieldError, one_of

__all__ = ["shape"]

_type_info = cache(inspect.type_info)


def shape(value: Any, struct: type[msgspec.Struct], closed: frozenset[str] = frozenset()) -> Any:
    """The value with unknown fields and nulls left out, ready for msgspec.convert.

    Raises FieldError. Paths in `closed`, without indices (such as "spec.ingress.from"), are
    objects that must not have unknown fields: there a typing error changes what is enforced.
    """
    return _check(value, _type_info(struct), "", closed, "")


def _check(value: Any, kind: inspect.Type, path: str, closed: frozenset[str], plain: str) -> Any:
    match kind:
        case inspect.StructType():
            return _check_struct(value, kind, path, closed, plain)
        case inspect.DictType():
            if not isinstance(value, dict):
                raise FieldError(path, "an object", value)
            for key in value:
                if not isinstance(key, str):
                    raise FieldError(path, "only strings as keys (quote it)", key)
            return {
                key: _check(item, kind.value_type, f"{path}[{key}]", closed, plain)
                for key, item in value.items()
            }
        case inspect.ListType():
            if not isinstance(value, list):
                raise FieldError(path, "a list", value)
            return [
                _check(item, kind.item_type, f"{path}[{index}]", closed, plain)
                for index, item in enumerate(value)
            ]
        case inspect.LiteralType():
            if not isinstance(value, str) or value not in kind.values:
                raise FieldError(path, one_of([str(v) for v in kind.values]), value)
            return value
        case inspect.UnionType():
            types = [t for t in kind.types if not isinstance(t, inspect.NoneType)]
            if len(types) == 1:
                return _check(value, types[0], path, closed, plain)
            # The only other union of the model is a port: number or name.
            if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
                return value
            raise FieldError(path, "a port number or name", value)
        case inspect.IntType():
            if not isinstance(value, int) or isinstance(value, bool):
                raise FieldError(path, "a whole number", value)
            if not -(1 << 31) <= value < 1 << 31:
                raise FieldError(path, "a number of 32 bits", value)
            return value
        case inspect.BoolType():
            if not isinstance(value, bool):
                raise FieldError(path, "true or false", value)
            return value
        case inspect.StrType():
            if isinstance(value, bool | int | float):
                raise FieldError(path, "a string (put the value in quotes)", value)
            if not isinstance(value, str):
                raise FieldError(path, "a string", value)
            if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
                raise FieldError(path, "text without lone surrogates", value)
            return value
    raise AssertionError(f"the model has a type that shape does not know: {kind}")


def _check_struct(
    value: Any, kind: inspect.StructType, path: str, closed: frozenset[str], plain: str
) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(path or "(top)", "an object", value)
    dot = "." if path else ""
    fields = {field.encode_name: field for field in kind.fields}
    if plain in closed:
        for key in value:
            if key not in fields:
                raise FieldError(path, f"only the fields {', '.join(fields)}", key)
    result = {}
    for name, field in fields.items():
        below = f"{plain}{dot}{name}"
        if value.get(name) is not None:
            result[name] = _check(value[name], field.type, f"{path}{dot}{name}", closed, below)
        elif field.required:
            raise FieldError(f"{path}{dot}{name}", "a value, as the field is required", None)
    return result
